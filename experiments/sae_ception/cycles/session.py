"""Data, model and SAEs of one seed: what all arms and cycles of a setting share, and the keys of what they leave.

    session = Session(constants, seed)
    session.key("model", "per_class", 2)    # one hash of constants, data, seed and everything that came before
    session.load("per_class", 2)            # puts that model's weights into session.model
    session.outputs(ids)                    # its activations at the target layer, and its logits
"""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cycles import schemas, stamps
from cycles.choices import check_choices
from cycles.classifier import text_classifier
from cycles.examples import Entries, cached_entries, outputs
from cycles.heads import has_own_head
from cycles.modules import MLP, OwnModule, load_trained, trained_state
from cycles.own import check_fits, is_own, key_of, make
from cycles.sharding import from_first
from cycles.sources import load_task, own_data
from cycles.stamps import Constants, stage_constants
from lib.distributed import rank, world_size
from lib.environment import InputError, choose_device
from lib.files import fingerprint, read_json, read_torch, remove_leftovers
from lib.models import load_tokenizer, local_path, weights_of
from lib.outputs import safe_name
from lib.sae import SAE, load_sae
from lib.store import experiment_dir
from presets import setting_name


class Session:
    """Data, model and cached states of one seed, loaded once for every step of every arm."""

    def __init__(self, c: Constants, seed: int):
        """Raises InputError for data or models that can't be reached, and for constants that do not fit together."""
        check_choices(c)
        c = own_data(c)
        self.c, self.seed = c, seed
        self.device = choose_device(c["DEVICE"])
        self.root = setting_root(c)
        remove_leftovers(self.root)
        self.own = make(c["MODEL"], seed) if is_own(c["MODEL"]) else None
        self.is_text = c["MODEL"] != "mlp" and self.own is None
        self.tokenizer = load_tokenizer(c["MODEL"]) if self.is_text else None
        self.task = load_task(c, seed, self.tokenizer, self.own)
        caches = self.is_text and c["CACHE_ENTRIES"] and not c["TRAIN_BELOW"]
        self.sharded = sharded = self.is_text and c.get("FSDP", False) and world_size() > 1
        if sharded and caches:
            raise InputError("with FSDP no rank holds the frozen blocks that fill the cache; set CACHE_ENTRIES=False")
        self.model: Any  # MLP, OwnModule or TextClassifier
        if self.is_text:
            # only rank 0 reads the model; the others receive their shares
            device = self.device if not sharded else torch.device("meta" if rank() else "cpu")
            self.model = text_classifier(c, self.task, seed, tokenizer=self.tokenizer, device=device)
        else:
            self.model = self.fresh_module(seed).to(self.device)
        if not (self.is_text and has_own_head(self.model.lm)):  # what decides nothing makes no output stale
            self.c = {name: value for name, value in c.items() if name != "KEEP_HEAD"}
        self.task_key = self.task.identity()
        self.model_key = "" if sharded and rank() else weights_of(self.model)
        if self.own is not None:
            self.model_key = key_of(self.model_key, c["MODEL"])
        self.entries: Entries | None = None
        if caches:
            self.entries = cached_entries(self.model, self.task, c, self.root, device=self.device)
        if sharded:
            self.model.share_weights(self.device)
            self.model_key = from_first(self.model_key)
        self.initial = trained_state(self.model)

    def fresh_module(self, seed: int) -> MLP | OwnModule:
        """An untrained module, as `seed` draws it: the paper's MLP, or what MODEL's function makes."""
        layer = self.c["TARGET_LAYER"]
        if self.own is None:
            return MLP(self.task.n_pixels, self.task.n_classes, layer, seed)
        own = self.own if seed == self.seed else make(self.c["MODEL"], seed)
        model = OwnModule(own.module, own.layer if layer == "last" else layer)
        check_fits(model, self.task, self.c["BATCH_SIZE"])
        return model

    def folder(self, arm: str, cycle: int) -> Path:
        """Where the outputs of this arm and cycle lie: cycle 0 is the baseline's."""
        return self.root / ("baseline" if cycle == 0 else safe_arm(arm)) / f"seed_{self.seed}"

    def model_path(self, arm: str, cycle: int) -> Path:
        """checkpoints/model_cycle_<n>_best.pt of this arm."""
        return self.folder(arm, cycle) / "checkpoints" / f"model_cycle_{cycle}_best.pt"

    def sae_path(self, arm: str, cycle: int, sae_seed: int = 0) -> Path:
        """checkpoints/sae_cycle_<n>_best.pt of this arm; further SAE seeds carry their number."""
        name = f"sae_cycle_{cycle}{f'_seed{sae_seed}' if sae_seed else ''}_best.pt"
        return self.folder(arm, cycle) / "checkpoints" / name

    def key(self, kind: str, arm: str, cycle: int, sae_seed: int = 0) -> str:
        """What a "model" or "sae" is made of, as one hash: constants, data, seed, and the keys of what it came from."""
        arm = "baseline" if cycle == 0 else arm
        if kind == "sae":
            return fingerprint([stage_constants(self.c, "sae", arm), self.key("model", arm, cycle), sae_seed])
        base = [stage_constants(self.c, "model", arm), self.seed, self.task_key, self.model_key]
        if cycle == 0:
            return fingerprint(base)
        made_from = [self.key("model", arm, cycle - 1), self.key("sae", arm, cycle - 1)]
        return fingerprint([base, arm, cycle, stage_constants(self.c, "aux", arm), made_from])

    def finished(self, path: Path, key: str) -> bool:
        """Whether `path` exists, made of what `key` says. Raises InputError if it was made of something else."""
        return stamps.finished(path, key, self.c, data=self.task_key, model=self.model_key)

    def load(self, arm: str, cycle: int) -> None:
        """Put the finished model of this arm and cycle into self.model."""
        path = self.model_path(arm, cycle)
        step = "01_train_baseline.py" if cycle == 0 else "03_train_auxiliary.py"
        if not self.finished(path, self.key("model", arm, cycle)):
            raise InputError(f"{path} is missing; run {step} first")
        load_trained(self.model, {} if self.sharded and rank() else read_torch(path, f"run {step} first", dict))
        self.model.eval()

    def sae(self, arm: str, cycle: int, sae_seed: int = 0) -> SAE:
        """The finished SAE of this arm and cycle."""
        path = self.sae_path(arm, cycle, sae_seed)
        if not self.finished(path, self.key("sae", arm, cycle, sae_seed)):
            raise InputError(f"{path} is missing; run 02_train_sae.py CYCLE={cycle} first")
        return load_sae(path, self.device)

    def outputs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """h [N, D] and logits [N, C] that self.model gives for the examples (cycles.examples.outputs)."""
        return outputs(self.model, self.task, ids, self.c["BATCH_SIZE"], entries=self.entries)


def trained_session(c: Constants) -> Session:
    """The session of a finished model, with its weights put back: SETTING, ARM, CYCLE and SEED of `c` name it."""
    seed, arm, cycle = c["SEED"], c["ARM"], c["CYCLE"]
    scope = {name: c[name] for name in ("PRESET", "SETTING", "DEVICE")}
    session = Session(inherited(scope, seed, arm), seed)
    session.load(arm, cycle)
    return session


def recorded(root: Path, seed: int, arms: Iterable[str]) -> Constants:
    """The constants of a setting whose arms were trained by several commands, as its folders record them: those of the
    baseline, and under ARM_CONSTANTS what decided each arm's targets and training.
    """
    def of(arm: str) -> Constants:
        return read_json(root / safe_arm(arm) / f"seed_{seed}" / "constants.json", schemas.SETTING)

    own = {arm: stage_constants(of(arm), "aux", arm) for arm in arms if arm != "baseline"}
    return of("baseline") | {"ARMS": list(own), "ARM_CONSTANTS": own}


def setting_root(c: Constants) -> Path:
    """The folder of a setting's outputs. Raises InputError for a name that would leave the store."""
    return experiment_dir("sae_ception") / safe_name(setting_name(c))


def safe_arm(arm: str) -> str:
    """An arm, which may carry a label, as the name of its folder. Raises InputError for any other path."""
    safe_name(arm.replace("@", "_"))
    return arm


def inherited(c: Constants, seed: int, arm: str) -> Constants:
    """The constants of a later step: those of the steps before it, as the setting's folders record them, and its own.

    Raises InputError if step 1 was not run.
    """
    root = setting_root(c)
    baseline = root / "baseline" / f"seed_{seed}" / "constants.json"
    if not baseline.exists():
        named = f" SETTING={c['SETTING']}, with its other constants," if c["SETTING"] else ""
        command = f"01_train_baseline.py PRESET={c['PRESET']} SEED={seed}{named}"
        raise InputError(f"{baseline.parent} holds no baseline; run {command} first")
    own = root / safe_arm(arm) / f"seed_{seed}" / "constants.json"
    found = read_json(baseline, schemas.SETTING) | (read_json(own, schemas.SETTING) if own.exists() else {})
    for name, then in read_json(baseline.with_name("meta.json"), schemas.ORIGIN)["paths"].items():
        if local_path(found[name]) is None:  # the hub would be asked for it
            raise InputError(f"{name}={found[name]} was {then} when step 1 ran; put it back there, or start this step "
                             "where step 1 was started")
    return found | c | {"SETTING": root.name}
