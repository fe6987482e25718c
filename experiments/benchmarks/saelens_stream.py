"""SAELens' own BatchTopK and Matryoshka on rows that another process hands over; 06 runs it with the peers' Python.

    python saelens_stream.py batchtopk ROWS '{"n_latents": 4096, "width": 768, "k": 25, "batch": 1024, "lr": 3e-4,
                                              "autocast": true, "seed": 0, "threads": 2, "resume": null}'

ROWS: a file of batch x width float32, written anew before each step. Orders come on standard input, one line of JSON
each:
    {"step": true}        one step on the rows; answers {"cpu_seconds": 0.1}
    {"save": "folder"}    writes there what `resume` takes, and weights.safetensors: W_enc, W_dec [F, D], b_enc [F],
                          mean [D], threshold [F], with unit rows of W_dec, as in lib/sae.py

Settings are those of the benchmark's own sweeps (decoderesearch/synth-sae-bench-experiments): raw rows, a constant
rate, Adam (.9, .999), and for Matryoshka inner widths of 128, 512 and 2,048 with an auxiliary loss at each level.
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAEConfig, LoggingConfig, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

SAMPLES = 200_000_000  # of the protocol; at a constant rate it decides nothing


def trainer_of(kind, s):
    """SAELens' trainer as its synthetic runner would make it, for rows that come from elsewhere.

    kind: batchtopk, or matryoshka with groups of 128, 512, 2048 and all latents. s: width, n_latents, k, batch, lr,
    autocast and seed.
    """
    sizes = {"d_in": s["width"], "d_sae": s["n_latents"], "k": s["k"], "device": "cpu"}
    if kind == "batchtopk":
        config = BatchTopKTrainingSAEConfig(**sizes)
    else:
        widths = [width for width in (128, 512, 2048) if width < s["n_latents"]]
        config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=widths, use_matryoshka_aux_loss=True)
    runner = SyntheticSAERunnerConfig(
        synthetic_model="none", sae=config, lr=s["lr"], training_samples=SAMPLES, batch_size=s["batch"], device="cpu",
        autocast_sae=s["autocast"], logger=LoggingConfig(log_to_wandb=False))
    torch.manual_seed(s["seed"])
    sae = get_sae_training_class(config.architecture())[0](config)
    return SAETrainer(cfg=runner.to_sae_trainer_config(), sae=sae, data_provider=iter(()))


def save(trainer, folder):
    """Write what resumes the trainer, and weights.safetensors: its SAE with unit dictionary rows, and b_dec as mean."""
    folder.mkdir(parents=True)
    trainer.save_trainer_state(folder)
    torch.save(trainer.sae.state_dict(), folder / "sae.pt")
    sae = trainer.sae
    norm = sae.W_dec.norm(dim=1)
    weights = {"W_enc": (sae.W_enc * norm).T, "b_enc": sae.b_enc * norm, "W_dec": sae.W_dec / norm[:, None],
               "mean": sae.b_dec, "threshold": torch.full_like(sae.b_enc, float(sae.topk_threshold))}
    save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / "weights.safetensors")


def main():
    kind, path, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever gives the orders decides when it ends
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    torch.set_num_threads(settings["threads"])
    shape = settings["batch"], settings["width"]
    rows = torch.from_file(path, shared=True, size=shape[0] * shape[1]).view(shape)
    trainer = trainer_of(kind, settings)
    if settings["resume"]:
        folder = Path(settings["resume"])
        trainer.sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
        trainer.load_trainer_state(folder)
    for line in sys.stdin:
        order, used = json.loads(line), time.process_time()
        if "step" in order:  # as in SAETrainer.fit
            trainer.maybe_reset_sparsity()
            trainer.step(rows.clone())
            trainer.n_training_steps += 1
        if "save" in order:
            save(trainer, Path(order["save"]))
        print(json.dumps({"cpu_seconds": time.process_time() - used}), file=answers, flush=True)


if __name__ == "__main__":
    main()
