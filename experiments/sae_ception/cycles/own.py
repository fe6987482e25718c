"""A classifier of people's own: any torch module, its layer and its data, from a Python file that they name.

    MODEL="my_model.py:make_classifier"

The function takes nothing and returns (module, name of the target layer, data). It runs under the seed, so that each
seed has another start. data is a dict: "train", "test" and, if there is one, "val" are data sets or data loaders of
(x, y), or such a pair of tensors; "classes", if it is there, holds the classes' names.
"""
import ast
import copy
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from tqdm.auto import tqdm

from cycles.labels import classes, in_words
from cycles.modules import OwnModule
from cycles.tasks import Task, limited
from lib.environment import InputError, first_line, log
from lib.files import fingerprint, sha256
from lib.hooks import edit

READ_AT_ONCE = 1024  # examples of a data set that are read together
FORM = "it must return (module, name of its layer, {'train': ..., 'test': ...})"


class Own(NamedTuple):
    """What the function returned."""

    module: nn.Module
    layer: str
    data: dict[str, Any]


def is_own(model: str) -> bool:
    """Whether MODEL names a function in a Python file."""
    return re.fullmatch(r".+\.py:[A-Za-z_]\w*", model) is not None


def file_of(model: str) -> Path:
    """The Python file of MODEL. Raises InputError if it is not there."""
    path = Path(model.rpartition(":")[0]).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"there is no file {path}; set MODEL to a Python file and a function in it, my_model.py:make")
    return path


def make(model: str, seed: int) -> Own:
    """Call the function that MODEL names, with torch's random numbers drawn from `seed` and given back afterwards.

    Raises InputError if file or function are missing or fail, or if the function returns something else.
    """
    path, name = file_of(model), model.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"own_model_{path.stem}", path)
    assert spec and spec.loader
    code = importlib.util.module_from_spec(spec)
    with torch.random.fork_rng(), _findable(path.parent):
        torch.manual_seed(seed)
        sys.modules[spec.name] = code  # where dataclasses look
        try:
            spec.loader.exec_module(code)
            if not callable(getattr(code, name, None)):
                raise InputError(f"MODEL={model}: {path.name} has no function {name}; it has "
                                 f"{', '.join(key for key, value in vars(code).items() if callable(value))}")
            found = getattr(code, name)()
        except InputError:
            raise
        except Exception as error:  # whatever code of other people raises
            raise InputError(f"MODEL={model} fails with {type(error).__name__}: {first_line(error)}; mend "
                             f"{path.name}") from error
    if not (isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], nn.Module)
            and isinstance(found[1], str) and isinstance(found[2], dict) and {"train", "test"} <= set(found[2])):
        raise InputError(f"MODEL={model} returned something else; {FORM}")
    return Own(*found)


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    """Let the file import what lies beside it, as a script could."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def key_of(weights: str, model: str) -> str:
    """Sixteen hex digits over the weights and the code, imports from beside it included: another code is another model.
    """
    path = file_of(model)
    others = sorted(code_of(path) - {path})
    return fingerprint([weights, sha256(path), *map(sha256, others)])


def code_of(path: Path) -> set[Path]:
    """The file, those below its folder that its import statements name, and what these import in their turn."""
    found: set[Path] = set()
    left = [path]
    while left:
        file = left.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        with suppress(SyntaxError):  # of a file that is imported where it can be
            for node in ast.walk(ast.parse(file.read_bytes())):
                left += _imported(node, file.parent, path.parent)
    return found


def _imported(node: ast.AST, here: Path, folder: Path) -> list[Path]:
    """Where the modules that a statement imports would lie, in a file of the folder `here` below `folder`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        folder = [folder, here, *here.parents][min(node.level, len(here.parents) + 1)]
    else:
        return []
    stems = {folder.joinpath(*name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    return [path for stem in sorted(stems) for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")]


def check_fits(model: OwnModule, task: Task, batch_size: int) -> None:
    """Raise InputError unless the module takes the task's inputs, gives a number for each class and can be trained."""
    x = task.images[:3] if task.images is not None else torch.zeros(0)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the module of MODEL has no parameter that trains; set requires_grad of what is to be trained")
    model.eval()
    times = count()
    try:
        with torch.no_grad(), edit(model.module, model.target, lambda h: (next(times), h)[1]):
            h, logits = model({"x": x})
    except InputError:
        raise
    except Exception as error:  # whatever code of other people raises
        raise InputError(f"the module of MODEL can't read its data ({first_line(error)}); x has the shape "
                         f"{tuple(x.shape)}, {x.dtype}") from error
    if not isinstance(logits, Tensor):
        raise InputError(f"the module of MODEL gives a {type(logits).__name__}; it must give the logits alone, one "
                         "number for each class")
    if (n := next(times)) != 1:
        raise InputError(f"the target layer {model.target.path} runs {n} times for one input; name one that runs once")
    if len(h) != len(x):
        raise InputError(f"the target layer {model.target.path} gives {len(h)} rows for {len(x)} examples; name a "
                         "layer whose first dimension is the examples")
    if logits.shape != (len(x), task.n_classes):
        raise InputError(f"the module of MODEL gives {logits[0].numel()} numbers for each example, but the data have "
                         f"the classes 0 to {task.n_classes - 1}; they must be as many")
    if len(task.splits["train"]) % batch_size == 1:
        try:
            with torch.no_grad(), torch.random.fork_rng():
                copy.deepcopy(model).train()({"x": x[:1]})
        except Exception as error:  # a batch norm needs two
            raise InputError(f"the last batch of an epoch has one example, which the module of MODEL can't learn from "
                             f"({first_line(error)}); set BATCH_SIZE to another number than {batch_size}") from error
    path = model.target.path
    log.info("MODEL: %s, %s parameters; target layer %s, %d units", type(model.module).__name__,
             f"{sum(p.numel() for p in model.parameters()):,}", path, h.shape[1])


def own_task(own: Own, limit: int | None) -> tuple[Task, list[str]]:
    """The task of the module's data, and the split of each example. Everything is read once, in order, into memory."""
    parts = {name: _read(own.data[name], name) for name in ("train", "val", "test") if own.data.get(name) is not None}
    shapes = {tuple(x.shape[1:]) for x, _ in parts.values()}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(shapes)))
        raise InputError(f"the splits' inputs have the shapes {found}; they must be alike")
    where = [name for name, (x, _) in parts.items() for _ in range(len(x))]
    y, known = classes([label for _, labels in parts.values() for label in labels], where, "the data's y")
    if known != list(range(len(known))):
        raise InputError(f"the data's classes must be numbered from 0, each in training; they are {known[:12]}")
    _check_repeated(parts)
    task = Task(y, 0, {}, class_names=in_words(known, _called(own, len(known))))
    kept = limited(task, where, limit)
    task.images, task.y = torch.cat([x for x, _ in parts.values()])[kept], y[kept]
    return task, [where[i] for i in kept]


def _called(own: Own, n_classes: int) -> list[str]:
    """The classes' names, from data["classes"] or the training set, or none. Raises InputError if two share one."""
    given = own.data.get("classes")
    names = list(map(str, getattr(own.data["train"], "classes", ()) if given is None else given))
    if given is not None and not len(names) == len(set(names)) == n_classes:
        raise InputError(f"data['classes'] must have {n_classes} different names, one for each class; it has "
                         f"{', '.join(names)[:80]}")
    return names


def _check_repeated(parts: dict[str, tuple[Tensor, list[Any]]]) -> None:
    """Warn of inputs in two splits. Raises InputError if two splits are the same."""
    rows = {name: [hash(row.numpy().tobytes()) for row in x] for name, (x, _) in parts.items()}
    for held_out, other in (("val", "train"), ("test", "train"), ("val", "test")):
        if held_out not in parts or other not in parts:
            continue
        if torch.equal(parts[held_out][0], parts[other][0]):
            raise InputError(f"data[{other!r}] and data[{held_out!r}] are the same inputs; give {held_out} examples of "
                             "its own")
        known = set(rows[other])
        if n := sum(row in known for row in rows[held_out]):
            words = "training" if other == "train" else other
            log.warning("%s of %s %s inputs are %s inputs too: take them out of one of the two", f"{n:,}",
                        f"{len(rows[held_out]):,}", held_out, words)


def _check_loader(loader: DataLoader, name: str) -> None:
    """Raise InputError for a loader that draws from its data set: it would be read whole."""
    if isinstance(loader.dataset, IterableDataset):
        return
    for sampler, known in ((loader.sampler, (SequentialSampler, RandomSampler)),
                           (loader.batch_sampler, (BatchSampler, type(None)))):
        if type(sampler) not in known:
            raise InputError(f"data[{name!r}] draws with a {type(sampler).__name__}; give the examples that belong to "
                             "it alone: torch.utils.data.Subset(data set, their numbers)")


def _read(source: Any, name: str) -> tuple[Tensor, list[Any]]:
    """x [N, ...] and the labels of a data set, a data loader (its own order does not matter) or a pair of tensors."""
    if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Tensor):
        x, y = source
    else:
        if isinstance(source, DataLoader):
            _check_loader(source, name)
            source, collate = source.dataset, source.collate_fn
        else:
            collate = None
        loader = DataLoader(source, READ_AT_ONCE, collate_fn=collate)
        try:
            batches = [tuple(batch) for batch in tqdm(loader, desc=f"reading {name}", leave=False)]
            x, y = (torch.cat([torch.as_tensor(batch[i]) for batch in batches]) for i in (0, 1))
        except Exception as error:
            raise InputError(f"data[{name!r}] can't be read ({first_line(error)}); it must give (x, y), with x alike "
                             "in shape") from error
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if len(x) != len(y) or y.ndim != 1:
        raise InputError(f"data[{name!r}] has {len(x):,} inputs and labels of shape {tuple(y.shape)}; give each input "
                         "one label")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise InputError(f"data[{name!r}] has inputs that are not finite; fill them or leave them out")
    return (x.float() if x.is_floating_point() else x), y.tolist()
