"""What each file of this experiment must hold when it is read back; the words are those of lib/schemas.py."""
from lib.schemas import CONSTANTS, COUNT, NUMBERS, POSITIVE, SHA256, SHORT_HASH, Schema, Text

STAMP = Schema({"key": SHORT_HASH, "file": SHA256, "data": SHORT_HASH, "model": SHORT_HASH, "constants": CONSTANTS},
               sealed=True)
ORIGIN = Schema({"paths": {Text("[A-Z_]+"): str}}, sealed=True)
SETTING = Schema(CONSTANTS, sealed=True)
CYCLE_HISTORY = Schema({"key": SHORT_HASH, "epochs": [NUMBERS], "best_epoch": POSITIVE, "aux?": NUMBERS}, sealed=True)
SUMMARY = Schema({"n_seeds": POSITIVE, "cells": [{"arm": str, "cycle": COUNT, "metric": str, "mean?": float,
                                                  "low?": float, "high?": float}]}, sealed=True)
TUNING = {
    "key": SHORT_HASH, "settings": {}, "state": {}, "optimizer": {"state": {}, "param_groups": list},
    "progress": {"epochs": [NUMBERS], "best_epoch": COUNT, "best": {}, "start": {}, "sums": [float, float],
                 "partial?": {"step": POSITIVE}},
}
PARTIAL = {"losses": "any_float N P", "generator": "uint8 G", "generator_cuda?": "uint8 C"}
SHARED_TUNING = Schema({
    "key": SHORT_HASH, "settings": {}, "place": Text(r"epoch_\d{1,9}"), "steps": {Text(".+"): POSITIVE},
    "progress": {"epochs": [NUMBERS], "best_epoch": COUNT, "best": {}, "start": {}, "sums": [float, float]},
}, sealed=True, remedy="delete its folder and train again")
TARGETS = {"example_id": "int64 N", "t": "float32 N D", "centre?": "float32 D"}
STUDY = Schema({"study": str, "registration": (str, None), "revision": str, "constants": CONSTANTS, "seeds": [int]},
               sealed=True)
STUDIED = Schema({
    "arm": str, "seed": int, "key": SHORT_HASH, "aux": NUMBERS,
    "saes": [{"sae_seed": COUNT, "val": NUMBERS, "test": NUMBERS}],
}, sealed=True)
SCORES = Schema({"study": str, "registration": (str, None), "seeds": [int], "finished": COUNT, "total": COUNT},
                remedy="RESULTS is a scores.csv of 08_judge_study.py")
RESULTS = Schema({
    "meta": {"arm": str, "cycle": COUNT, "seed": int, "key": SHORT_HASH}, "val": NUMBERS, "test": NUMBERS,
    "other_sae_seeds?": [{"sae_seed": POSITIVE, "val": NUMBERS, "test": NUMBERS}],
}, sealed=True)
