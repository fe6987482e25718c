"""What holds on a GPU. Every test also runs on the CPU, so that its own code works before it meets one.

    python tests/test_gpu.py <folder> <device>     # what the test of several processes starts
"""
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
import torch
import torch.distributed as dist
from conftest import CUDA, PROJECT, TEXTS, tiny_model, word_tokenizer
from forked import ROOMS
from test_fast_step import activations, assert_close, pair_of_states
from test_sae_ception_gates import text_model, text_task
from test_training import SMALL, make_rows

import lib.training.checkpoints as checkpoints
from cycles.auxiliary import Targets
from cycles.fine_tuning import TuneSettings, fine_tune
from cycles.modules import trained_state
from cycles.sharding import gathered
from lib.activations import SaveSettings, block_rows, save_activations
from lib.distributed import add_up, own_part, ranks, world_size
from lib.hooks import resolve
from lib.models import load_model
from lib.sae import load_sae, save_sae
from lib.texts import split_texts
from lib.training.fast_step import fast_step
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, train_sae
from lib.training.step import dense_step, init_state
from lib.training.workspace import Workspace

DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
SETTINGS = SaveSettings(shard_rows=50)


def moved(state, device):
    """A state of lib.training.step on the device; `step` stays on the CPU, as in training."""
    return {name: value.clone() if name == "step" else value.to(device, copy=True) for name, value in state.items()}


@contextmanager
def waits(device):
    """A list of the places that wait for the device inside the block; on a CPU it stays empty."""
    found = []
    if device == "cpu":
        yield found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield found
        found += [f"{each.filename}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_dense_reference_on_the_cpu(device, kind):
    x = activations()
    here, there = pair_of_states(x, kind=kind)
    there = moved(there, device)
    work, generator, dead = Workspace(there, "float32", kind=kind), torch.Generator().manual_seed(1), 0
    for _ in range(20):
        rows = x[torch.randint(0, len(x), (31,), generator=generator)] @ here["transform"]
        dense_step(here, rows, k=5, lr=1e-3, dead_after=60, kind=kind)
        fast_step(there, rows.to(device), k=5, lr=1e-3, dead_after=60, work=work)
        dead += int((here["silent"] > 60).sum())
    assert dead > 20, "AuxK had nothing to do"
    back = {name: value.cpu() for name, value in there.items() if name != "sums"}
    assert_close({name: here[name] for name in back}, back, atol=1e-4)


@DEVICES
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "jumprelu"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_device(device, kind, precision):
    """But for the first, which sets thresholds; jumprelu's number of codes only the device knows."""
    state = init_state(torch.eye(64, device=device), 512, 0, kind=kind)
    work, x = Workspace(state, precision, kind=kind), torch.randn(256, 64, device=device)

    def step():
        fast_step(state, x, k=8, lr=1e-3, dead_after=1000, work=work)

    step()
    with waits(device) as found:
        step()
        step()
    assert found == []


@DEVICES
def test_a_step_of_topk_never_holds_rows_times_latents(device):
    """float32 scores of all rows would be 512 MB; a tile and the state are less than 200."""
    if device == "cpu":
        pytest.skip("a CPU does not tell how much its tensors hold")
    state = init_state(torch.eye(32, device=device), 16_384, 0)
    work, x = Workspace(state, "float32"), torch.randn(8192, 32, device=device)
    work.tile_bytes = 32 << 20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fast_step(state, x, k=8, lr=1e-3, dead_after=1000, work=work)
    assert torch.cuda.max_memory_allocated() - before < 256 << 20


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_sae_reloads_and_codes_as_on_the_cpu(device, kind, tmp_path):
    rows, _ = make_rows(600)
    settings = TrainSettings(**{**SMALL, "epochs": 2}, kind=kind, dead_after=100)
    found = [train_sae(rows, settings, device=where, progress=False) for where in ("cpu", device)]
    (_, here), (sae, there) = found
    assert there["val"]["ev"] == pytest.approx(here["val"]["ev"], abs=0.02)
    assert there["train"]["recon"] == pytest.approx(here["train"]["recon"], rel=0.05)
    save_sae(sae, tmp_path / "topk_sae.pt", rows.shards[0])
    again = load_sae(tmp_path / "topk_sae.pt", device)
    x = rows.shards[0][:200]
    on_cpu, on_device = (each.decode(*each.encode(x.to(each.mean))).cpu() for each in (again.to("cpu"), again))
    torch.testing.assert_close(on_device, on_cpu, rtol=1e-3, atol=1e-3)


@DEVICES
def test_an_interrupted_training_goes_on(device, tmp_path, monkeypatch):
    """On a CPU to the same bytes. On a GPU the checkpoint has the same bytes; what follows agrees to rounding, because
    sums by latent add up in any order there.
    """
    rows, _ = make_rows()
    settings = TrainSettings(**SMALL, dead_after=500)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SHARE", float("inf"))
    whole, whole_history = train_sae(rows, settings, tmp_path / "whole", device, progress=False)
    real, kept = checkpoints.save_checkpoint, []

    def stop(path, progress):
        kept.append({name: value.cpu().clone() for name, value in progress["state"].items()})
        real(path, progress)
        if len(kept) == 20:
            raise KeyboardInterrupt
        return 0.0

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoints, "save_checkpoint", stop)
        train_sae(rows, settings, tmp_path / "killed", device, progress=False)
    found = checkpoints.read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.pt")["state"]
    assert all(torch.equal(found[name], value) for name, value in kept[-1].items())
    again, history = train_sae(rows, settings, tmp_path / "killed", device, progress=False)
    if device == "cpu":
        assert torch.equal(again.W_dec, whole.W_dec) and history == whole_history
    else:
        assert history["val"]["ev"] == pytest.approx(whole_history["val"]["ev"], abs=0.01)
        assert (again.W_dec - whole.W_dec).norm(dim=1).median() < 0.05  # a few rows may go another way


@DEVICES
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activations_and_statistics_are_those_of_the_cpu(device, kind, tmp_path):
    runs = []
    for where in ("cpu", device):
        model = tiny_model(kind).to(where)
        folder = tmp_path / f"run_{len(runs)}"
        runs.append(save_activations(folder, model, word_tokenizer(), [resolve(model, "resid_post:1")],
                                     texts=TEXTS * 4, splits=split_texts(24, 0.2, 0), settings=SETTINGS))
    hook = runs[0].hook()
    for here, there in zip(*(run.shards(hook) for run in runs)):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    for name, value in runs[0].stats(hook).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(runs[1].stats(hook)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_gives_activations_near_the_whole_ones(device, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", width=128).save_pretrained(tmp_path)
    found = []
    for load_bits in (None, bits):
        model = load_model(str(tmp_path), device, torch.bfloat16, bits=load_bits)
        point = resolve(model, "resid_post:1")
        block = SETTINGS.tokens(word_tokenizer(), TEXTS)
        found.append(block_rows(model, [point], block, pad_id=0, settings=SETTINGS)[1][0].float())
    whole, quantised = found
    assert torch.nn.functional.cosine_similarity(whole, quantised).median() > 0.9 and not torch.equal(whole, quantised)


def spread(device: str, shards: bool) -> dict[str, torch.Tensor]:
    """A few SAE steps as one of several ranks takes them, and a classifier whose weights the ranks share."""
    state = moved(pair_of_states(activations())[0], device)
    work = Workspace(state, "float32", compiled=False, shared=shards)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        rows = activations()[torch.randint(0, 1500, (64,), generator=generator)][own_part(64)]
        fast_step(state, rows.to(device) @ state["transform"], k=5, lr=1e-3, dead_after=60, work=work)
    task = text_task(27)
    task.splits["train"] = torch.arange(21)
    model = text_model("llama", layer="0", train_below=True).to(device)
    if shards:
        model.share_weights(torch.device(device))
    targets = Targets(torch.arange(21), torch.randn(21, 16, generator=torch.Generator().manual_seed(0)))
    settings = TuneSettings(epochs=1, batch_size=4, lr=1e-3, optimizer="adamw", clip_norm=4.0, aux_weight=0.5)
    fine_tune(model, task, settings, targets)
    found = {f"sae.{name}": state[name] for name in ("dec", "enc", "bias")} | gathered(trained_state(model))
    return {name: value.detach().cpu() for name, value in found.items()}


def main(folder: Path, device: str) -> None:
    """One of the ranks of torchrun, or a group of one that goes through the same library."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank=0, world_size=1,
                                init_method=f"file://{folder / 'meeting'}")
    with ranks():
        total = torch.full((3,), 2.0, device=device)
        add_up(total)
        if alone:
            dist.all_reduce(total)  # what add_up() leaves out for one rank
        found = spread(device, shards=True)
        torch.save(found | {"total": total.cpu() / world_size()}, folder / f"rank_{dist.get_rank()}.pt")
    if alone:
        dist.destroy_process_group()


@DEVICES
def test_sharded_weights_and_sums_over_all_gpus(device, tmp_path):
    """NCCL and FSDP, by as many processes as there are GPUs; gloo and one process on a CPU."""
    n = torch.cuda.device_count() if device == "cuda" else 1
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    done = subprocess.run([sys.executable, *launch, __file__, str(tmp_path), device], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": ROOMS, "OMP_NUM_THREADS": "1"}, cwd=PROJECT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = spread("cpu", shards=False)
    for number in range(n):
        found = torch.load(tmp_path / f"rank_{number}.pt", weights_only=True)
        assert found.pop("total").tolist() == [2.0] * 3
        assert found.keys() == expected.keys() or number  # only rank 0 gathers the classifier
        for name in found:
            apart = (found[name] - expected[name]).abs()  # Adam makes much of the rounding of small gradients
            assert apart.mean() < 1e-4 and apart.max() < 5e-3, name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
