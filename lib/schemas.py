"""What each file of a store must hold when it is read back; the words are those of lib/checking.py."""
from typing import Any

from .checking import Columns, Number, Schema, Text
from .sae_kinds import KINDS

COUNT, POSITIVE = Number(int, 0), Number(int, 1)
NAME = Text(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# Relative, and no part begins with a dot: it can't leave the folder.
PATH = Text(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
SHORT_HASH, SHA256 = Text("[0-9a-f]{16}"), Text("[0-9a-f]{64}")
CONSTANTS = {Text("[A-Z][A-Z0-9_]*"): Any}
NUMBERS = {Text(".+"): float}

FILES = [{"file": PATH, "bytes": COUNT, "sha256": SHA256}]
SHARDS = [{"file": PATH, "rows": POSITIVE}]
RUN_AGAIN = "delete the run's folder and run 01_save_activations.py again"

# A run of activations.
MANIFEST = Schema({"rows": SHARDS, "hooks": {NAME: SHARDS}, "n_rows": POSITIVE, "files": FILES}, sealed=True,
                  remedy=RUN_AGAIN)
SETTINGS = {
    "max_length": POSITIVE, "batch_tokens": POSITIVE, "store_dtype": ("float32", "bfloat16", "float16"),
    "shard_rows": POSITIVE,
    "skip_special": bool, "skip_first": COUNT, "max_norm_multiple": (float, None),
}
META = Schema({
    "schema_version": int, "settings": SETTINGS, "n_texts": POSITIVE,
    "hooks": [{"path": str, "point": ("input", "output"), "signature": NAME, "names?": [str]}],
    "model?": {"name": str, "path?": (str, None), "class?": str, "dtype?": str, "weights?": SHORT_HASH},
    "tokenizer?": (str, {"class": str, "fingerprint": SHORT_HASH}),
    "dataset?": {"name": str, "path?": (str, None), "limit?": (POSITIVE, None)}, "constants?": CONSTANTS,
}, remedy=RUN_AGAIN)
RUN_TEXT = {"text_id": COUNT, "text": str, "split": ("train", "val")}
POSITIVE_NUMBER = Number(float, 1e-30)
STATS = Schema(
    {"scale": POSITIVE_NUMBER, "median_norm": float, "max_abs": float, "gamma": Number(float, 0), "n_outliers": COUNT,
     "n_rows": POSITIVE}, remedy=RUN_AGAIN
)
SHARD_NOTE = [COUNT, COUNT]  # block of texts that its first row is in, rows before that block

# An SAE and its training.
SAE_CONFIG = {
    "n_inputs": POSITIVE, "n_latents": POSITIVE, "top_k": POSITIVE, "hook?": str, "run_id?": NAME, "data_digest?": str,
    "constants?": CONSTANTS,
    "final?": NUMBERS, "tokens_trained?": (POSITIVE, None), "provenance?": {"git": (str, None)},
    "imported?": {"format": str, "source": str},
}
SAE_STATE = {"W_enc": "float32 F D", "b_enc": "float32 F", "W_dec": "float32 F D", "mean": "float32 D",
             "scale": "float32", "threshold?": "float32 F"}
SAE_PROBE = {"x": "float32 N D", "values": "float32 N K", "indices": "int64 N K"}
SAE_SIDECAR = Schema(SAE_CONFIG | {"schema_version": 1, "sae_hash": SHORT_HASH}, sealed=True,
                     remedy="run 02_train_sae.py again")
VALIDATION = Columns("step", "tokens", "recon_mse", "ev", "l0", "dead_pct")
CURVES = {
    "lr": float, "dead_after": COUNT, "n_steps": POSITIVE, "val": VALIDATION, "train_sample": VALIDATION,
    "train": Columns("step", "tokens", "loss", "recon", "auxk", "l0", "dead_pct", "lr", "grad_norm"),
    "epochs": Columns("loss", "recon_mse", "l1", "r2", "l0", "dead_features_pct"),
}
HISTORY = Schema(CURVES | {
    "schema_version": 1, "run_id": NAME, "sae_hash?": SHORT_HASH, "constants": CONSTANTS,
    "settings": {"top_k": POSITIVE, "epochs": POSITIVE},
    "units": {Text(".+"): str}, "best_epoch": POSITIVE, "final": NUMBERS,
}, sealed=True, remedy="delete it and run 02_train_sae.py again")
CHECKPOINT = {"key": SHORT_HASH, "settings": {"n_latents": POSITIVE}, "precision": ("float32", "bfloat16"),
              "history": CURVES, "state": {}, "best": {}}
TRAINING = {"aligned": bool, "kind": tuple(KINDS)}
STATE = {
    "transform": "float32 D D", "dec": "float32 F D", "enc": "float32 F D", "bias": "float32 F", "gain": "float32 F",
    "log_threshold": "float32 F",
    "silent": "int64 F", "step": "int64", "sums": "sums S",
}
BEST = {"ev": float, "epoch": POSITIVE}
BEST_WEIGHTS = {"W_enc": "float32 F D", "b_enc": "float32 F", "W_dec": "float32 F D", "threshold?": "float32 F"}
