"""Data, model and cached states of one seed, and the keys by which outputs know what they were made from.

    session = Session(constants, seed)
    session.key("model", "per_class", 2)    # one hash of constants, data, seed and everything that came before
    session.load("per_class", 2)            # puts that model's weights into session.model

Every output has a stamp beside it: its key, its checksum and the constants it was made with. An output with another key
is stale: it is named, with the constants that differ, and never used; one with another checksum is not what was
stamped.
"""
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from cycles import arms, schemas
from cycles.choices import check_choices
from cycles.classifier import MLP, Entries, TextClassifier, load_trained, make_batch, trained_state
from cycles.tasks import load_task, own_data
from lib.blocks import require_positions
from lib.distributed import own_part, rank, wait_for_all, world_size
from lib.environment import InputError, choose_device
from lib.files import (
    fingerprint,
    read_json,
    read_sealed,
    read_torch,
    remove_leftovers,
    safe_name,
    sha256,
    write_json,
    write_sealed,
)
from lib.hooks import blocks
from lib.models import choose_dtype, load_model, load_tokenizer, local_path, weights_of
from lib.outputs import is_current
from lib.sae import SAE, load_sae
from lib.store import experiment_dir, provenance
from lib.texts import filler_id

# Constants that choose what is run or where, not what any one result is.
RUN_ONLY = {"PRESET", "SETTING", "SEED", "SEEDS", "ARM", "ARMS", "CYCLE", "CYCLES", "DEVICE", "FSDP", "TRACKER",
            "N_SAE_SEEDS"}
SAE_ONLY = {"N_LATENTS_MULTIPLIER", "TOP_K", "SAE_EPOCHS", "SAE_BATCH_SIZE", "SAE_LR", "SAE_POSITIONS"}
AUX_ONLY = {"ARM_CONSTANTS", *arms.CONSTANTS}
EVAL_ONLY = {"EVAL_LIMIT", "PROBE_LIMIT", "SILHOUETTE_ROWS", "ROBUST_LIMIT", "ROBUST_EPS", "ABSORPTION_TOKENS",
             "METRICS"}
PLACES = ("MODEL", "DATASET", "VAL_DATASET", "TEST_DATASET")  # constants that may be a file or directory
ENTRY_SHARD_TEXTS = 2048
Constants = dict[str, Any]


def stage_constants(c: Constants, stage: str, arm: str) -> Constants:
    """The constants that decide the output of a stage: "model" (cycle 0), "sae", "aux" (later models) or "eval".

    Groups are by exclusion, so that a constant nobody thought of makes results stale rather than wrong.
    """
    groups = {"sae": SAE_ONLY, "aux": AUX_ONLY, "eval": EVAL_ONLY}
    if stage == "model":
        return {k: v for k, v in c.items() if k not in RUN_ONLY | SAE_ONLY | AUX_ONLY | EVAL_ONLY}
    own = c | c.get("ARM_CONSTANTS", {}).get(arm, {}) if stage == "aux" else c
    return {k: own[k] for k in sorted(groups[stage] - {"ARM_CONSTANTS"}) if k in own}


class Session:
    """Data, model and cached states of one seed: what every step of every arm shares."""

    def __init__(self, c: Constants, seed: int):
        """Raises InputError for data or models that can't be reached, and for constants that do not fit together."""
        check_choices(c)
        c = own_data(c)
        self.c, self.seed = c, seed
        self.device = choose_device(c["DEVICE"])
        self.root = setting_root(c)
        remove_leftovers(self.root)
        self.is_text = c["MODEL"] != "mlp"
        self.entries: Entries | None = None
        self.model: Any  # MLP or TextClassifier
        if self.is_text:
            self.tokenizer = load_tokenizer(c["MODEL"])
            self.task = load_task(c, seed, self.tokenizer)
            fsdp = c.get("FSDP", False) and world_size() > 1
            if fsdp and c["CACHE_ENTRIES"] and not c["TRAIN_BELOW"]:
                raise InputError("with FSDP no rank holds the frozen blocks to fill a cache with; set "
                                 "CACHE_ENTRIES=False")
            # each part goes to its device when it is sharded
            lm: Any = load_base(c, torch.device("cpu") if fsdp else self.device)
            require_positions(lm, c["MAX_LENGTH"])
            if lm.config.pad_token_id is None:
                lm.config.pad_token_id = filler_id(self.tokenizer)
            self.model = TextClassifier(lm, self.task.n_classes, c["TARGET_LAYER"], seed, c["TRAIN_BELOW"])
            if c["GRADIENT_CHECKPOINTING"]:
                # The reentrant kind would cut the graph of what the hooks capture.
                lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.task = load_task(c, seed)
            self.model = MLP(self.task.n_pixels, self.task.n_classes, c["TARGET_LAYER"], seed).to(self.device)
        self.initial = trained_state(self.model)
        self.task_key = self.task.identity()
        self.model_key = weights_of(self.model)
        if self.is_text and c["CACHE_ENTRIES"] and not c["TRAIN_BELOW"]:
            self.entries = cached_entries(self)
        if self.is_text and fsdp:
            self.model.shard()

    def folder(self, arm: str, cycle: int) -> Path:
        """Where the outputs of this arm and cycle lie: cycle 0 is the baseline's."""
        return self.root / ("baseline" if cycle == 0 else safe_arm(arm)) / f"seed_{self.seed}"

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
        """Whether `path` is there, made of what `key` tells. Raises InputError if it was made of something else."""
        return finished(path, key, self.c, self.task_key, self.model_key)

    def load(self, arm: str, cycle: int) -> None:
        """Put the finished model of this arm and cycle into self.model."""
        path = self.folder(arm, cycle) / "checkpoints" / f"model_cycle_{cycle}_best.pt"
        step = "01_train_baseline.py" if cycle == 0 else "03_train_auxiliary.py"
        if not self.finished(path, self.key("model", arm, cycle)):
            raise InputError(f"{path} is missing; run {step} first")
        load_trained(self.model, read_torch(path, f"run {step} first", dict))
        self.model.eval()

    def sae(self, arm: str, cycle: int, sae_seed: int = 0) -> SAE:
        """The finished SAE of this arm and cycle."""
        path = sae_path(self.folder(arm, cycle), cycle, sae_seed)
        if not self.finished(path, self.key("sae", arm, cycle, sae_seed)):
            raise InputError(f"{path} is missing; run 02_train_sae.py CYCLE={cycle} first")
        return load_sae(path, self.device)


def load_base(c: Constants, device: torch.device) -> Any:
    """The language model of the constants; with LOAD_BITS its frozen blocks are quantised, what is trained can't be.

    Raises InputError if it can't be reached, or the packages that these need are not installed.
    """
    if c["DEVICE_MAP"] == "disk":
        raise InputError("DEVICE_MAP=disk is for saving activations: blocks that are trained can't stay on the disk; "
                         "use auto, or FSDP under torchrun")
    dtype = choose_dtype(c["MODEL_DTYPE"], device)
    trained: tuple[str, ...] = ()
    if c["LOAD_BITS"]:
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(local_path(c["MODEL"]) or c["MODEL"],
                                                             trust_remote_code=False)
            empty = transformers.AutoModelForCausalLM.from_config(config)
            skeleton = TextClassifier(empty, 2, c["TARGET_LAYER"], 0, c["TRAIN_BELOW"])
        path, stack = blocks(empty)
        trained = tuple(f"{path}.{i}" for i in range(skeleton.first_trained, len(stack)))
    return load_model(c["MODEL"], device, dtype, bits=c["LOAD_BITS"], device_map=c["DEVICE_MAP"], whole_modules=trained)


def setting_root(c: Constants) -> Path:
    """The folder of a setting's outputs. Raises InputError for a name that would leave the store."""
    return experiment_dir("sae_ception") / safe_name(c["SETTING"] or c["PRESET"])


def safe_arm(arm: str) -> str:
    """An arm as the name of its folder: a way of making targets, or way@label. Raises InputError for any other path."""
    safe_name(arm.replace("@", "_"))
    return arm


def inherited(c: Constants, seed: int, arm: str) -> Constants:
    """The constants of the steps before this one, as the setting's folders record them: the baseline's, then the arm's.

    Raises InputError if step 1 was not run.
    """
    root = setting_root(c)
    baseline = root / "baseline" / f"seed_{seed}" / "constants.json"
    if not baseline.exists():
        command = f"01_train_baseline.py PRESET={c['PRESET']} SEED={seed}"
        raise InputError(f"{baseline.parent} holds no baseline; run {command} first")
    own = root / safe_arm(arm) / f"seed_{seed}" / "constants.json"
    found = read_json(baseline, schemas.SETTING) | (read_json(own, schemas.SETTING) if own.exists() else {})
    for name, then in read_json(baseline.with_name("meta.json"), schemas.ORIGIN)["paths"].items():
        if local_path(found[name]) is None:  # it would be asked from the hub
            raise InputError(f"{name}={found[name]} was {then} when step 1 ran; put it back there, or start this step "
                             "where step 1 was started")
    return found


def sae_path(folder: Path, cycle: int, sae_seed: int = 0) -> Path:
    """checkpoints/sae_cycle_<n>_best.pt; further SAE seeds carry their number."""
    return folder / "checkpoints" / f"sae_cycle_{cycle}{f'_seed{sae_seed}' if sae_seed else ''}_best.pt"


def stamp_path(path: Path) -> Path:
    """Where the stamp of an output lies."""
    return path.with_name(f"{path.stem}.stamp.json")


def finished(path: Path, key: str, c: Constants, data: str = "", model: str = "") -> bool:
    """Whether `path` is there with the wanted key. Raises InputError if it was made with other constants or inputs.

    data, model: Session.task_key and .model_key, to say which of them has changed.
    """
    stamp = stamp_path(path)
    if not path.exists() or not stamp.exists():
        return False
    found = read_json(stamp, schemas.STAMP)
    if found["file"] != sha256(path):
        raise InputError(f"{path} is not the file that its stamp was made for; delete both and run its step again")
    if found["key"] == key:
        return True
    stored = found["constants"]
    constants = {k: v for k, v in c.items() if k in stored and k not in RUN_ONLY}
    return is_current(
        path,
        {**stored, "data or tokenizer": found["data"], "weights of MODEL": found["model"],
         "output of an earlier step": found["key"]},
        {**constants, "data or tokenizer": data, "weights of MODEL": model, "output of an earlier step": key},
        f"set SETTING to a new name, or delete {arm_folder(path)}",
    )


def arm_folder(path: Path) -> Path:
    """The arm's folder of an output."""
    return next(parent for parent in path.parents if parent.name.startswith("seed_")).parent


def fingerprintable(c: Constants) -> Constants:
    """Constants as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(c))


def write_stamp(session: Session, path: Path, key: str) -> None:
    """The stamp beside an output, and the folder's constants.json and meta.json."""
    folder = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    constants = fingerprintable(session.c)
    write_json(folder / "constants.json", constants, sealed=True)
    made_from = {"data": session.task_key, "model": session.model_key}
    paths = {name: str(local) for name in PLACES
             if (value := constants.get(name)) not in (None, "mlp", "digits") and (local := local_path(value))}
    meta = {"constants_hash": fingerprint(constants), "seed": session.seed, "paths": paths, **made_from}
    write_json(folder / "meta.json", meta | provenance(), sealed=True)
    write_json(stamp_path(path), {"key": key, "file": sha256(path), **made_from, "constants": constants}, sealed=True)


def cached_entries(session: Session) -> Entries:
    """What enters the first trained block for every example, computed once per data set and base model."""
    task, model = session.task, session.model
    key = fingerprint([session.c["MODEL"], weights_of(model.lm), [t.ids for t in task.tokens], model.first_trained,
                       session.c["MODEL_DTYPE"]])
    folder = session.root / "cache" / key
    lengths = [len(item.ids) for item in task.tokens]
    shards = [range(i, min(i + ENTRY_SHARD_TEXTS, len(lengths))) for i in range(0, len(lengths), ENTRY_SHARD_TEXTS)]
    model.eval()
    done = (folder / f"{len(shards) - 1}.safetensors").exists()
    own = list(enumerate(shards))[own_part(len(shards))]
    for number, ids in tqdm(own, desc="states below the trained layers", leave=False, disable=done or rank() > 0):
        path = folder / f"{number}.safetensors"
        if not path.exists():
            by_length = torch.tensor(sorted(ids, key=lambda i: (lengths[i], i)))
            states: dict[int, Tensor] = {}
            for part in by_length.split(session.c["BATCH_SIZE"]):
                found = model.token_states(make_batch(task, part, session.device), model.entry)
                states |= {i: state.cpu() for i, state in zip(part.tolist(), found)}
            write_sealed(path, {"x": torch.cat([states[i] for i in ids])})
    wait_for_all()
    places = []
    for number, ids in enumerate(shards):
        start = 0
        for i in ids:
            places.append((number, start, start + lengths[i]))
            start += lengths[i]
    sizes = [sum(lengths[i] for i in ids) for ids in shards]
    return Entries([read_sealed(folder / f"{i}.safetensors", {"x": "float N D"}, N=size)["x"]
                    for i, size in enumerate(sizes)], places)
