"""Training steps of ours and of each peer behind one interface; 02 and 03 run one process per trainer.

    python trainers.py NAME ROWS.safetensors '{"n_latents": 1152, "k": 8, "batch": 1024, "lr": 1e-3, "n_steps": 800,
                                               "seed": 0, "threads": 2, "dead_after": 10000,
                                               "kind": "topk", "device": "cpu"}'

Orders come on standard input, one line of JSON each:
    {"steps": 5}                      trains on the next 5 batches and answers {"seconds": 0.1, "cpu_seconds": 0.2}
    {"save": "weights.safetensors"}   writes W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D], for every trainer, of
                                      codes = TopK(ReLU((x - b_dec) W_enc^T + b_enc)), x_hat = codes W_dec + b_dec;
                                      of the other kinds without their thresholds

The peers run their own code as installed. Rows are centred and have a mean squared norm of 1, as every trainer does
itself or expects. dictionary_learning and SAELens also have batchtopk and jumprelu, ours all kinds. Ours takes "lr" and
"dead_after" from its rules where they are null. On a GPU the peers run in the mixed precision that each offers: it is
sparsify's own choice, and an option of dictionary_learning and SAELens.
"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if sys.argv[1:2] == ["ours"]:
    import lib  # noqa: F401  (before torch: it decides how idle threads wait)
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# A trainer takes the rows x [N, D] and the settings s, and returns step(i, rows) and weights().


def ours(x, s):
    """The fast step with the constants of lib.training, on whitened rows; x is overwritten with them."""
    from lib.training.fast_step import fast_step
    from lib.training.settings import aux_after, learning_rate, schedule
    from lib.training.step import folded_weights, init_state, whitening
    from lib.training.workspace import Workspace

    transform = whitening(x.T @ x / len(x))
    x[:] = x @ transform  # once, as lib.batches reads a run that fits into memory
    state = init_state(transform, s["n_latents"], s["seed"], kind=s["kind"])
    rate = s["lr"] or learning_rate(s["n_latents"], s["n_steps"] * s["batch"])
    dead_after = s["dead_after"] or aux_after(s["n_latents"], s["k"], s["batch"])
    work = Workspace(state, kind=s["kind"])
    print(work.choice, file=sys.stderr)

    def step(i, rows):
        lr = rate * schedule(i, s["n_steps"])
        fast_step(state, rows, k=s["k"], lr=lr, dead_after=dead_after, work=work)

    def weights():
        found = folded_weights(state, 1.0)
        return found["W_enc"], found["b_enc"], found["W_dec"], torch.zeros(x.shape[1])

    return step, weights


def overcomplete(x, s):
    """Its train_sae with Adam and squared error, otherwise at its defaults: no AuxK, gradients clipped at 1."""
    import lib.environment  # noqa: F401, I001  (first: it keeps the vision half of overcomplete out)
    from overcomplete.sae import TopKSAE, train_sae

    torch.manual_seed(s["seed"])
    sae = TopKSAE(x.shape[1], nb_concepts=s["n_latents"], top_k=s["k"], device=s["device"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=s["lr"])

    def error(x, x_hat, pre_codes, codes, dictionary):
        return (x - x_hat).square().mean()

    def step(i, rows):
        train_sae(sae, [rows], error, optimizer, nb_epochs=1, monitoring=1, device=s["device"])

    def weights():
        linear = sae.encoder.final_block[0]
        return linear.weight, linear.bias, sae.train().get_dictionary(), torch.zeros(x.shape[1])

    return step, weights


def dictionary_learning(x, s):
    """Its trainers at their defaults, but for warm-up and decay; JumpReLU's penalty aims at the same L0."""
    from dictionary_learning.trainers import batch_top_k, jumprelu, top_k

    aims = {"topk": (top_k.TopKTrainer, {"k": s["k"]}), "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": s["k"]}),
            "jumprelu": (jumprelu.JumpReluTrainer, {"target_l0": float(s["k"]), "sparsity_warmup_steps": None})}
    trainer_of, aim = aims[s["kind"]]
    trainer = trainer_of(
        steps=s["n_steps"], activation_dim=x.shape[1], dict_size=s["n_latents"], layer=0, lm_name="none", lr=s["lr"],
        warmup_steps=max(1, s["n_steps"] // 20), decay_start=int(0.8 * s["n_steps"]), seed=s["seed"],
        device=s["device"], **aim)
    trainer.dead_feature_threshold = s["dead_after"]
    ae = trainer.ae

    def step(i, rows):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            trainer.update(i, rows)

    def weights():
        if s["kind"] == "jumprelu":
            return ae.W_enc.T, ae.b_enc, ae.W_dec, ae.b_dec
        return ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec

    return step, weights


def sparsify(x, s):
    """Its SparseCoder with its Trainer's steps: the Trainer itself needs a language model."""
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(s["seed"])
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=s["n_latents"], k=s["k"]), s["device"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=s["lr"])
    scheduler = get_linear_schedule_with_warmup(optimizer, s["n_steps"] // 20, s["n_steps"])
    silent = torch.zeros(s["n_latents"], dtype=torch.long, device=x.device)

    def step(i, rows):
        if i == 0:
            sae.b_dec.data = rows.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(rows, dead_mask=silent > s["dead_after"])
        (out.fvu + out.auxk_loss / 32).backward()
        silent.add_(len(rows))
        silent[out.latent_indices.flatten()] = 0
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def weights():
        sae.set_decoder_norm_to_unit_norm()
        return sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec

    return step, weights


def sae_lens(x, s):
    """Its SAETrainer.step; it expects rows of mean squared norm D."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, topk_sae
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(s["seed"])
    grow = x.shape[1] ** 0.5
    size = {"d_in": x.shape[1], "d_sae": s["n_latents"], "device": s["device"]}
    if s["kind"] == "topk":
        sae = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(**size, k=s["k"]))
    elif s["kind"] == "batchtopk":
        sae = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**size, k=s["k"]))
    else:
        sae = jumprelu_sae.JumpReLUTrainingSAE(jumprelu_sae.JumpReLUTrainingSAEConfig(
            **size, jumprelu_sparsity_loss_mode="quadratic", target_l0=s["k"]))
    config = SAETrainerConfig(
        total_training_samples=s["n_steps"] * s["batch"], train_batch_size_samples=s["batch"], lr=s["lr"],
        lr_end=s["lr"] / 10, lr_warm_up_steps=s["n_steps"] // 20, lr_decay_steps=s["n_steps"] // 5,
        dead_feature_window=max(1, s["dead_after"] // s["batch"]), device=s["device"], autocast=x.is_cuda)
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(i, rows):
        trainer.step(rows * grow)
        trainer.n_training_steps += 1

    def weights():
        norm = sae.W_dec.norm(dim=1)
        return (sae.W_enc * norm).T, sae.b_enc * norm / grow, sae.W_dec / norm[:, None], sae.b_dec / grow

    return step, weights


TRAINERS = {f.__name__: f for f in (ours, overcomplete, dictionary_learning, sparsify, sae_lens)}


def finish(x):
    """Wait until the device has done what was asked of it."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def main():
    name, path, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    torch.set_num_threads(settings["threads"])
    settings = {"device": "cpu", **settings}
    x, batch = load_file(path, settings["device"])["x"], settings["batch"]
    step, weights = TRAINERS[name](x, settings)
    torch.set_num_threads(settings["threads"])
    done = 0
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict = {}
        if "steps" in order:
            start, used = time.perf_counter(), time.process_time()
            for i in range(done, done + order["steps"]):
                first = i * batch % (len(x) - batch + 1)
                step(i, x[first : first + batch])
            finish(x)
            done += order["steps"]
            answer |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
        if "save" in order:
            names = ("W_enc", "b_enc", "W_dec", "b_dec")
            save_file({n: w.detach().cpu().float().contiguous() for n, w in zip(names, weights())}, order["save"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
