"""Other tools' files: folded exactly, read back, and opened by the tools themselves where they are installed."""
import json
import subprocess
import textwrap
import zipfile

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file, save_file
from torch.nn import functional

from exchange.facts import transformer_lens_name
from exchange.formats import FORMATS, write_foreign
from lib.environment import InputError
from lib.exchange.folded import Folded, fold, unfold
from lib.exchange.formats import READERS
from lib.exchange.formats import read_foreign as read_any
from lib.sae import make_sae

PEERS = PROJECT / ".venv-peers" / "bin" / "python"
ABOUT = {
    "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "hf_module_path": "h.3", "context_size": 128,
    "dataset_path": "stories", "prepend_bos": True, "seed": 0, "lr": 1e-3, "steps": 10,
}


def raw(n=200, width=16):
    """Raw activations with a large offset and scale."""
    return 20 * torch.linspace(-1, 1, width) + 7 * torch.randn(n, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = torch.randn(2, 64, 16, generator=generator)
    x = raw()
    return make_sae(W_enc, torch.randn(64, generator=generator) / 5, functional.normalize(W_dec, dim=1), x.mean(0), 7.3,
                    4)


@pytest.fixture
def jumping(sae):
    """The same with a threshold for each latent in place of k; rows have up to 64 codes."""
    threshold = torch.rand(64, generator=torch.Generator().manual_seed(2))
    return make_sae(sae.W_enc, sae.b_enc, sae.W_dec, sae.mean, sae.scale, 64, threshold=threshold)


def read_foreign(folder):
    """(format, SAE) of the files in the folder."""
    return read_any(folder)[:2]


def dense(values, indices, n_latents=64):
    return torch.zeros(len(values), n_latents).scatter_add_(1, indices, values)


def theirs(sae, x):
    """Codes and reconstruction by the formula that the other tools compute."""
    pre = torch.relu((x - sae.b_dec) @ sae.W.T + sae.b)
    top = pre.topk(sae.top_k, dim=1)
    codes = dense(top.values, top.indices, len(sae.b))
    return codes, codes @ sae.W_dec + sae.b_dec


def test_folding_keeps_support_codes_and_reconstruction(sae):
    x = raw()
    values, indices = sae.encode(x)
    codes, xhat = theirs(fold(sae), x)
    torch.testing.assert_close(codes, sae.scale * dense(values, indices), rtol=1e-5, atol=1e-4)
    assert torch.equal(codes > 0, dense(values, indices) > 0)
    torch.testing.assert_close(xhat, sae.decode(values, indices), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 7.3])
def test_every_format_comes_back(sae, tmp_path, name, scale):
    FORMATS[name].write(tmp_path, fold(sae), ABOUT)
    found, folded = read_foreign(tmp_path)
    assert found == name and all(torch.equal(a, b) for a, b in zip(folded[:4], fold(sae)[:4]))
    back, x = unfold(folded, scale), raw()
    assert (back.top_k, back.n_latents) == (4, 64)
    torch.testing.assert_close(back.decode(*back.encode(x)), sae.decode(*sae.encode(x)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dense(*back.encode(x)) * scale, dense(*sae.encode(x)) * sae.scale, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["sae_lens", "dictionary_learning"])
def test_thresholds_go_to_others_and_come_back(jumping, tmp_path, name):
    write_foreign(name, tmp_path, fold(jumping), ABOUT)
    back, x = unfold(read_foreign(tmp_path)[1], 3.0), raw()
    assert back.top_k == 64 and read_any(tmp_path).facts["kind"] == "jumprelu"
    torch.testing.assert_close(dense(*back.encode(x)) * 3, dense(*jumping.encode(x)) * 7.3, rtol=1e-5, atol=1e-3)


def test_sparsify_has_no_thresholds(jumping, tmp_path):
    with pytest.raises(InputError, match="set FORMAT to sae_lens or dictionary_learning"):
        write_foreign("sparsify", tmp_path, fold(jumping), ABOUT)


@pytest.mark.parametrize(
    "path, point, name",
    [
        ("model.layers.8", "output", "blocks.8.hook_resid_post"),
        ("transformer.h.0", "input", "blocks.0.hook_resid_pre"),
        ("gpt_neox.layers.2.attention", "output", "blocks.2.hook_attn_out"),
        ("model.layers.3.mlp", "output", "blocks.3.hook_mlp_out"),
        ("transformer.h.5.ln_2", "input", "blocks.5.hook_resid_mid"),
        ("model.layers.1.post_attention_layernorm", "input", "blocks.1.hook_resid_mid"),
        ("model.layers.1.post_attention_layernorm", "output", "model.layers.1.post_attention_layernorm"),
        ("model.layers.1.mlp.up_proj", "input", "model.layers.1.mlp.up_proj:input"),
        ("model.norm", "output", "model.norm"),
    ],
)
def test_names_of_hook_points(path, point, name):
    assert transformer_lens_name(path, point) == name


def rewrite(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def test_sae_lens_variants_of_the_same_sae(sae, tmp_path):
    """Free decoder norms with scaled ranking; an encoder that does not subtract b_dec; no version; half precision."""
    x, expected = raw(), theirs(fold(sae), raw())
    FORMATS["sae_lens"].write(tmp_path, fold(sae), ABOUT)
    file = tmp_path / "sae_weights.safetensors"
    plain = load_file(file)
    norms = torch.rand(64) + 0.5
    save_file(plain | {"W_enc": (plain["W_enc"] / norms).contiguous(), "b_enc": plain["b_enc"] / norms,
                       "W_dec": plain["W_dec"] * norms[:, None]}, file)
    with pytest.raises(InputError, match="can't be made unit"):
        read_foreign(tmp_path)
    rewrite(tmp_path / "cfg.json", rescale_acts_by_decoder_norm=True, metadata={})
    for a, b in zip(theirs(read_foreign(tmp_path)[1], x), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    save_file(plain | {"b_enc": plain["b_enc"] - plain["b_dec"] @ plain["W_enc"]}, file)
    rewrite(tmp_path / "cfg.json", rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False)
    for a, b in zip(theirs(read_foreign(tmp_path)[1], x), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    save_file({name: tensor.bfloat16() for name, tensor in plain.items()}, file)
    rewrite(tmp_path / "cfg.json", dtype="bfloat16", apply_b_dec_to_input=True)
    codes = theirs(read_foreign(tmp_path)[1], x)[0]
    assert functional.cosine_similarity(codes, expected[0]).mean() > 0.98


def test_a_sparsify_file_may_not_know_its_number_of_latents(sae, tmp_path):
    FORMATS["sparsify"].write(tmp_path, fold(sae), ABOUT)
    rewrite(tmp_path / "cfg.json", num_latents=0)
    assert len(read_foreign(tmp_path)[1].b) == 64


@pytest.mark.parametrize(
    "name, changes, message",
    [
        *(("sae_lens", {"architecture": name}, f"architecture must be 'standard' or .*, not '{name}'")
          for name in ("transcoder", "skip_transcoder", "temporal", "matching_pursuit", "abstopk")),
        ("sae_lens", {"normalize_activations": "layer_norm"}, "normalize_activations"),
        ("sparsify", {"transcode": True}, "transcode must be False, not True"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("dictionary_learning", {"trainer": {"dict_class": "CrossCoder"}}, "CrossCoder"),
    ],
)
def test_what_ours_cannot_be_is_refused(sae, tmp_path, name, changes, message):
    FORMATS[name].write(tmp_path, fold(sae), ABOUT)
    rewrite(tmp_path / ("config.json" if name == "dictionary_learning" else "cfg.json"), **changes)
    with pytest.raises(InputError, match=message):
        read_foreign(tmp_path)


def test_damaged_files_are_named(sae, tmp_path):
    with pytest.raises(InputError, match="holds none of"):
        read_foreign(tmp_path)
    folded = fold(sae)
    for name, known in FORMATS.items():
        folder = tmp_path / name
        known.write(folder, folded, ABOUT)
        (folder / READERS[name].files[0]).write_bytes(b"nothing")
        with pytest.raises(InputError, match=READERS[name].files[0]):
            read_foreign(folder)
    FORMATS["sparsify"].write(tmp_path / "b", folded._replace(b_dec=torch.full((16,), float("nan"))), ABOUT)
    with pytest.raises(InputError, match="not finite"):
        read_foreign(tmp_path / "b")
    save_file({"W_dec": folded.W_dec}, tmp_path / "sparsify" / "sae.safetensors")
    with pytest.raises(InputError, match="encoder.weight must be a tensor"):
        read_foreign(tmp_path / "sparsify")


THEIR_SIDE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
x, found = load_file(folder / "x.safetensors")["x"], {}

def dense(top, n):
    return torch.zeros(len(x), n).scatter_add_(1, top.top_indices, top.top_acts)

from dictionary_learning.utils import load_dictionary
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sparsify import Sae, SaeConfig

def keep(name, codes, xhat):
    found[name + ".codes"], found[name + ".xhat"] = codes.detach().contiguous(), xhat.detach().contiguous()

@torch.no_grad()
def judge(name, which, path):
    if which == "sae_lens":
        sae = SAE.load_from_disk(path)
        codes = sae.encode(x)
        keep(name, codes, sae.decode(codes))
    elif which == "dictionary_learning":
        sae, _ = load_dictionary(str(path), "cpu")
        codes = sae.encode(x)
        keep(name, codes, sae.decode(codes))
    else:
        sae = Sae.load_from_disk(path)
        top = sae.encode(x)
        keep(name, dense(top, sae.num_latents), sae.decode(top.top_acts, top.top_indices))

torch.manual_seed(0)
native = folder / "native"
# Native files with weights as after training: every parameter away from its start.
trained = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4))
with torch.no_grad():
    for parameter in trained.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    trained.b_dec.copy_(x.mean(0))
trained.save_inference_model(str(native / "sae_lens"))
other = AutoEncoderTopK(16, 64, 4)
with torch.no_grad():
    other.encoder.weight.add_(0.1 * torch.randn(64, 16))
    other.encoder.bias.add_(0.1 * torch.randn(64))
    other.b_dec.copy_(x.mean(0))
(native / "dictionary_learning").mkdir()
torch.save(other.state_dict(), native / "dictionary_learning" / "ae.pt")
import json
config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": 4, "activation_dim": 16, "dict_size": 64}}
(native / "dictionary_learning" / "config.json").write_text(json.dumps(config))
third = Sae(16, SaeConfig(expansion_factor=4, k=4))
with torch.no_grad():
    third.encoder.weight.add_(0.1 * torch.randn(64, 16))
    third.encoder.bias.add_(0.1 * torch.randn(64))
    third.b_dec.copy_(x.mean(0))
third.save_to_disk(native / "sparsify")
for which in ("sae_lens", "dictionary_learning", "sparsify"):
    judge("ours." + which, which, folder / which)
    judge("native." + which, which, native / which)
for which in ("sae_lens", "dictionary_learning"):
    judge("ours.jumping." + which, which, folder / "jumping" / which)
save_file(found, folder / "found.safetensors")
"""


@pytest.mark.skipif(not PEERS.exists(), reason="the other libraries are not installed: make peers")
def test_the_tools_themselves_open_ours_and_we_open_theirs(sae, jumping, tmp_path):
    """Same codes, same reconstruction, both ways, with the real packages."""
    x = raw()
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name, known in FORMATS.items():
        known.write(tmp_path / name, fold(sae), ABOUT)
    for name in ("sae_lens", "dictionary_learning"):
        FORMATS[name].write(tmp_path / "jumping" / name, fold(jumping), ABOUT)
    (tmp_path / "side.py").write_text(textwrap.dedent(THEIR_SIDE))
    done = subprocess.run([str(PEERS), str(tmp_path / "side.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    codes, xhat = sae.scale * dense(*sae.encode(x)), sae.decode(*sae.encode(x))
    for name in ("sae_lens", "dictionary_learning"):
        assert torch.allclose(jumping.scale * dense(*jumping.encode(x)), found[f"ours.jumping.{name}.codes"], rtol=1e-5,
                              atol=1e-3)
    for name in FORMATS:
        for mine, other in ((codes, found[f"ours.{name}.codes"]), (xhat, found[f"ours.{name}.xhat"])):
            torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5 * float(mine.abs().max()),
                                       msg=lambda text, name=name: f"{name}: {text}")
        kind, folded = read_foreign(tmp_path / "native" / name)
        back = unfold(folded, 5.0)
        assert kind == name
        for mine, other in ((5 * dense(*back.encode(x)), found[f"native.{name}.codes"]),
                            (back.decode(*back.encode(x)), found[f"native.{name}.xhat"])):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()),
                                       msg=lambda text, name=name: f"native {name}: {text}")


def test_shapes_that_disagree_are_refused(tmp_path):
    wrong = Folded(torch.zeros(8, 4), torch.zeros(8), functional.normalize(torch.ones(6, 4), dim=1), torch.zeros(4), 2)
    FORMATS["sparsify"].write(tmp_path, wrong, ABOUT)
    with pytest.raises(InputError, match="encoder.weight must be .* with F=6"):
        read_foreign(tmp_path)


def respell(folder, name, change):
    """The SAE's configuration with one change, in the place where its format has it."""
    path = folder / ("config.json" if name == "dictionary_learning" else "cfg.json")
    config = json.loads(path.read_text())
    inner = config["trainer"] if name == "dictionary_learning" else config
    path.write_text(json.dumps(change(config, inner) or config))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [0, -1, 65, 4.0, 10**30, True, "4", None, [4], {}, float("inf")])
def test_a_k_that_is_none_is_one_line(sae, tmp_path, name, k):
    FORMATS[name].write(tmp_path, fold(sae), ABOUT)
    if name == "dictionary_learning":  # whose weights tell k first
        state = torch.load(tmp_path / "ae.pt")
        state["k"] = k
        torch.save(state, tmp_path / "ae.pt")
    respell(tmp_path, name, lambda _, inner: inner.update(k=k))
    with pytest.raises(InputError, match="k must be a whole number from 1 to 64|is damaged") as error:
        read_foreign(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("change", "message"), [
    (lambda config, inner: [1], "must be a dict"), (lambda config, inner: "x", "must be a dict"),
    (lambda config, inner: inner.update(d_in=3, activation_dim=3), "must be 16 or null, not 3"),
    (lambda config, inner: inner.update(d_sae="many", dict_size="many", num_latents="many"),
     "must be 64 or (0 or )?null, not 'many'"),
])
def test_configurations_of_other_shapes_are_one_line(sae, tmp_path, name, change, message):
    FORMATS[name].write(tmp_path, fold(sae), ABOUT)
    respell(tmp_path, name, change)
    with pytest.raises(InputError, match=message):
        read_foreign(tmp_path)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("sae_lens", {"apply_b_dec_to_input": "yes"}, "must be true or false"),
    ("sae_lens", {"rescale_acts_by_decoder_norm": 1}, "must be true or false"),
    ("sae_lens", {"architecture": {"a": [1] * 500}}, "architecture must be"),
    ("sae_lens", {"architecture": "jumprelu", "metadata": 3}, "metadata must be a dict or null"),
    ("sae_lens", {"architecture": "jumprelu", "metadata": {}}, "threshold must be a tensor"),
    ("sparsify", {"signed": True}, "signed must be False"),
    ("dictionary_learning", {"trainer": []}, "trainer must be a dict"),
    ("sae_lens", {"reshape_activations": "hook_z"}, "reshape_activations must be 'none', not 'hook_z'"),
    ("sae_lens", {"normalize_activations": "constant_norm_rescale"}, "not 'constant_norm_rescale'"),
    ("sae_lens", {"normalize_activations": "covariance_whitening"}, "not 'covariance_whitening'"),
    ("sae_lens", {"activation_fn_str": "tanh-relu"}, "activation_fn must be 'topk' or null, not 'tanh-relu'"),
])
def test_values_that_ours_cannot_be_are_one_line(sae, tmp_path, name, changes, message):
    FORMATS[name].write(tmp_path, fold(sae), ABOUT)
    rewrite(tmp_path / ("config.json" if name == "dictionary_learning" else "cfg.json"), **changes)
    with pytest.raises(InputError, match=message) as error:
        read_foreign(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


TENSORS = {
    "a number": lambda x: torch.tensor(1.0), "no rows": lambda x: x[:0], "another dimension": lambda x: x[None],
    "whole numbers": lambda x: x.int(), "complex numbers": lambda x: x.to(torch.complex64),
    "half of it": lambda x: x[: len(x) // 2].clone(), "infinite": lambda x: x.clone().fill_(torch.inf),
    "beyond float32": lambda x: x.double() * 1e60,
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_other_shapes_and_kinds_are_one_line(jumping, sae, tmp_path, name, what):
    FORMATS[name].write(tmp_path, fold(jumping if name == "sae_lens" else sae), ABOUT)
    path = tmp_path / READERS[name].files[0]
    load, save = (torch.load, torch.save) if name == "dictionary_learning" else (load_file, save_file)
    whole = load(path)
    for key in [key for key in whole if key not in ("k",) and (key, name) != ("threshold", "dictionary_learning")]:
        save(whole | {key: TENSORS[what](whole[key]).contiguous()}, path)
        with pytest.raises(InputError) as error:
            read_foreign(tmp_path)
        assert "\n" not in str(error.value), key


def test_archives_that_claim_or_unpack_to_more_than_they_are(sae, tmp_path):
    FORMATS["dictionary_learning"].write(tmp_path, fold(sae), ABOUT)
    path, state = tmp_path / "ae.pt", torch.load(tmp_path / "ae.pt")
    torch.save(state | {"encoder.weight": torch.zeros(1).expand(64, 16)}, path)
    with pytest.raises(InputError, match="encoder.weight must be a tensor"):
        read_foreign(tmp_path)
    torch.save(state, path)
    entries = {entry: zipfile.ZipFile(path).read(entry) for entry in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    with pytest.raises(InputError, match="it is compressed"):
        read_foreign(tmp_path)


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("old_format", [True, False])
def test_nothing_is_unpickled(sae, tmp_path, old_format):
    FORMATS["dictionary_learning"].write(tmp_path, fold(sae), ABOUT)
    torch.save({"k": Harm(tmp_path / "harm")}, tmp_path / "ae.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(InputError, match="is damaged") as error:
        read_foreign(tmp_path)
    assert not (tmp_path / "harm").exists() and "\n" not in str(error.value)
