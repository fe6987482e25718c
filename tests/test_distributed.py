"""Several ranks under torchrun: the same result as one process, and nothing lost when a rank dies.

    torchrun --nproc-per-node 2 tests/test_distributed.py <folder> <what>     # what the tests start
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
import pytest
import torch
from conftest import PROJECT, run_script, sae_of
from forked import ROOMS
from test_sae_ception_gates import text_model, text_task
from test_training import SMALL, make_rows, split_rows

import lib.training.checkpoints as checkpoints
import lib.training.loop as training
from activation_buffer.mixing import LivePass
from activation_buffer.rows import LiveRows
from cycles import schemas
from cycles.auxiliary import Targets
from cycles.fine_tuning import TuneSettings, fine_tune
from cycles.modules import trained_state
from cycles.sharding import whole
from cycles.unfinished import Checkpoint
from lib.batches import shuffled_batches
from lib.distributed import add_up, own_part, rank, ranks, wait_for_all, world_size
from lib.environment import InputError
from lib.files import read_json
from lib.store import open_run
from lib.training.fast_step import fast_step
from lib.training.many import Job, train_saes
from lib.training.step import init_state, whitening
from lib.training.workspace import Workspace

SAVE = "experiments/verify_sae_training/01_save_activations.py"
TRAIN = "experiments/verify_sae_training/02_train_sae.py"
SAVING = ("DATA_LIMIT=1500", "SHARD_ROWS=1000", "MAX_LENGTH=32", "PREFLIGHT=False")


def sae_steps(folder: Path) -> dict[str, torch.Tensor]:
    """Forty steps of the torch operations, with latents that AuxK works on; batches of 63 rows don't halve evenly."""
    rows, _ = make_rows()
    transform = whitening(rows.covariance)
    state = init_state(transform, 48, seed=3)
    work = Workspace(state, "float32", compiled=False, shared=world_size() > 1)
    for epoch in range(2):
        for x in shuffled_batches(rows, transform, 63, seed=0, epoch=epoch):
            fast_step(state, x, k=3, lr=2e-3, dead_after=50, work=work)
    return state


def sae_training(folder: Path) -> dict[str, torch.Tensor]:
    """A whole training with a checkpoint after every step; with DIE_AT the second rank is lost before that step."""
    def step(state, *args, **options):
        if rank() == 1 and str(int(state["step"])) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        fast_step(state, *args, **options)

    often = mock.patch.multiple(checkpoints, CHECKPOINT_SECONDS=0.0, CHECKPOINT_SHARE=float("inf"))
    with often, mock.patch.object(training, "fast_step", step):
        sae, history = training.train_sae(make_rows()[0], training.TrainSettings(**SMALL), folder, progress=False)
    return {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "ev": torch.tensor(history["val"]["ev"]),
            "loss": torch.tensor(history["train"]["loss"])}


def sae_grid(folder: Path, **changes) -> dict[str, torch.Tensor]:
    """Four SAEs from one read: side by side where the rows do not fit into a buffer, else one after the other."""
    rows, found = split_rows(make_rows()[0], 200), {}
    for name, n_bytes in ("together", 4 * 24 * 400), ("alone", 1 << 30):
        with mock.patch("lib.batches.BUFFER_BYTES", n_bytes):
            grid = [training.TrainSettings(**SMALL | {"top_k": k, "n_latents": 16 * k}) for k in (3, 4)]
            jobs = [Job(rows, settings, folder / f"{name}{settings.top_k}") for settings in grid]
            for number, sae, history in train_saes(jobs, progress=False):
                found[f"{name} {number} W_dec"] = sae.W_dec
                found[f"{name} {number} ev"] = torch.tensor(history["val"]["ev"])
    return found


def live_training(folder: Path) -> dict[str, torch.Tensor]:
    """Rows that each rank makes a part of, mixed on their way; the checkpoint holds what a round left over."""
    stored, _ = make_rows()

    def read(first: int, points: list[int]) -> Iterator[tuple[torch.Tensor, str]]:
        for number in count(first):
            block = stored.shards[0].roll(37 * number, 0)[: [0, 1, 90, 210][number % 4]]
            yield block[own_part(len(block))], str(number)

    rows = LiveRows(stored, LivePass(read, 4000, 5, [24]), 0, epochs=2, mean=stored.mean, covariance=stored.covariance)
    settings = training.TrainSettings(**SMALL | {"epochs": 2})
    often = mock.patch.multiple(checkpoints, CHECKPOINT_SECONDS=0.0, CHECKPOINT_SHARE=float("inf"))
    with often:
        sae, history = training.train_sae(rows, settings, folder, progress=False)
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return {"W_dec": sae.W_dec, "ev": torch.tensor(history["val"]["ev"]),
            "place": torch.tensor([state["place"][name] for name in ("round", "n_blocks", "n_rows", "n_over")])}


def live_order(folder: Path) -> dict[str, torch.Tensor]:
    """Which rows each batch holds, over all ranks, and which of them are this rank's."""
    def read(first: int, points: list[int]) -> Iterator[tuple[torch.Tensor, str]]:
        for number in count(first):
            block = (1 + 300 * number + torch.arange(float([0, 1, 90, 210][number % 4])))[:, None]
            yield block[own_part(len(block))], str(number)

    rows = LiveRows(make_rows()[0], LivePass(read, 3000, 5, [1]), 0, epochs=1, mean=torch.zeros(1),
                    covariance=torch.eye(1))
    found = []
    for x in rows.batches(torch.eye(1), 64, seed=0, begun=[(0, {})]):
        seen = torch.zeros(300 * 60).index_fill_(0, x[:, 0].long(), 1)
        add_up(seen)
        found.append(seen)
    return {"batches": torch.stack(found)}


def tuning(folder: Path, shards: bool = False, select: str = "last") -> dict[str, torch.Tensor]:
    """A classifier on a tiny Llama with targets; the last batch is smaller than the ranks, and some steps are
    clipped.
    """
    task = text_task(27)
    task.splits["train"] = torch.arange(21)
    model = text_model("llama", layer="0", train_below=True, tie_word_embeddings=True)
    if shards and world_size() > 1:
        if rank():
            model.to("meta")  # only the first rank has read the weights
        model.share_weights(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    targets = Targets(torch.arange(21), torch.randn(21, 16, generator=generator))
    settings = TuneSettings(epochs=3, batch_size=4, accumulate=3, lr=3e-3, optimizer="adamw", weight_decay=0.01,
                            clip_norm=4.0, aux_weight=0.5, select=select)
    die = int(os.environ.get("DIE_AT", -1))

    def stop(record: dict[str, float]) -> None:
        if record["epoch"] == die + 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    history = fine_tune(model, task, settings, targets, checkpoint=Checkpoint(folder / "unfinished.pt"), log=stop)
    curve = [[record[name] for name in ("loss", "aux_loss", "val_loss")] for record in history["epochs"]]
    trained = {name: whole(value) for name, value in trained_state(model).items()}
    return trained | {"curve": torch.tensor(curve), "aux": torch.tensor(list(history["aux"].values()))}


def sharded_tuning(folder: Path) -> dict[str, torch.Tensor]:
    """The same with each rank keeping a share of the weights; it ends with those of the best epoch."""
    return tuning(folder, shards=True, select="best")


def resharded_tuning(folder: Path) -> dict[str, torch.Tensor]:
    """The sharded tuning, whose last epoch is left to another number of ranks than the first two."""
    if rank() == 0:
        before = folder.with_name(f"sharded_tuning_{3 - world_size()}")
        if before.exists():
            shutil.copytree(before, folder, dirs_exist_ok=True)
    wait_for_all()
    return sharded_tuning(folder)


def main(folder: Path, what: list[str]) -> None:
    """Run scenarios by name and keep what each gives, for every rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in what:
        torch.save(globals()[name](folder / f"{name}_{world_size()}"), folder / f"{name}_{world_size()}_{rank()}.pt")
    torch.set_num_threads(threads)


def torchrun(*command: str | Path, store: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    done = start(*command, store=store, **environment)
    out, err = done.communicate(timeout=300)
    if check and done.returncode:
        raise AssertionError(out + err)
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def start(*command: str | Path, store: Path, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"STORE_DIR": str(store), "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOMS} | environment
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 *map(str, command)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                            cwd=store.parent)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Scenario -> what one process, and each of two ranks, made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["sae_steps", "sae_training", "sae_grid", "live_order", "live_training", "tuning", "sharded_tuning"]
    main(folder, names)
    torchrun(__file__, folder, *names, "resharded_tuning", store=folder / "store")
    main(folder, ["resharded_tuning"])
    names.append("resharded_tuning")
    return {name: [torch.load(folder / f"{name}_{who}.pt", weights_only=True) for who in ("1_0", "2_0", "2_1")]
            for name in names} | {"folder": folder}


def test_the_parts_of_all_ranks_are_the_whole(monkeypatch):
    for n in (0, 1, 7, 64):
        parts = []
        for number in range(3):
            monkeypatch.setattr("lib.distributed.rank", lambda number=number: number)
            monkeypatch.setattr("lib.distributed.world_size", lambda: 3)
            parts.append(list(range(n))[own_part(n)])
        assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_a_world_of_one():
    x = torch.arange(3.0)
    add_up(x)
    assert x.tolist() == [0, 1, 2] and own_part(5) == slice(0, 5)


def test_steps_shared_by_two_ranks_are_those_of_one_process(results):
    one, two, other = results["sae_steps"]
    assert float(one["sums"][2]) > 0, "AuxK had nothing to do"
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-4, atol=2e-5)
        assert torch.equal(two[name], other[name]), "the ranks' states differ"


def test_training_with_two_ranks_ends_where_one_process_does(results):
    one, two, other = results["sae_training"]
    torch.testing.assert_close(two["W_enc"], one["W_enc"], rtol=0, atol=2e-2)
    torch.testing.assert_close(two["W_dec"], one["W_dec"], rtol=0, atol=2e-2)
    torch.testing.assert_close(two["ev"], one["ev"], rtol=0, atol=2e-3)
    assert all(torch.equal(two[name], other[name]) for name in two)


def test_training_goes_on_after_the_loss_of_a_rank(tmp_path, results):
    """The second rank is killed in an SAE's training, then in a classifier's; the same command ends both as if
    undisturbed.
    """
    places = {"sae_training": ("13", "checkpoints/last.pt"), "sharded_tuning": ("1", "unfinished/progress.json")}
    for name, (death, file) in places.items():
        lost = torchrun(__file__, tmp_path, name, store=tmp_path / "store", check=False, DIE_AT=death)
        assert lost.returncode and not (tmp_path / f"{name}_2_0.pt").exists()
        path = tmp_path / f"{name}_2" / file
        reached = (int(torch.load(path, weights_only=True)["state"]["step"]) if name == "sae_training"
                   else len(read_json(path, schemas.SHARED_TUNING)["progress"]["epochs"]))
        assert reached in (int(death) - 1, int(death))  # the first rank may be ended before it has written the last one
    torchrun(__file__, tmp_path, *places, store=tmp_path / "store")
    for name in places:
        resumed = torch.load(tmp_path / f"{name}_2_0.pt", weights_only=True)
        assert all(torch.equal(resumed[key], results[name][1][key]) for key in resumed)


def test_silence_is_counted_over_the_rows_of_all_ranks(results):
    """What is dead, and so what AuxK works on, is the same however many ranks share the rows."""
    one, two, other = results["sae_steps"]
    assert torch.equal(one["silent"], two["silent"]) and torch.equal(two["silent"], other["silent"])
    assert 0 < int((one["silent"] > 50).sum()) < len(one["silent"])


def test_a_grid_on_two_ranks_is_that_of_one_process(results):
    one, two, other = results["sae_grid"]
    assert len(one) == 8 and all(torch.equal(two[name], other[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3 if name.endswith("ev") else 2e-2)


def test_a_running_model_gives_two_ranks_the_batches_of_one_process(results):
    """Every row in the batch in which one process has it, on one of the ranks."""
    one, two, other = (found["batches"] for found in results["live_order"])
    assert torch.equal(one, two) and torch.equal(two, other)
    assert one.max() == 1 and one.sum(1).tolist() == [64.0] * len(one) and len(one) > 40


def test_live_training_on_two_ranks_is_that_of_one_process(results):
    one, two, other = results["live_training"]
    assert all(torch.equal(two[name], other[name]) for name in one), "the ranks differ"
    assert one["place"][-1] and torch.equal(one["place"], two["place"])
    torch.testing.assert_close(two["W_dec"], one["W_dec"], rtol=0, atol=2e-2)
    torch.testing.assert_close(two["ev"], one["ev"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["tuning", "sharded_tuning", "resharded_tuning"])
def test_a_classifier_shared_by_two_ranks_is_that_of_one_process(results, name):
    _, two, other = results[name]
    one = results["sharded_tuning" if name == "resharded_tuning" else name][0]
    for key in one:  # Adam makes much of the rounding of small gradients
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-3 if "lm." in key else 1e-4)
        assert torch.equal(two[key], other[key])
        torch.testing.assert_close(results[name][0][key], one[key], rtol=1e-3, atol=1e-3 if "lm." in key else 1e-4)
    assert (one["curve"][0] - one["curve"][-1])[:2].min() > 0.01, "nothing was learnt"


@pytest.mark.parametrize("harm", ["cut", "gone", "other names"])
def test_damaged_shares_of_a_training_are_told_in_one_line(results, tmp_path, harm):
    shutil.copytree(results["folder"] / "sharded_tuning_2", tmp_path / "left")
    shard = next(tmp_path.rglob("shard-00002*.safetensors"))
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes().replace(b"exp_avg.", b"exp_awg."))
    with pytest.raises(InputError, match=r"progress.json is damaged .*; delete .*unfinished and train again$"):
        sharded_tuning(tmp_path / "left")


def tree(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*"))
            if p.is_file() and p.suffix not in (".log", ".tmp")}


def test_two_ranks_save_and_resume_the_bytes_of_one_process(tmp_path, monkeypatch):
    """The second rank is killed while it writes; the same command then ends with the files of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_script(SAVE, *SAVING, store=one)
    process = start(PROJECT / SAVE, *SAVING, store=two)
    deadline = time.monotonic() + 120
    while len(list(two.rglob("rows/shard_*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode and not list(two.rglob("manifest.json")), "the run was over before the rank was lost"
    n_written = len(list(two.rglob("rows/shard_*.safetensors")))
    torchrun(PROJECT / SAVE, *SAVING, store=two)
    runs = []
    for store in (one, two):
        monkeypatch.setenv("STORE_DIR", str(store))
        runs.append(open_run("verify_sae_training", verify=True))
    assert tree(one) == tree(two) and len(runs[0].manifest["rows"]) > n_written
    check_training(two)


def check_training(store: Path) -> None:
    """02 on this run: the SAE is good, and only the first rank writes."""
    done = torchrun(PROJECT / TRAIN, "EPOCHS=2", "PRECISION=float32", store=store)
    assert done.stdout.count("held out: EV") == 1
    assert read_json(sae_of(store) / "training_history.json")["final"]["ev"] > 0.8


def test_a_script_of_one_process_refuses_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_script("experiments/sae_ception/02_train_sae.py", store=tmp_path / "store", check=False)
    assert (done.returncode == 2
            and done.stderr == "error: 02_train_sae.py runs in one process; start it without torchrun\n")


def test_more_ranks_than_rows_of_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr("lib.training.settings.world_size", lambda: 100)
    with pytest.raises(InputError, match="leaves some of 100 ranks without a row"):
        training.train_sae(make_rows()[0], training.TrainSettings(**SMALL), progress=False)


if __name__ == "__main__":
    with ranks():
        main(Path(sys.argv[1]), sys.argv[2:])
