"""The training loop: order of the rows, resume, history, and what a trained SAE must reach."""
import json
import random
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import lib.training.checkpoints as checkpoints
import lib.training.loop as training
from checks.evaluation import shuffled, untrained_sae
from lib.batches import Rows, rows_of_tensor, sample_rows, shuffled_batches
from lib.environment import InputError
from lib.metrics.reconstruction import explained_variance
from lib.sae import make_sae, sae_hash
from lib.training.kinds import KINDS
from lib.training.loop import TrainSettings, score, train_sae
from lib.training.settings import falling_k
from lib.training.step import whitening
from lib.training.stopping import stop_between_steps

SMALL = {"n_latents": 48, "top_k": 4, "epochs": 3, "batch_size": 64, "log_every": 5, "precision": "float32"}


def planted(n_rows=6000, n_inputs=24, n_features=48, active=3, offset=5.0, seed=0):
    """Rows that are sparse sums of unit features, off centre, with a little noise; and the features."""
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(n_features, n_inputs, generator=generator), dim=1)
    codes = torch.zeros(n_rows, n_features)
    chosen = torch.rand(n_rows, n_features, generator=generator).topk(active, dim=1).indices
    codes.scatter_(1, chosen, 1 + torch.rand(n_rows, active, generator=generator))
    x = codes @ features + 0.05 * torch.randn(n_rows, n_inputs, generator=generator)
    return x + offset * torch.randn(n_inputs, generator=generator), features


def make_rows(n_rows=1500, **options):
    x, features = planted(n_rows, **options)
    return rows_of_tensor(x, torch.arange(len(x)) % 10 == 0), features


def split_rows(rows, size):
    return Rows(list(rows.shards[0].split(size)), rows.is_val, rows.mean, rows.covariance)


def test_an_epoch_visits_each_training_row_once_and_no_validation_row():
    rows, _ = make_rows(1000)
    got = torch.cat(list(shuffled_batches(rows, torch.eye(24), 100, seed=0, epoch=0)))
    expected = rows.shards[0][~rows.is_val] - rows.mean
    assert got.shape == (900, 24)
    torch.testing.assert_close(got.sort(0).values, expected.sort(0).values)


def test_epochs_differ_and_seeds_repeat():
    rows, _ = make_rows(1000)
    first, again, second, other = (next(shuffled_batches(rows, torch.eye(24), 64, seed=s, epoch=e))
                                   for s, e in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, other)


def test_two_level_shuffle_mixes_shards_and_loses_no_row(monkeypatch):
    monkeypatch.setattr("lib.batches.BUFFER_BYTES", 1)  # a buffer holds just two shards
    number = torch.arange(3000.0)[:, None]
    rows = split_rows(Rows([number], torch.zeros(3000, dtype=torch.bool), torch.zeros(1), torch.eye(1)), 250)
    batches = [batch[:, 0].long() for batch in shuffled_batches(rows, torch.eye(1), 64, seed=0, epoch=0)]
    seen = torch.cat(batches)
    assert len(seen) == 3000 // 64 * 64 and len(seen.unique()) == len(seen)
    shards = torch.stack([torch.bincount(batch // 250, minlength=12) for batch in batches])
    # Neighbours (rows of one text) do not stay together: each batch mixes two shards about evenly ...
    assert (shards > 0).sum(1).min() >= 2 and shards.max() < 50
    # ... and its rows are scattered over them: neighbouring rows are a small part of a batch.
    together = torch.stack([(batch.sort().values.diff() == 1).float().mean() for batch in batches])
    assert together.mean() < 0.25
    assert not torch.equal(seen, seen.sort().values)


def test_fewer_rows_than_a_batch_make_one_short_batch():
    rows, _ = make_rows(50)
    assert [len(batch) for batch in shuffled_batches(rows, torch.eye(24), 64, seed=0, epoch=0)] == [45]


def test_a_planted_dictionary_is_recovered():
    rows, features = make_rows(12_000)
    sae, _ = train_sae(rows, TrainSettings(n_latents=96, top_k=3, epochs=8, batch_size=192, precision="float32"),
                       progress=False)
    best = (features @ sae.W_dec.T).max(1).values
    assert best.mean() > 0.95 and (best > 0.9).float().mean() > 0.9


def test_better_than_the_reference_setting_on_data_off_centre():
    """Raw input, independent default encoder, plain MSE, as overcomplete's own loop trains: lower EV, more dead
    latents.
    """
    from overcomplete.sae import TopKSAE
    from overcomplete.sae import train_sae as overcomplete_train
    from torch.utils.data import DataLoader, TensorDataset

    rows, _ = make_rows(8000, offset=3.0)
    x, val = rows.shards[0][~rows.is_val], rows.shards[0][rows.is_val]
    ours, _ = train_sae(rows, TrainSettings(n_latents=48, top_k=3, epochs=4, batch_size=128, precision="float32"),
                        progress=False)
    mine = score(ours, sample_rows(rows, validation=True))
    torch.manual_seed(0)
    theirs = TopKSAE(24, nb_concepts=48, top_k=3)
    loader = DataLoader(TensorDataset(x), batch_size=128, shuffle=True)
    overcomplete_train(theirs, loader, lambda x, xhat, *_: (x - xhat).square().mean(),
                       torch.optim.Adam(theirs.parameters(), lr=1e-3), nb_epochs=4, monitoring=0)
    theirs.eval()
    with torch.no_grad():
        _, codes, xhat = theirs(val)
    assert mine["ev"] > explained_variance(val, xhat) + 0.1
    assert mine["dead_pct"] < 10 < 100 * (codes == 0).all(0).float().mean()


def test_history_has_equal_columns_and_plain_numbers():
    rows, _ = make_rows()
    _, history = train_sae(rows, TrainSettings(**SMALL), progress=False)
    json.dumps(history, allow_nan=False)
    steps = 1350 // 64
    for block in ("train", "val", "train_sample", "epochs"):
        assert len({len(column) for column in history[block].values()}) == 1
    assert history["val"]["step"] == [steps, 2 * steps, 3 * steps]
    assert set(history["epochs"]) == {"loss", "recon_mse", "l1", "r2", "l0", "dead_features_pct"}
    assert history["precision"] == "float32"
    assert history["train"]["step"][-1] == 3 * steps and max(history["train"]["l0"]) <= 4


def test_the_saved_sae_is_that_of_the_best_epoch():
    rows, _ = make_rows()
    sae, history = train_sae(rows, TrainSettings(**SMALL), progress=False)
    ev = history["val"]["ev"]
    assert history["best_epoch"] == ev.index(max(ev)) + 1
    assert score(sae, sample_rows(rows, True))["ev"] == pytest.approx(max(ev), abs=1e-6)


def test_scores_are_those_of_a_dense_computation():
    rows, _ = make_rows()
    sae, _ = train_sae(rows, TrainSettings(**SMALL), progress=False)
    x = rows.shards[0][rows.is_val]
    result = score(sae, sample_rows(rows, True))
    xhat = sae.decode(*sae.encode(x))
    assert result["ev"] == pytest.approx(explained_variance(x, xhat), abs=1e-9)
    assert result["n_rows"] == len(x) and result["l0_mean"] <= 4


def test_a_run_in_shards_trains_the_same_sae():
    rows, _ = make_rows()
    whole, _ = train_sae(rows, TrainSettings(**SMALL), progress=False)
    parts, _ = train_sae(split_rows(rows, 1500), TrainSettings(**SMALL), progress=False)
    assert torch.equal(whole.W_dec, parts.W_dec)


@pytest.mark.parametrize("stop_at", [1, 21, 30, 62])
def test_an_interrupted_training_ends_with_the_same_sae(tmp_path, monkeypatch, stop_at):
    rows, _ = make_rows()
    settings = TrainSettings(**SMALL, dead_after=500)
    whole, whole_history = train_sae(rows, settings, tmp_path / "whole", progress=False)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SHARE", float("inf"))
    real, calls = training.fast_step, []

    def stop_later(*args, **options):
        calls.append(1)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        real(*args, **options)

    monkeypatch.setattr(training, "fast_step", stop_later)
    with pytest.raises(KeyboardInterrupt):
        train_sae(rows, settings, tmp_path / "killed", progress=False)
    monkeypatch.setattr(training, "fast_step", real)
    again, history = train_sae(rows, settings, tmp_path / "killed", progress=False)
    assert history == whole_history
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(getattr(again, name), getattr(whole, name))


def stop_in_step(monkeypatch, number, kind=signal.SIGINT):
    """Send a signal in that step, counted over all trainings; returns a list with an item for every step so far."""
    real, steps = training.fast_step, []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == number:
            signal.raise_signal(kind)
        real(*args, **options)

    monkeypatch.setattr(training, "fast_step", interrupted)
    return steps


class Drawn:
    """A source that stores nothing: rows drawn from a generator, whose state is its place."""

    def __init__(self):
        rows = make_rows()[0]
        self.mean, self.covariance, self.scale, self.sample = rows.mean, rows.covariance, rows.scale, rows.sample
        self.n_train, self.n_val, self.buffer_bytes = 640, rows.n_val, 0
        self.generator = torch.Generator().manual_seed(1)

    def seconds_a_row(self):
        return 0.0

    def batches(self, transform, batch_size, *, seed, begun):
        if place := min(begun, key=lambda each: each[0])[1]:
            self.generator.set_state(place["generator"])
        while True:
            yield torch.randn(batch_size, 24, generator=self.generator) @ transform

    def place(self):
        return {"generator": self.generator.get_state()}


def test_a_training_reads_any_source_and_resumes_at_its_place(tmp_path, monkeypatch):
    settings = TrainSettings(**SMALL)
    whole, whole_history = train_sae(Drawn(), settings, tmp_path / "whole", progress=False)
    steps = stop_in_step(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        train_sae(Drawn(), settings, tmp_path / "stopped", progress=False)
    again, history = train_sae(Drawn(), settings, tmp_path / "stopped", progress=False)
    assert len(steps) == 30 and history == whole_history and sae_hash(again) == sae_hash(whole)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_came_in(tmp_path, monkeypatch, kind):
    rows, _ = make_rows()
    settings, before = TrainSettings(**SMALL, dead_after=500), [signal.getsignal(n) for n in (2, 15)]
    whole, whole_history = train_sae(rows, settings, tmp_path / "whole", progress=False)
    # in the second epoch, between two points of the curve, long before a checkpoint is due
    steps = stop_in_step(monkeypatch, 23, kind)
    with pytest.raises(KeyboardInterrupt):
        train_sae(rows, settings, tmp_path / "stopped", progress=False)
    assert [signal.getsignal(n) for n in (2, 15)] == before and len(steps) == 23
    kept = checkpoints.read_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.pt")
    assert int(kept["state"]["step"]) == 23
    again, history = train_sae(rows, settings, tmp_path / "stopped", progress=False)
    assert len(steps) == int(kept["history"]["n_steps"]) and history == whole_history
    assert all(torch.equal(getattr(again, name), getattr(whole, name)) for name in ("W_enc", "b_enc", "W_dec"))


def test_a_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_between_steps() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was swallowed")
    with stop_between_steps(False) as stopped, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not stopped()


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path):
    rows, _ = make_rows()
    train_sae(rows, TrainSettings(**SMALL), tmp_path, progress=False)
    held = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(InputError, match="other constants or data .top_k was 4, is 2."):
        train_sae(rows, TrainSettings(**{**SMALL, "top_k": 2}), tmp_path, progress=False)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == held


@pytest.mark.parametrize("number", ["refine", "own", "ridge", "revive"])
def test_a_checkpoint_of_listas_other_numbers_is_not_continued(tmp_path, monkeypatch, number):
    rows, _ = make_rows()
    settings = TrainSettings(**{**SMALL, "kind": "lista"})
    train_sae(rows, settings, tmp_path, progress=False)
    changed = KINDS["lista"]._replace(**{number: getattr(KINDS["lista"], number) / 2})
    monkeypatch.setitem(KINDS, "lista", changed)
    with pytest.raises(InputError, match="other constants or data"):
        train_sae(rows, settings, tmp_path, progress=False)


def test_a_diverging_loss_stops_with_a_word():
    rows, _ = make_rows()
    rows.shards[0][5] = float("inf")
    with pytest.raises(InputError, match="no longer finite"):
        train_sae(rows, TrainSettings(**SMALL), progress=False)


@pytest.mark.parametrize("wrong, message", [({"top_k": 49}, "TOP_K=49"), ({"top_k": 0}, "TOP_K=0"),
                                            ({"epochs": 0}, "epochs=0"), ({"batch_size": 0}, "batch_size=0"),
    ({"lr": 0.0}, "LR=0.0"), ({"lr": -0.1}, "LR=-0.1"), ({"lr": float("nan")}, "LR=nan"),
    ({"dead_after": -1}, "DEAD_AFTER_TOKENS=-1"),
])
def test_settings_that_cannot_work_are_refused(wrong, message):
    rows, _ = make_rows(100)
    with pytest.raises(InputError, match=message):
        train_sae(rows, TrainSettings(**{**SMALL, **wrong}), progress=False)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_two_threads_train_the_same_sae_and_write_the_same_history(kind):
    """What the project's own code does not depend on their number; torch promises nothing for its matrix products."""
    rows, _ = make_rows(3000, n_inputs=100, n_features=200)
    made = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(train_sae(rows, TrainSettings(n_latents=256, top_k=4, kind=kind, epochs=1, batch_size=700,
                                                  dead_after=700), progress=False))
    torch.set_num_threads(before)
    assert torch.equal(made[0][0].W_enc, made[1][0].W_enc) and torch.equal(made[0][0].W_dec, made[1][0].W_dec)
    assert made[0][1] == made[1][1] and (kind != "topk" or max(made[0][1]["train"]["auxk"]) > 0)


@pytest.mark.parametrize("n_rows, every, message", [(1, 1, "two validation rows"), (1, 2, "two validation rows"),
                                                    (9, 9, "two validation rows"), (20, 7, None)])
def test_runs_of_a_few_rows_are_trained_or_refused_in_one_line(n_rows, every, message):
    x, _ = planted(n_rows)
    rows = rows_of_tensor(x, torch.arange(n_rows) % every == 0)
    if message:
        with pytest.raises(InputError, match=message):
            train_sae(rows, TrainSettings(**SMALL), progress=False)
    else:
        assert all(torch.isfinite(getattr(train_sae(rows, TrainSettings(**SMALL), progress=False)[0], name)).all()
                   for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("shape, change", [
    ((400, 6), lambda x: x + 1e4), ((400, 6), lambda x: (100 * x + 3e4).half()), ((400, 6), lambda x: x.bfloat16()),
    ((400, 1), lambda x: x),
    ((400, 6), lambda x: x * 1e-12), ((400, 6), lambda x: x * 1e12), ((5, 30), lambda x: x),
    ((400, 6), lambda x: torch.cat([x, torch.full((400, 1), 7e4)], 1)),
])
def test_statistics_are_right_for_large_means_low_precision_and_odd_shapes(shape, change):
    """To 1e-4 of the spread, against numpy in float64."""
    x = change(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    rows = rows_of_tensor(x, torch.zeros(len(x), dtype=torch.bool))
    exact = np.asarray(x.double())
    spread = exact.std(0).max()
    assert np.abs(rows.mean.double().numpy() - exact.mean(0)).max() < max(1e-4 * spread, 6e-8 * np.abs(exact).max())
    assert np.abs(rows.covariance.double().numpy() - np.cov(exact.T, bias=True)).max() < 1e-4 * spread**2
    assert rows.scale == pytest.approx(np.sqrt(exact.var(0).sum()), rel=1e-4)
    whitened = next(shuffled_batches(rows, whitening(rows.covariance), len(x), seed=0, epoch=0))
    assert whitened.square().sum(1).mean() == pytest.approx(1, rel=2e-3)


def test_nothing_draws_from_the_global_streams():
    rows, _ = make_rows(300)
    # importing that package draws
    make_sae(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), 1.0, 1).overcomplete()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sae, _ = train_sae(rows, TrainSettings(**SMALL), progress=False)
    train_sae(rows, TrainSettings(**{**SMALL, "kind": "jumprelu"}), progress=False)
    untrained_sae(rows, TrainSettings(**SMALL))
    shuffled(rows.shards[0])
    sae.overcomplete()
    assert (torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
            and random.getstate() == states[2])


def test_what_is_set_to_0_is_not_taken_for_unset():
    rows, _ = make_rows(200)
    _, history = train_sae(rows, TrainSettings(**SMALL, dead_after=0), progress=False)
    assert history["dead_after"] == 0


@pytest.mark.parametrize("batch_size, expected", [(64, 3000), (2000, 4000), (10_000, 4500)])
def test_a_large_batch_delays_what_counts_as_dead(batch_size, expected):
    """A batch holds no more than the 2,250 training rows."""
    rows, _ = make_rows(2500)
    _, history = train_sae(rows, TrainSettings(**{**SMALL, "epochs": 1, "batch_size": batch_size}), progress=False)
    assert history["dead_after"] == expected


def test_checkpoints_take_at_most_a_share_of_the_time(monkeypatch):
    """One that takes 3 s is followed by the next after 150 s, one that takes 0.1 s after 30 s."""
    for end, due in ((103.0, 253.0), (100.1, 130.1)):
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda end=end: end)
        assert checkpoints.next_due(100.0) == pytest.approx(due)


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    progress = {"state": {"enc": torch.tensor([float("nan")]), "dec": torch.ones(1), "step": torch.tensor(7)}}
    with pytest.raises(InputError, match="no longer finite at step 7; lower LR"):
        checkpoints.save_checkpoint(tmp_path / "last.pt", progress)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("frozen, still, moved", [("decoder", "W_dec", "W_enc"), ("encoder", "W_enc", "W_dec")])
def test_a_control_with_a_frozen_part_still_learns(frozen, still, moved):
    rows, _ = make_rows(3000)
    settings = TrainSettings(**SMALL | {"epochs": 8}, whiten=0, aligned=False, frozen=frozen)
    sae, history = train_sae(rows, settings, progress=False)
    start = untrained_sae(rows, settings)
    torch.testing.assert_close(getattr(sae, still), getattr(start, still), rtol=1e-5, atol=1e-6)
    assert (getattr(sae, moved) - getattr(start, moved)).norm() > 0.1 * getattr(start, moved).norm()
    untouched = score(start, sample_rows(rows, validation=True))["ev"]
    assert history["val"]["ev"][-1] > untouched + 0.05


@pytest.mark.parametrize("wrong", [{"frozen": "both", "whiten": 0, "aligned": False},
                                   {"frozen": "decoder", "whiten": 0}, {"frozen": "encoder", "aligned": False}])
def test_what_is_frozen_must_be_named_and_random(wrong):
    with pytest.raises(InputError, match="frozen"):
        train_sae(make_rows(200)[0], TrainSettings(**SMALL, **wrong), progress=False)


def test_k_falls_in_a_straight_line_and_then_stays():
    settings = TrainSettings(48, 4, start_k=10, fall=0.5)
    assert [falling_k(settings, step, 24) for step in range(24)] == [
        10, 10, 9, 8, 8, 8, 7, 6, 6, 6, 5, 4, *[4] * 12]
    assert {falling_k(TrainSettings(48, 4), step, 24) for step in range(24)} == {4}


@pytest.mark.parametrize("kind, goes_on", [("lista", False), ("batchtopk", True)])
def test_auxk_ends_half_way_where_the_kind_says_so(kind, goes_on):
    settings = TrainSettings(**{**SMALL, "kind": kind, "dead_after": 0, "log_every": 1, "epochs": 4})
    _, history = train_sae(make_rows(1000)[0], settings, progress=False)
    auxk, dead = history["train"]["auxk"], history["train"]["dead_pct"]
    half = len(auxk) // 2
    assert any(auxk[:half]) and any(auxk[half:]) == goes_on and any(dead[half:])  # these are counted all the same


def test_a_falling_k_resumes_to_the_same_weights(tmp_path):
    rows, _ = make_rows(1000)
    settings = TrainSettings(**SMALL, kind="batchtopk", start_k=8)
    seen, real = [], training.fast_step

    def noted(state, x, **options):
        seen.append(options["k"])
        if len(seen) == 15 and stops:
            raise KeyboardInterrupt
        real(state, x, **options)

    found = []
    for stops in (False, True):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "fast_step", noted)
            patch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
            patch.setattr(checkpoints, "CHECKPOINT_SHARE", 1.0)
            if stops:
                with pytest.raises(KeyboardInterrupt):
                    train_sae(rows, settings, tmp_path / "stopped", progress=False)
                assert len(seen) == 15
            folder = tmp_path / ("stopped" if stops else "whole")
            found.append(sae_hash(train_sae(rows, settings, folder, progress=False)[0]))
        assert seen[0] == 8 and seen[-1] == 4
    assert found[0] == found[1]


def test_a_start_with_more_codes_than_latents_is_refused():
    rows, _ = make_rows(400)
    with pytest.raises(InputError, match="START_K=49"):
        train_sae(rows, TrainSettings(**SMALL, start_k=49), progress=False)
