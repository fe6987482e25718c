"""A classifier's training that is not over: what it resumes from, with any number of ranks.

    save(Checkpoint(path, key), settings, progress, model=model, optimizer=optimizer)
    progress = load(Checkpoint(path, key), settings, model=model, optimizer=optimizer)

    <path>.pt                        weights, moments and progress, from rank 0; within epochs too where it is alone
    <path>/progress.json, epoch_<n>/ the same where the weights are shared out: each rank writes its own share
                                     (torch.distributed.checkpoint, as safetensors), and reads what it needs of them
"""
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cycles import schemas
from cycles.modules import load_trained, trained_state
from cycles.sharding import from_first, is_sharded, receive
from lib.distributed import agree, rank, wait_for_all, world_size
from lib.environment import InputError, first_line
from lib.files import read_json, read_torch, write_json, write_torch
from lib.outputs import is_current
from lib.schemas import Misfit, check_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
DAMAGED = (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError,
           Misfit)


class Checkpoint(NamedTuple):
    """A file from which an interrupted training resumes, if it was written under the same key."""

    path: Path
    key: str = ""

    @property
    def folder(self) -> Path:
        """Where the shares of all ranks lie instead."""
        return self.path.with_suffix("")

    def remove(self) -> None:
        """Delete what was saved, in whatever form."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def save(
    checkpoint: Checkpoint, settings: dict[str, Any], progress: dict[str, Any], *, model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the training as it stands; every rank must call it."""
    content = {"key": checkpoint.key, "settings": settings, "progress": progress}
    if any(is_sharded(p) for p in model.parameters()):
        _save_shares(checkpoint, content, model, optimizer)
    elif rank() == 0:
        write_torch(checkpoint.path, content | {"state": trained_state(model), "optimizer": optimizer.state_dict()})
        shutil.rmtree(checkpoint.folder, ignore_errors=True)


def partial_epoch(step: int, losses: list[Tensor], device: torch.device) -> dict[str, Any]:
    """What an epoch resumes from after so many steps: the losses of its batches, and the generators as they stand."""
    of_device = {"generator_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"step": step, "losses": torch.stack(losses).cpu(), "generator": torch.get_rng_state()} | of_device


def begun_epoch(partial: dict[str, Any] | None, device: torch.device) -> tuple[int, list[Tensor]]:
    """How many steps an epoch has behind it and the losses of their batches; sets the generators as partial_epoch
    found them. Of several ranks the first goes on with both.
    """
    if partial is None:
        return 0, []
    losses = partial["losses"].to(device)
    if rank():
        return partial["step"], list(torch.zeros_like(losses))
    torch.set_rng_state(partial["generator"])
    if device.type == "cuda" and "generator_cuda" in partial:
        torch.cuda.set_rng_state(partial["generator_cuda"], device)
    return partial["step"], list(losses)


def _save_shares(
    checkpoint: Checkpoint, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    import torch.distributed.checkpoint as dcp

    place = checkpoint.folder / f"epoch_{len(content['progress']['epochs'])}"
    if rank() == 0:
        shutil.rmtree(place, ignore_errors=True)  # shares of an attempt that was killed, perhaps of more ranks
    wait_for_all()
    trained = _trained(model)
    moments = {name: of for name, p in trained.items() if (of := optimizer.state.get(p))}
    tensors = _named(trained, content["progress"]["best"], moments)
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True))
    if rank() == 0:
        content |= {"progress": content["progress"] | {"best": {}}, "place": place.name,
                    "steps": {name: int(of["step"]) for name, of in moments.items()}}
        write_json(checkpoint.folder / "progress.json", content, sealed=True)
        checkpoint.path.unlink(missing_ok=True)
        for other in checkpoint.folder.glob("epoch_*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)


def load(
    checkpoint: Checkpoint, settings: dict[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """The progress that save wrote, with its weights and moments put back; None if there is no checkpoint.

    Raises InputError if it belongs to another training, or is damaged.
    """
    note = checkpoint.folder / "progress.json"
    exists = checkpoint.path.exists() or note.exists()
    if not agree(exists):
        raise InputError("only some ranks see the checkpoint; STORE_DIR must lie on a file system that all ranks share")
    if not exists:
        return None
    shared = from_first(note.exists())
    path = note if shared else checkpoint.path
    found = read_json(note, schemas.SHARED_TUNING) if shared else read_torch(path, "train again", schemas.TUNING)
    made_from = "data, model or output of an earlier step"
    is_current(path, {**found["settings"], made_from: found["key"]}, {**settings, made_from: checkpoint.key},
               "finish that training with its own, or delete it to train anew")
    try:
        if shared:
            best = _load_shares(checkpoint.folder / found["place"], found["steps"], model, optimizer)
            found["progress"]["best"] = best
        else:
            if partial := found["progress"].get("partial"):
                check_tensors(partial, schemas.PARTIAL, P=2)
                torch.Generator().set_state(partial["generator"])
            load_trained(model, found["state"])
            _set_moments(optimizer, _own_moments(optimizer, found["optimizer"]["state"]))
    except DAMAGED as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); delete {path.parent if shared else 'it'} and train "
                         "again") from None
    return found["progress"]


def _load_shares(
    place: Path, steps: dict[str, int], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Fill weights and moments from the shares of however many ranks wrote them; returns the best epoch's weights."""
    import torch.distributed.checkpoint as dcp

    trained = _trained(model)
    reader = dcp.HuggingFaceStorageReader(str(place))
    stored = reader.read_metadata().state_dict_metadata.keys()
    best = {name: torch.empty_like(p) for name, p in trained.items() if f"best.{name}" in stored}
    moments = {name: {moment: torch.empty_like(trained[name]) for moment in MOMENTS} for name in steps}
    tensors = _named(trained, best, moments)
    if tensors.keys() != stored:
        raise ValueError("its tensors are not those of this model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
        except dcp.CheckpointException as error:  # no Exception of Python's
            raise ValueError(first_line(error)) from None
    _set_moments(optimizer, {trained[name]: {**of, "step": torch.tensor(float(steps[name]))}
                             for name, of in moments.items()})
    return best


def _set_moments(optimizer: torch.optim.Optimizer, found: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    number = {p: i for i, p in enumerate(optimizer.param_groups[0]["params"])}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {number[p]: of for p, of in found.items()}})


def _own_moments(
    optimizer: torch.optim.Optimizer, found: dict[int, dict[str, Tensor]]
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Whole moments by the numbers of their parameters, as this rank holds them."""
    parameters, own = optimizer.param_groups[0]["params"], {}
    for i, of in found.items():
        own[parameters[i]] = dict(of)
        for name in MOMENTS if is_sharded(parameters[i]) else ():
            own[parameters[i]][name] = torch.empty_like(parameters[i])
            receive(own[parameters[i]][name], of[name])
    return own


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _named(
    trained: dict[str, nn.Parameter], best: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names that they have there."""
    found = {f"model.{name}": p.detach() for name, p in trained.items()}
    found |= {f"best.{name}": tensor.detach() for name, tensor in best.items()}
    return found | {f"{kind}.{name}": of[kind].detach() for name, of in moments.items() for kind in MOMENTS}
