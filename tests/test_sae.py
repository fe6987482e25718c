"""The SAE file and its codes: the same as overcomplete's, the same after reloading, refused when altered."""
import json

import pytest
import torch
from corpora import require_trained_on
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from checks.verification import check
from lib.environment import InputError
from lib.sae import load_sae, make_sae, reload_error, sae_hash, save_sae


def random_sae(n_inputs=12, n_latents=40, top_k=5, scale=7.0, offset=20.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(2, n_latents, n_inputs, generator=generator)
    b_enc = 0.1 * torch.randn(n_latents, generator=generator)
    mean = offset * torch.randn(n_inputs, generator=generator)
    return make_sae(W_enc, b_enc, normalize(W_dec, dim=1), mean, scale, top_k)


@pytest.fixture
def sae():
    return random_sae()


@pytest.fixture
def x(sae):
    return sae.mean + sae.scale * torch.randn(300, len(sae.mean), generator=torch.Generator().manual_seed(1))


def dense(values, indices, n_latents):
    return torch.zeros(len(values), n_latents).scatter_add(1, indices, values)


def test_rows_are_encoded_a_few_at_once_where_latents_are_many(sae, x, monkeypatch):
    expected, real, seen = sae.encode(x), type(sae)._fired, []
    monkeypatch.setattr("lib.sae.ENCODE_SIZE", 7 * 40 + 39)
    monkeypatch.setattr(type(sae), "_fired", lambda self, rows: seen.append(len(rows)) or real(self, rows))
    for found, wanted in zip(sae.encode(x), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert seen == [7] * 42 + [6]


def test_codes_and_reconstruction_are_overcompletes(sae, x):
    values, indices = sae.encode(x)
    scaled = (x - sae.mean) / sae.scale
    _, codes, rebuilt = sae.overcomplete()(scaled)
    torch.testing.assert_close(dense(values, indices, 40), codes, rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(values, indices), sae.scale * rebuilt + sae.mean)


def test_overcompletes_module_shares_the_weights_and_refuses_thresholds(sae):
    module = sae.overcomplete()
    assert (module.get_dictionary().data_ptr() == sae.W_dec.data_ptr()
            and module.encoder.weight.data_ptr() == sae.W_enc.data_ptr())
    assert not module.training and not any(p.requires_grad for p in module.parameters()) and module.top_k == 5
    with pytest.raises(InputError, match="no thresholds"):
        make_sae(sae.W_enc, sae.b_enc, sae.W_dec, sae.mean, 1.0, 5, threshold=torch.ones(40)).overcomplete()


class Sizes(TorchDispatchMode):
    """Counts the new tensors of a given number of elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        is_new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known
        self.count += is_new and out.numel() == self.numel
        return out


def test_making_an_sae_copies_each_matrix_once_and_draws_nothing(sae):
    before = torch.get_rng_state()
    with Sizes(40 * 12) as sizes:
        made = make_sae(sae.W_enc, sae.b_enc, sae.W_dec, sae.mean, sae.scale, 5)
    assert sizes.count == 2 and made.W_dec.data_ptr() != sae.W_dec.data_ptr()
    made.overcomplete()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(12,), (3, 1), (3, 13), (2, 3, 12)])
def test_rows_of_another_shape_are_refused(sae, shape):
    with pytest.raises(InputError, match=r"\[N, 12\]"):
        sae.encode(torch.zeros(shape))


@pytest.mark.parametrize("change",
                         [lambda x: x.double(), lambda x: x.T.contiguous().T, lambda x: torch.stack([x, -x], 1)[:, 0]])
def test_precision_and_memory_layout_of_the_rows_do_not_matter(sae, x, change):
    for mine, theirs in zip(sae.encode(change(x)), sae.encode(x)):
        assert torch.equal(mine, theirs)


def test_codes_follow_the_formula(sae, x):
    pre = ((x - sae.mean) / sae.scale) @ sae.W_enc.T + sae.b_enc
    expected = pre.relu().topk(5, dim=1)
    values, indices = sae.encode(x)
    torch.testing.assert_close(values, expected.values, rtol=1e-5, atol=1e-5)
    assert (values >= 0).all() and values.shape == (300, 5)
    assert ((values > 0).sum(1) <= 5).all()


def test_fewer_than_k_fire_where_fewer_are_positive():
    sae = make_sae(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), 1.0, 2)
    values, _ = sae.encode(torch.tensor([[-1.0, -1.0, 3.0], [-1.0, -1.0, -1.0]]))
    assert values.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    xhat = sae.decode(*sae.encode(torch.tensor([[-1.0, -1.0, 3.0]])))
    assert xhat.tolist() == [[0.0, 0.0, 3.0]]


def test_batch_size_does_not_change_codes(sae, x):
    whole = sae.encode(x)
    parts = [sae.encode(part) for part in x.split(7)]
    torch.testing.assert_close(whole[0], torch.cat([p[0] for p in parts]))
    assert sae.encode(x[:0])[0].shape == (0, 5)


def test_the_dictionary_has_unit_rows_whatever_it_was_made_from(x):
    sae = make_sae(torch.randn(40, 12), torch.zeros(40), 3 * torch.randn(40, 12), torch.zeros(12), 1.0, 5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-5)


def test_reload_gives_the_same_codes_and_hash(sae, x, tmp_path):
    sae.config["hook"] = "h"
    path = tmp_path / "topk_sae.pt"
    save_sae(sae, path, x)
    again = load_sae(path)
    for mine, theirs in zip(sae.encode(x), again.encode(x)):
        assert torch.equal(mine, theirs)
    assert sae_hash(sae) == sae_hash(again) and again.config["hook"] == "h"
    assert (again.top_k, again.scale, again.n_latents) == (5, 7.0, 40)
    content = torch.load(path, weights_only=True)
    assert set(content["state"]) == {"W_enc", "b_enc", "W_dec", "mean", "scale"}


def test_the_hash_is_that_of_the_file_for_any_scale(x, tmp_path):
    sae = random_sae(scale=0.1)  # no float32 number
    save_sae(sae, tmp_path / "topk_sae.pt", x)
    told = json.loads((tmp_path / "topk_sae.json").read_text())["sae_hash"]
    assert told == sae_hash(sae) == sae_hash(load_sae(tmp_path / "topk_sae.pt"))


def test_saving_twice_gives_the_same_bytes(sae, x, tmp_path):
    for name in ("a.pt", "b.pt"):
        save_sae(sae, tmp_path / name, x)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def edit_file(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("n_inputs, n_latents, offset", [(12, 40, 20.0), (768, 1000, 0.1), (64, 8, 1e4)])
def test_codes_summed_in_another_order_load_and_pass(tmp_path, n_inputs, n_latents, offset):
    """What a GPU, another processor or another number of threads would have stored."""
    sae, path = random_sae(n_inputs, n_latents, offset=offset), tmp_path / "topk_sae.pt"
    x = sae.mean + sae.scale * torch.randn(64, n_inputs, generator=torch.Generator().manual_seed(2))
    save_sae(sae, path, x)
    order = torch.randperm(n_inputs, generator=torch.Generator().manual_seed(3))
    scaled = ((x - sae.mean) / sae.scale)[:, order]
    for pre in (scaled @ sae.W_enc[:, order].T + sae.b_enc,
                (scaled.double() @ sae.W_enc[:, order].double().T + sae.b_enc).float()):
        values, indices = pre.relu().topk(5, dim=1)
        probe = {"x": x, "values": values, "indices": indices}
        assert not torch.equal(values, sae.encode(x)[0])
        assert 0 < reload_error(sae, probe) < 1 and check("reload", reload_error(sae, probe))["verdict"] == "PASS"
        edit_file(path, lambda content, probe=probe: content.update(probe=probe))
        load_sae(path)


def test_latents_that_tie_may_take_each_others_place():
    sae = random_sae()
    sae.W_enc[1], sae.b_enc[1] = sae.W_enc[0], sae.b_enc[0] + 1e-8
    sae.W_enc[:2] *= 3  # among the largest of many rows, and one of the two the least that fires in some
    x = sae.mean + sae.scale * torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    values, indices = sae.encode(x)
    swapped = torch.where(indices == 0, 1, torch.where(indices == 1, 0, indices))
    assert not torch.equal(swapped, indices) and reload_error(sae, {"x": x, "values": values, "indices": swapped}) < 1


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "W_dec", "mean", "scale", "top_k"])
def test_altered_weights_are_noticed(sae, x, tmp_path, part):
    path = tmp_path / "topk_sae.pt"
    save_sae(sae, path, x)

    def alter(content):
        if part == "top_k":
            content["config"]["top_k"] = 6
        else:
            content["state"][part].view(-1)[0] += 1e-3

    edit_file(path, alter)
    with pytest.raises(InputError, match="altered"):
        load_sae(path)


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "mean", "scale", "threshold"])
def test_codes_tell_altered_weights_that_the_hash_does_not(sae, x, part):
    """The check of notebook 03: one number of what each row's largest code is made of, changed by 1e-3."""
    threshold = torch.full((40,), 0.5)
    sae = make_sae(sae.W_enc, sae.b_enc, sae.W_dec, sae.mean, sae.scale, 20, threshold=threshold)
    values, indices = sae.encode(x[:64])
    probe = {"x": x[:64], "values": values, "indices": indices}
    assert reload_error(sae, probe) == 0
    latent = int(indices[0, 0])
    if part == "scale":
        sae.scale *= 1.001
    elif part == "threshold":
        sae.threshold[latent] = values[indices == latent].max() + 1e-3
    else:
        getattr(sae, part)[latent if part != "mean" else 0] += 1e-3
    assert check("reload", reload_error(sae, probe))["verdict"] == "FAIL"
    assert reload_error(sae, probe | {"values": values[:, :4]}) == float("inf")
    assert reload_error(sae, {"x": x[:64], "values": values[:, :4], "indices": indices[:, :4]}) > 1


def test_missing_damaged_and_foreign_files_are_named(sae, x, tmp_path):
    path = tmp_path / "topk_sae.pt"
    with pytest.raises(InputError, match="run 02_train_sae.py first"):
        load_sae(path)
    save_sae(sae, path, x)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged"):
        load_sae(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="schema"):
        load_sae(path)


@pytest.mark.parametrize("k", [0, 41])
def test_k_beyond_the_latents_is_refused(k):
    with pytest.raises(InputError, match=f"TOP_K={k}"):
        random_sae(top_k=k)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(InputError, match="shapes disagree"):
        make_sae(torch.zeros(4, 3), torch.zeros(5), torch.zeros(4, 3), torch.zeros(3), 1.0, 2)


def test_an_sae_of_other_activations_is_refused(sae):
    class OtherRun:
        run_id = "r2"

        def digest(self, hook):
            return "other"

    sae.config.update(data_digest="mine", run_id="r1", hook="h")
    with pytest.raises(InputError, match="trained on run r1 at h, not on r2"):
        require_trained_on(sae, OtherRun(), "h")
