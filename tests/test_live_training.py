"""LIVE in step 2: the same rows as a store holds, an SAE that later steps can use, and wrong input in one line."""
import dataclasses
import json
import shutil
import signal
from itertools import count, islice

import pytest
import torch
from conftest import run_notebook, sae_of
from test_verify_scripts import FOLDER, SMALL, TRAIN, files, script, source  # noqa: F401

import lib.activations as activations
import lib.training.loop as loop
from activation_buffer import reading
from lib.batches import read_rows
from lib.environment import InputError
from lib.sae import load_sae
from lib.saes import list_saes
from lib.store import open_run

LIVE = ["LIVE=True", "N_TOKENS=4000", "BUFFER_TOKENS=200"]


def live_rows(run, **settings):
    place = run.hook(), 0
    return reading.live_rows(run, [place], **{"n_tokens": 4000, "epochs": 2, "buffer_tokens": 200, "device": "cpu",
                                              **settings})[place]


def raw_batches(rows, size=50):
    shared = rows.live.join(rows.point, size, seed=0, begun=[(0, {})])
    return (shared.take(rows.point, step) for step in count())


@pytest.fixture
def run(script, source):  # noqa: F811
    """A run of all of the 60 texts, of which three are held out."""
    assert script("01_save_activations.py", *source, *SMALL, "VAL_FRAC=0.05")[0] == 0
    return open_run("verify_sae_training")


def test_its_rows_are_those_of_the_stored_training_texts(run):
    """Every stored training row passes, none that is held out; up to the last digits, which depend on the batch."""
    rows = live_rows(run)
    raw = list(islice(raw_batches(rows), 60))
    found = torch.cat(raw)
    held_out = {text["text"] for text in run.texts if text["split"] == "val"}
    assert len(held_out) == 3
    allowed = torch.tensor([text["text"] not in held_out for text in run.texts])[run.rows["text_id"]]
    stored = read_rows(run.shards(run.hook()), allowed)
    distance = torch.cdist(found, stored, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() < 1e-5 and distance.min(0).values.max() < 1e-5
    refused = read_rows(run.shards(run.hook()), ~allowed & (run.rows["pos"] > 1))
    assert torch.cdist(found, refused).min() > 1e-3


def test_an_sae_of_a_running_model_is_used_like_any_other(run, script, own_store):  # noqa: F811
    code, out, _ = script("02_train_sae.py", *TRAIN, *LIVE)
    assert code == 0 and "live: 4,000 tokens" in out and "buffer 0.00 GB" in out
    folder, history = sae_of(own_store), json.loads((sae_of(own_store) / "training_history.json").read_text())
    assert len(history["val"]["ev"]) == 2 and history["val"]["tokens"][-1] == 4000 // 2 // 64 * 64 * 2
    sae = load_sae(folder / "topk_sae.pt")
    assert sae.config["tokens_trained"] == history["val"]["tokens"][-1] and sae.config["run_id"] == run.run_id
    assert sae.config["constants"]["N_TOKENS"] == 4000 and sae.config["constants"]["LIVE"]
    assert script("02_train_sae.py", *TRAIN, *LIVE)[1].count("already trained") == 1
    assert script("02_train_sae.py", *TRAIN)[0] == 0 and len(list_saes()) == 2
    stored = load_sae(sae_of(own_store) / "topk_sae.pt").config["constants"]
    assert not {"LIVE", "N_TOKENS", "BUFFER_TOKENS"} & set(stored)


def test_what_a_live_training_saw_is_not_told_from_its_sample(run, script, source, own_store, capsys):  # noqa: F811
    """On other texts: it was trained on the whole data set, of which the run is a part."""
    assert script("02_train_sae.py", *TRAIN, *LIVE)[0] == 0
    said = script("01_save_activations.py", f"SAE={sae_of(own_store).name}", "DATA_LIMIT=30", "PREFLIGHT=False")[1]
    run_notebook(FOLDER / "03_analyze_training.ipynb", RUN_ID=said.rsplit("RUN_ID=", 1)[1].split()[0])
    told = capsys.readouterr().out
    assert "were in its run, and it was trained live on more" in told and "were in its training" not in told


def test_without_a_number_it_passes_over_all_texts(run):
    """As many tokens as the run has in training texts, for each epoch; another number of rows in memory mixes other
    batches.
    """
    n_val = len({text["text"] for text in run.texts if text["split"] == "val"})
    rows = live_rows(run, n_tokens=None, epochs=3)
    assert rows.n_tokens == round((60 - n_val) * run.n_rows / 60) * 3
    few, many = (next(raw_batches(live_rows(run, buffer_tokens=n))) for n in (200, 2000))
    assert not torch.equal(few, many)


@pytest.mark.parametrize(("given", "message"), [
    (["N_TOKENS=4000"], "N_TOKENS says how long LIVE=True trains"),
    (["LIVE=True", "N_TOKENS=100"], "must hold a batch of 64"),
    (["LIVE=True", "N_TOKENS=4000", "BUFFER_TOKENS=20"], "must hold a batch of 64"),
    ([*LIVE, "SAES=BATCH_SIZE_TRAIN=64,300"], "can't name BATCH_SIZE_TRAIN"),
    (["LIVE=True", "N_TOKENS=0"], "N_TOKENS=0 must be at least 1"),
])
def test_wrong_constants_are_one_line(run, script, given, message):  # noqa: F811
    code, _, err = script("02_train_sae.py", *TRAIN, *given)
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.fixture
def layers(script, source):  # noqa: F811
    """A run of two hook points, each with outliers of its own, of which the other point has most as well."""
    code, _, err = script("01_save_activations.py", *source, "LAYER_SIGNATURE=resid_post:0,resid_post:1",
                          "VAL_FRAC=0.05", "MAX_NORM_MULTIPLE=1.1")
    assert code == 0, err
    return open_run("verify_sae_training")


def test_outliers_of_any_hook_point_are_dropped_at_all(layers):
    """As the run has them; so all hook points have the same rows, and a training has those of its own alone."""
    hooks = list(layers.manifest["hooks"])
    limits = [1.1 * layers.stats(hook)["median_norm"] for hook in hooks]
    outliers = [int((torch.cat(layers.shards(hook)).norm(dim=1) > limit).sum()) for hook, limit in zip(hooks, limits)]
    assert len(set(outliers)) == 2  # other rows at each

    def batches(wanted):
        rows = list(reading.live_rows(layers, [(hook, 0) for hook in wanted], n_tokens=2000, epochs=2,
                                      buffer_tokens=200, device="cpu").values())
        pairs = zip(*(each.batches(torch.eye(16), 50, seed=0, begun=[(0, {})]) for each in rows))
        return [torch.cat(x) + each.mean for each, x in zip(rows, zip(*pairs))]

    together = batches(hooks)
    for hook, limit, x in zip(hooks, limits, together):
        assert torch.equal(batches([hook])[0], x) and len(x) >= 1950 and x.norm(dim=1).max() < limit + 1e-5


def test_layers_and_seeds_of_a_grid_have_the_bytes_of_single_trainings(
    layers, script, own_store, monkeypatch  # noqa: F811
):
    """Two layers, two seeds: the model reads once for each seed."""
    passes, real = [], activations.forward

    def counted(model, points, *rest):
        passes.append(len(points))
        return real(model, points, *rest)

    monkeypatch.setattr(activations, "forward", counted)
    root = own_store / "verify_sae_training" / "saes"

    def trained(*arguments):
        passes.clear()
        code, out, _ = script("02_train_sae.py", *TRAIN, *LIVE, *arguments)
        assert code == 0
        return out, len(passes)

    said, n_grid = trained("SAES=LAYER=resid_post:0,resid_post:1 SEED=0,1")
    assert "4 SAEs: 2 reads of the activations, 2 SAEs at a time" in said and "4,000 tokens for each of 2 seeds" in said
    many = files(root)
    shutil.rmtree(root)
    n_single = [trained(f"LAYER=resid_post:{i}", f"SEED={i}")[1] for i in (0, 1)]
    single = files(root)
    assert len(single) == len(many) // 2 and single.items() <= many.items()
    assert 0 <= n_grid - sum(n_single) <= 8  # a sample is read to tell how long it will take


def test_another_data_set_after_a_kill_is_refused(run, script, tmp_path, own_store, monkeypatch):  # noqa: F811
    """Also one that differs in a single text that is not read again; put back, it goes on to the same bytes."""
    root, path = own_store / "verify_sae_training" / "saes", tmp_path / "texts.jsonl"
    before = path.read_text()
    assert script("02_train_sae.py", *TRAIN, *LIVE)[0] == 0
    whole, steps, real = files(root), count(1), loop.fast_step
    shutil.rmtree(root)

    def killed(*args, **options):
        if next(steps) == 40:
            signal.raise_signal(signal.SIGINT)
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fast_step", killed)
        assert script("02_train_sae.py", *TRAIN, *LIVE)[0] == 130
    for changed in (before.replace("cat", "dog"), before + before, before + '{"text": "a cat"}\n',
                    before.replace("it was sad", "it was red", 1)):
        path.write_text(changed)
        code, _, err = script("02_train_sae.py", *TRAIN, *LIVE)
        assert code == 2 and err.splitlines()[-1].startswith("error: the data set is no longer the one that this")
    path.write_text(before)
    assert script("02_train_sae.py", *TRAIN, *LIVE)[0] == 0 and files(root) == whole


@pytest.mark.parametrize(("gone", "message"), [("model", "lay in"), ("texts.jsonl", "lay in")])
def test_what_is_gone_is_one_line(run, script, tmp_path, gone, message):  # noqa: F811
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    code, _, err = script("02_train_sae.py", *TRAIN, *LIVE)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and message in err


def test_a_run_without_its_data_set_is_refused(run):
    meta = run.meta | {"dataset": {"name": "stories"}}
    with pytest.raises(InputError, match="does not say which texts it holds"):
        live_rows(dataclasses.replace(run, meta=meta))
