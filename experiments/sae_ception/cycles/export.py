"""A trained classifier as others load it: a transformers folder, or a torch module's weights.

    how = save_for_others(session, folder)      # the lines of Python that load it
"""
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from cycles.classifier import TextClassifier
from cycles.examples import make_batch
from cycles.heads import head_parts
from cycles.session import Session
from lib.environment import InputError, log
from lib.files import write_json, write_text, write_torch
from lib.texts import tokenise

CHECKED = 16  # validation examples on which the saved model must give the classifier's logits
TOLERANCE = 1e-3  # of a logit
MIXED_TOLERANCE = 0.1  # where the frozen layers ran in bfloat16: what is saved is float32

TRANSFORMERS = """from transformers import pipeline
classify = pipeline("text-classification", {folder!r}, top_k=None, truncation=True)
print(classify("a text"))"""
HEAD = """import torch, safetensors.torch, transformers
model = transformers.AutoModel.from_pretrained({folder!r})
head = safetensors.torch.load_file({folder!r} + "/head.safetensors")
tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})
batch = tokenizer("a text", return_tensors="pt", truncation=True)
state = model(**batch).last_hidden_state[:, {position}]
print(dict(zip({names!r}, torch.nn.functional.linear(state, **head).softmax(1)[0].tolist())))"""
MODULE = """import torch
module.load_state_dict(torch.load({folder!r} + "/model.pt", weights_only=True))  # your module, made by your own code
module.eval()  # its outputs are the classes {names!r}"""


def save_for_others(session: Session, folder: Path) -> str:
    """Save session.model, as it is now, into `folder`; returns the Python that loads it without this project.

    Texts: a transformers classifier with tokenizer and the classes' names, where transformers has one of this form and
    it gives the same logits; else the body, and the head beside it. The tokenizer cuts texts at MAX_LENGTH. Modules:
    the state_dict. Raises InputError for quantised models and for ranks that hold only a share of the weights.
    """
    if session.is_text and (session.c["LOAD_BITS"] or session.c.get("FSDP")):
        raise InputError("a quantised or sharded model can't be saved for others; train with LOAD_BITS=None and "
                         "without FSDP")
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    names = session.task.class_names
    if session.is_text:
        how = _save_text(session, work)
    else:
        module = session.model.layers if hasattr(session.model, "layers") else session.model.module
        write_torch(work / "model.pt", {name: value.cpu() for name, value in module.state_dict().items()})
        how = MODULE
    write_json(work / "classes.json", names)
    how = how.format(folder=str(folder), names=names, position=_position(session))
    write_text(work / "README.md", f"# {session.root.name}: {len(names)} classes\n\n```python\n{how}\n```\n")
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return how


def _position(session: Session) -> int:
    return 0 if session.is_text and session.model.reads_first else -1


def _save_text(session: Session, folder: Path) -> str:
    model: TextClassifier = session.model
    whole: Any = (_as_transformers if model.columns is None else _with_its_columns)(model, session.task.class_names)
    _save_tokenizer(session, folder)
    if whole is not None and _agrees(session, whole):
        whole.config.problem_type = "single_label_classification"  # pipelines apply a softmax
        whole.save_pretrained(folder)
        return TRANSFORMERS
    if model.columns is not None:
        raise InputError("transformers gives other logits than the trained classifier; set KEEP_HEAD=False and train "
                         "again")
    log.warning("transformers has no classifier with this head, so the body is saved with the head beside it")
    copy.deepcopy(model.lm.base_model).float().save_pretrained(folder)
    save_file({name: value.cpu().contiguous() for name, value in model.head.state_dict().items()},
              folder / "head.safetensors")
    return HEAD


def _save_tokenizer(session: Session, folder: Path) -> None:
    """The tokenizer with the length at which training cut texts. Raises InputError if it loads as another.

    It is read as others will read it, on validation texts and on one that is too long.
    """
    tokenizer: Any = copy.deepcopy(session.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(session.task.pad_id)
    length = tokenizer.model_max_length = session.c["MAX_LENGTH"]
    tokenizer.save_pretrained(folder)
    texts = [session.task.texts[i] for i in session.task.splits["val"][:CHECKED].tolist()]
    texts.append(" ".join(texts[:1] * (length + 1)))
    ours = [item.ids for item in tokenise(session.tokenizer, texts, 0, length)]
    if transformers.AutoTokenizer.from_pretrained(folder)(texts, truncation=True)["input_ids"] != ours:
        raise InputError("the tokenizer reads texts otherwise once it is saved and loaded; set MODEL to a folder that "
                         "its save_pretrained wrote, and train again")


def _as_transformers(model: TextClassifier, names: list[str]) -> Any:
    """A transformers classifier with the model's weights; None if there is none whose head is one linear layer."""
    config = copy.deepcopy(model.lm.config)
    _name_classes(config, names)
    try:
        whole = transformers.AutoModelForSequenceClassification.from_config(config)
        whole.base_model.load_state_dict(model.lm.base_model.state_dict())
    except (ValueError, RuntimeError):  # no such class, or another base
        return None
    parts = [part for part in head_parts(whole) if any(True for _ in part.parameters())]
    if len(parts) != 1 or not isinstance(parts[0], nn.Linear) or (parts[0].bias is None) != (model.head.bias is None):
        return None
    parts[0].load_state_dict(model.head.state_dict())
    return whole.float().eval()


def _with_its_columns(model: TextClassifier, names: list[str]) -> Any:
    """A copy of a classifier that kept its own head, whose outputs are the task's classes alone, in their order.

    Raises InputError if it has other outputs and not one linear layer that gives them.
    """
    whole: Any = copy.deepcopy(model.lm).float().eval()
    n = whole.config.num_labels
    if model.columns != list(range(n)):
        last = [layer for part in head_parts(whole) for layer in part.modules()
                if isinstance(layer, nn.Linear) and layer.out_features == n]
        if len(last) != 1:
            raise InputError(f"MODEL's own head can't be cut to the data's classes, {', '.join(names[:5])}; set "
                             "KEEP_HEAD=False and train again")
        for name, p in list(last[0].named_parameters()):
            setattr(last[0], name, nn.Parameter(p.detach()[model.columns]))
        last[0].out_features = whole.num_labels = len(names)
    _name_classes(whole.config, names)
    return whole


def _name_classes(config: Any, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in config.id2label.items()}


@torch.no_grad()
def _agrees(session: Session, whole: Any) -> bool:
    """Whether a transformers classifier gives the logits of session.model on some validation texts, in one batch."""
    ids = session.task.splits["val"][:CHECKED]
    model = session.model.eval()
    device = next(model.parameters()).device
    batch: dict[str, Tensor] = make_batch(session.task, ids, device)
    ours = model(batch)[1].float()
    theirs = whole.to(device)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    mixed = any(p.dtype != torch.float32 for p in model.parameters())
    return torch.allclose(ours, theirs, atol=MIXED_TOLERANCE if mixed else TOLERANCE)
