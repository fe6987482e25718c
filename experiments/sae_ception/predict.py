"""Classify new texts, or rows of numbers, with a trained classifier: class names, probabilities, the latents that fire.

    python predict.py SETTING=reviews TEXT="what a dull film"
    python predict.py SETTING=reviews DATA=new.csv TEXT_FIELD=review
    python predict.py SETTING=my_model DATA=rows.csv         # a module of one's own: a column for each input

Reads  store/sae_ception/<setting>/<arm>/seed_<s>/checkpoints/{model,sae}_cycle_<n>_best.pt
Writes store/sae_ception/<setting>/predictions.csv
"""
import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, Location, Name, NotNegative, Seed
from presets import Arm

PRESET = "tiny"                           # as in step 4
SETTING: FileName | None = None           # as step 4 printed it; None: PRESET
ARM: Arm = "per_class"                    # whose model
CYCLE: NotNegative = 1                    # 0: the baseline
SEED: Seed = 0
TEXT: Name | None = None                  # one text
DATA: Location | None = None              # or a file of texts, or .csv of numbers for what reads no texts
TEXT_FIELD: Name | None = None            # DATA's column of texts; None: as in training
SHOW_LATENTS: NotNegative = 5             # strongest latents of each row; 0: none
DEVICE: Device = "auto"                   # auto, cpu, cuda, mps
CONSTANTS = override(globals())

from cycles.prediction import numbers, predictions, texts
from cycles.session import trained_session
from lib.environment import InputError, log, log_to, run
from lib.files import write_text

SHOWN = 10  # rows printed


def main():
    if (TEXT is None) == (DATA is None):
        raise InputError("set TEXT to a text, or DATA to a file")
    session = trained_session(CONSTANTS)
    log_to(session.root / "predict.log")
    if session.is_text:
        rows = texts(session, TEXT, DATA, TEXT_FIELD)
    elif DATA is None:
        raise InputError("this classifier reads numbers, not texts; set DATA to a .csv file of them")
    else:
        rows = numbers(session, DATA)
    sae = session.sae(ARM, CYCLE) if SHOW_LATENTS and session.sae_path(ARM, CYCLE).exists() else None
    frame = predictions(session, rows, sae, SHOW_LATENTS)
    write_text(session.root / "predictions.csv", frame.to_csv(index=False))
    print(frame.head(SHOWN).to_string(index=False, max_colwidth=60, float_format="{:.3f}".format))
    log.info("%s rows: %s", f"{len(frame):,}", session.root / "predictions.csv")


if __name__ == "__main__":
    run(main)
