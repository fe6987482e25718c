"""Every published kind of SAE: its codes by the publisher's own formula, on small files written here and, where the
packages are installed, by the packages.
"""
import json
import math
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exchange import PEERS

from lib.batches import rows_of_tensor
from lib.environment import InputError
from lib.exchange import open_foreign
from lib.exchange.folded import unfold
from lib.exchange.formats import read_foreign
from lib.exchange.places import hub_name, same_model, signature_of
from lib.exchange.rows import fitted
from lib.sae import load_sae, reload_error, sae_hash, save_sae

D, F = 16, 64


def raw(n=300):
    """Raw activations with an offset."""
    return 2 * torch.linspace(-1, 1, D) + torch.randn(n, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def parts():
    """Weights of any kind, as after training: nothing at its start, decoder rows of free norms."""
    g = torch.Generator().manual_seed(3)
    return {
        "W_enc": torch.randn(D, F, generator=g) / 4, "b_enc": torch.randn(F, generator=g) / 4,
        "W_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g),
        "threshold": torch.rand(F, generator=g), "b_gate": torch.randn(F, generator=g) / 2,
        "b_mag": torch.randn(F, generator=g) / 2, "r_mag": torch.randn(F, generator=g) / 4,
    }


def of(parts, *names):
    return {name: parts[name].contiguous() for name in names}


def dense(sae, x):
    """All codes [N, F] of an SAE, in raw units."""
    values, indices = sae.encode(x)
    return sae.scale * torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)


def write_sae_lens(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "dtype": "float32"} | config))
    return folder


def agrees(folder, x, codes, xhat, where=None, scale=1.0):
    """Whether the SAE in the folder gives these codes, times its decoder rows' norms, and this reconstruction."""
    sae = unfold(read_foreign(folder, where).sae, scale)
    torch.testing.assert_close(dense(sae, x), codes, rtol=1e-5, atol=1e-5 * float(codes.abs().max()))
    torch.testing.assert_close(sae.decode(*sae.encode(x)), xhat, rtol=1e-5, atol=1e-5 * float(xhat.abs().max()))
    return sae


BASE = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.mark.parametrize("scale", [1.0, 7.3])
@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_sae_lens_kinds_by_their_formulas(parts, tmp_path, kind, centres, scale):
    p, x = parts, raw()
    u = (x - p["b_dec"] * centres) @ p["W_enc"]
    if kind == "gated":
        codes = (u + p["b_gate"] > 0) * torch.relu(u * p["r_mag"].exp() + p["b_mag"])
        tensors = of(p, "W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    else:
        codes = torch.relu(u + p["b_enc"])
        if kind == "jumprelu":
            codes = codes * (u + p["b_enc"] > p["threshold"] - 0.2)
            p["threshold"] -= 0.2  # some below 0, which change nothing
        tensors = of(p, *BASE, *(["threshold"] if kind == "jumprelu" else []))
    write_sae_lens(tmp_path, tensors, architecture=kind, apply_b_dec_to_input=centres)
    norms = p["W_dec"].norm(dim=1)
    sae = agrees(tmp_path, x, codes * norms, codes @ p["W_dec"] + p["b_dec"], scale=scale)
    assert read_foreign(tmp_path).facts == {"kind": kind}
    assert sae.encode(x)[0].shape[1] == int((codes > 0).sum(1).max()), "as many columns as the fullest row needs"
    save_sae(sae, tmp_path / "ours.pt", x)
    again = load_sae(tmp_path / "ours.pt")
    assert sae_hash(again) == sae_hash(sae) and torch.equal(dense(again, x), dense(sae, x))


def test_codes_are_complete_whatever_batch_they_come_in(parts, tmp_path):
    """One row of which every latent fires beside rows with few, more rows than are encoded at once, and none."""
    p = parts | {"b_enc": torch.full((F,), -2.0), "W_enc": parts["W_enc"].abs()}
    sae = unfold(read_foreign(write_sae_lens(tmp_path, of(p, *BASE), architecture="standard")).sae, 2.0)
    x = torch.cat([raw(5000), torch.full((1, D), 1e3)])
    whole = sae.encode(x)
    one_by_one = torch.cat([dense(sae, row[None]) for row in x[-50:]])
    torch.testing.assert_close(dense(sae, x)[-50:], one_by_one, rtol=1e-4, atol=1e-4)
    pre = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    assert ((whole[0] > 0).sum(1) - (pre > 0).sum(1)).abs().max() <= 1, "but for one at a rounding of 0"
    assert int((whole[0] > 0).sum(1).max()) == whole[0].shape[1] == F
    assert float((pre > 0).sum(1).float().mean()) < F / 2
    values, indices = sae.encode(x[:0])
    assert values.shape == indices.shape == (0, 1)


def test_a_gate_and_its_magnitude_in_closed_form(tmp_path):
    """One input u: the gate opens above u = 1, the magnitude is 2 u + 0.5."""
    tensors = {"W_enc": torch.ones(1, 1), "W_dec": torch.ones(1, 1), "b_dec": torch.zeros(1),
               "b_gate": torch.tensor([-1.0]), "r_mag": torch.tensor([math.log(2)]), "b_mag": torch.tensor([0.5])}
    write_sae_lens(tmp_path, tensors, architecture="gated", d_in=1, d_sae=1)
    sae = open_foreign(str(tmp_path))
    assert torch.allclose(dense(sae, torch.tensor([[0.5], [0.99], [1.01], [3.0]]))[:, 0],
                          torch.tensor([0, 0, 2.52, 6.5]))


def test_layouts_before_version_six(parts, tmp_path):
    """hook_point and no architecture; a model whose residual stream TransformerLens centres; a TopK activation."""
    p, x = parts, raw()
    old = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    centred = x - x.mean(1, keepdim=True)
    codes = torch.relu((centred - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    norms = p["W_dec"].norm(dim=1)
    agrees(write_sae_lens(tmp_path / "jb", of(p, *BASE), **old), x, codes * norms, codes @ p["W_dec"] + p["b_dec"])
    assert read_foreign(tmp_path / "jb").facts == {"kind": "standard", "model_name": "gpt2", "hook": "resid_pre:8",
                                                   "hook_name": "blocks.8.hook_resid_pre"}
    codes = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    for change in ({"model_name": "gemma-2b"}, {"model_from_pretrained_kwargs": {"center_writing_weights": False}}):
        folder = write_sae_lens(tmp_path / "plain", of(p, *BASE), **(old | change))
        agrees(folder, x, codes * norms, codes @ p["W_dec"] + p["b_dec"])
    unit = p["W_dec"] / norms[:, None]
    top = codes * (codes >= codes.topk(5, dim=1).values[:, -1:])
    folder = write_sae_lens(tmp_path / "topk", of(p, *BASE) | {"W_dec": unit}, activation_fn_str="topk",
                            activation_fn_kwargs={"k": 5}, architecture="standard")
    agrees(folder, x, top, top @ unit + p["b_dec"])


def test_a_mean_norm_is_estimated_on_stored_rows_or_refused(parts, tmp_path):
    p, x = parts, raw()
    for spelling in ("expected_average_only_in", True):
        write_sae_lens(tmp_path, of(p, *BASE), architecture="standard", normalize_activations=spelling)
        with pytest.raises(InputError, match="import_sae.py, which has activations"):
            open_foreign(str(tmp_path))
        rows = rows_of_tensor(x, torch.arange(len(x)) % 10 == 0)
        sae = fitted(read_foreign(tmp_path).sae, rows)
        s = math.sqrt(D) / float(x[~rows.is_val].norm(dim=1).mean())
        codes = torch.relu((s * x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        torch.testing.assert_close(dense(sae, x), codes * p["W_dec"].norm(dim=1) / s, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(*sae.encode(x)), (codes @ p["W_dec"] + p["b_dec"]) / s, rtol=1e-5,
                                   atol=1e-5)


def test_gemma_scope_by_its_formula(parts, tmp_path):
    p, x = parts, raw()
    np.savez(tmp_path / "params.npz", **{name: p[name].numpy() for name in (*BASE, "threshold")})
    pre = x @ p["W_enc"] + p["b_enc"]
    codes = torch.relu(pre) * (pre > p["threshold"])
    where = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    agrees(tmp_path, x, codes * p["W_dec"].norm(dim=1), codes @ p["W_dec"] + p["b_dec"], where)
    assert read_foreign(tmp_path, where).facts == {
        "kind": "jumprelu", "model_name": "google/gemma-2-2b", "hook_name": "blocks.20.hook_resid_post",
        "hook": "resid_post:20"}
    assert read_foreign(tmp_path, "a/b").facts == {"kind": "jumprelu"}
    for name, message in (("google/gemma-scope-9b-it-att/layer_2/width_16k", "outputs of attention heads"),
                          ("google/gemma-scope-2b-pt-transcoders/layer_20/width_16k/average_l0_11", "transcoder"),
                          ("google/gemma-scope-2b-pt-res/embedding/width_4k", "token embeddings")):
        with pytest.raises(InputError, match=message):
            read_foreign(tmp_path, name)
    assert read_foreign(tmp_path, "google/gemma-scope-9b-pt-mlp/layer_2/x").facts["hook"] == "mlp_out:2"
    (tmp_path / "3").mkdir()
    save_file({name.lower(): p[name].contiguous() for name in (*BASE, "threshold")},
              tmp_path / "3" / "params.safetensors")
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.7.output",
             "hf_hook_point_out": "model.layers.7.output"}
    (tmp_path / "3" / "config.json").write_text(json.dumps(about))
    agrees(tmp_path / "3", x, codes * p["W_dec"].norm(dim=1), codes @ p["W_dec"] + p["b_dec"])
    assert read_foreign(tmp_path / "3").facts | {"hook": "resid_post:7", "model_name": "google/gemma-3-1b-pt"} == \
        read_foreign(tmp_path / "3").facts
    (tmp_path / "3" / "config.json").write_text(json.dumps(about | {"hf_hook_point_out": "model.layers.7.mlp"}))
    with pytest.raises(InputError, match="transcoder"):
        read_foreign(tmp_path / "3")


def test_hostile_archives_of_arrays(parts, tmp_path):
    path = tmp_path / "params.npz"
    np.savez(path, W_enc=np.array([{}], dtype=object))
    for content in (path.read_bytes(), b"nothing", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_foreign(tmp_path)
        assert "\n" not in str(error.value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(10**7))
    with pytest.raises(InputError, match="unpacks to far more than its size"):
        read_foreign(tmp_path)


def write_llama_scope(folder, parts, **config):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = {"encoder.weight": parts["W_enc"].T, "encoder.bias": parts["b_enc"], "decoder.weight": parts["W_dec"].T,
               "decoder.bias": parts["b_dec"]}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()},
              folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps({
        "act_fn": "jumprelu", "d_model": D, "d_sae": F, "norm_activation": "dataset-wise", "jump_relu_threshold": 0.3,
        "hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "top_k": 5} | config))
    return folder


def test_llama_scope_by_its_formula(parts, tmp_path):
    """Input scaled to a mean norm of sqrt(D); the threshold holds for raw codes."""
    p, x = parts | {"W_dec": torch.nn.functional.normalize(parts["W_dec"], dim=1)}, raw()
    s = math.sqrt(D) / 5
    pre = s * x @ p["W_enc"] + p["b_enc"]
    codes = torch.relu(pre) * (pre > 0.3 * s)
    folder = write_llama_scope(tmp_path / "Llama3_1-8B-Base-L8R-8x", p)
    agrees(folder, x, codes / s, (codes @ p["W_dec"] + p["b_dec"]) / s)
    assert read_foreign(folder).facts == {"kind": "jumprelu", "hook_name": "blocks.8.hook_resid_post",
                                          "hook": "resid_post:8", "model_name": "meta-llama/Llama-3.1-8B"}
    pre = x @ p["W_enc"] + p["b_enc"]
    codes = torch.relu(pre) * (pre >= pre.topk(5, dim=1).values[:, -1:])
    plain = {"act_fn": "topk", "jump_relu_threshold": 0.0, "norm_activation": "inference"}
    folder = write_llama_scope(tmp_path / "topk", p, **plain)
    agrees(folder, x, codes, codes @ p["W_dec"] + p["b_dec"])
    for change, message in (({"norm_activation": "token-wise"}, "not 'token-wise'"), ({"act_fn": "relu"}, "'relu'"),
                            ({"use_glu_encoder": True}, "use_glu_encoder"),
                            ({"hook_point_out": "blocks.8.hook_mlp_out"}, "it is a transcoder"),
                            ({"dataset_average_activation_norm": {"in": 5.0, "out": 9.0}}, "transcoder")):
        with pytest.raises(InputError, match=message):
            read_foreign(write_llama_scope(tmp_path / "bad", p, **change))


@pytest.mark.parametrize("change", [{"hook_point_in": "a\nb"}, {"model_name": "a\n" * 200}, {"model_name": ""},
                                    {"hook_point_out": "a\nb"}])
def test_names_of_several_lines_are_one(parts, tmp_path, change):
    whole = {"hook_point_out": None} | change
    try:
        facts = read_foreign(write_llama_scope(tmp_path, parts, **whole)).facts
        assert "" not in facts.values()
    except InputError as error:
        assert "\n" not in str(error)


HARMS = {"no rows": lambda x: x[:0], "another dimension": lambda x: x[None], "whole numbers": lambda x: x.int(),
         "infinite": lambda x: x * torch.inf, "half": lambda x: x[: len(x) // 2].clone()}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_weights_of_the_newer_formats_are_one_line(parts, tmp_path, harm):
    llama = write_llama_scope(tmp_path / "llama", parts) / "checkpoints" / "final.safetensors"
    whole = load_file(llama)
    for name in whole:
        save_file(whole | {name: HARMS[harm](whole[name]).contiguous()}, llama)
        with pytest.raises(InputError) as error:
            read_foreign(tmp_path / "llama")
        assert "\n" not in str(error.value)
    for name in (*BASE, "threshold"):
        arrays = {key: parts[key] for key in (*BASE, "threshold")} | {name: HARMS[harm](parts[name])}
        np.savez(tmp_path / "params.npz", **{key: value.numpy() for key, value in arrays.items()})
        with pytest.raises(InputError) as error:
            read_foreign(tmp_path)
        assert "\n" not in str(error.value)


def test_latents_whose_decoder_row_is_nothing_never_fire(parts, tmp_path):
    p, x = parts, raw()
    p["W_dec"][[3, 7]] = 0
    codes = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    write_sae_lens(tmp_path, of(p, *BASE), architecture="standard")
    sae = agrees(tmp_path, x, codes * p["W_dec"].norm(dim=1), codes @ p["W_dec"] + p["b_dec"])
    save_sae(sae, tmp_path / "ours.pt", x)
    assert sae_hash(load_sae(tmp_path / "ours.pt")) == sae_hash(sae) and not (dense(sae, x)[:, [3, 7]] > 0).any()


def test_a_scaling_factor_of_its_own_is_refused(parts, tmp_path):
    for factor, refused in ((1.0, False), (1.1, True)):
        write_sae_lens(tmp_path, of(parts, *BASE) | {"scaling_factor": torch.full((F,), factor)})
        if refused:
            with pytest.raises(InputError, match="finetuning_scaling_factor"):
                read_foreign(tmp_path)
        else:
            read_foreign(tmp_path)


def test_several_saes_are_named(parts, tmp_path):
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post"):
        write_sae_lens(tmp_path / name, of(parts, *BASE))
    with pytest.raises(InputError, match="holds several SAEs; set SUBFOLDER to the folder of one, like blocks.1.hook"):
        open_foreign(str(tmp_path))
    sae = open_foreign(str(tmp_path), "blocks.1.hook_resid_post")
    assert sae.config["imported"] == {"format": "sae_lens", "source": str(tmp_path), "kind": "standard",
                                      "subfolder": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize(("name", "signature"), [
    ("blocks.8.hook_resid_pre", "resid_pre:8"), ("blocks.0.hook_mlp_out", "mlp_out:0"),
    ("blocks.3.hook_attn_out", "attn_out:3"), ("resid_post_layer_8", "resid_post:8"), ("layers.12", "resid_post:12"),
    ("h.3", "resid_post:3"),
    ("model.layers.10.output", "resid_post:10"), ("model.language_model.layers.9.output", "resid_post:9"),
    ("model.layers.17.post_feedforward_layernorm.output", "mlp_out:17"),
    ("model.layers.11.self_attn.o_proj.input", "model.layers.11.self_attn.o_proj:input"),
    ("model.layers.8.mlp", "model.layers.8.mlp"), ("resid_post:2", "resid_post:2"),
])
def test_places_have_our_names(name, signature):
    assert signature_of(name) == signature


@pytest.mark.parametrize("name", ["blocks.8.attn.hook_z", "blocks.2.ln2.hook_normalized", "hook_embed"])
def test_places_without_a_name_are_refused(name):
    with pytest.raises(InputError, match=f"belongs at {name}"):
        signature_of(name)


def test_names_of_models():
    assert [hub_name(name) for name in ("gpt2-small", "pythia-70m-deduped", "gemma-2b", "user/model")] == [
        "gpt2", "EleutherAI/pythia-70m-deduped", "google/gemma-2b", "user/model"]
    assert same_model("gpt2-small", "gpt2") and same_model("meta-llama/Llama-3.1-8B", "/models/Llama-3.1-8B")
    assert not same_model("gpt2", "gpt2-medium")


THEIR_SIDE = '''
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
x, found = load_file(folder / "x.safetensors")["x"], {}
D, F, K = 16, 64, 5
torch.manual_seed(0)

import sae_lens as sl
from dictionary_learning import dictionary as dl
from dictionary_learning.utils import load_dictionary
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sparsify import Sae, SaeConfig

def train(module):
    """As after training: nothing at its start; thresholds that cut."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "threshold" in name:
                parameter.copy_(torch.rand_like(parameter) / 2)
        for name, buffer in module.named_buffers():
            if "threshold" in name:
                buffer.fill_(0.3)
    return module

@torch.no_grad()
def keep(name, codes, xhat, W_dec):
    found[name + ".codes"] = (codes * W_dec.norm(dim=1)).contiguous()
    found[name + ".xhat"] = xhat.contiguous()

@torch.no_grad()
def lens(name, training, finished=True):
    path = folder / name
    save = training.save_inference_model if finished else training.save_model
    save(str(path))
    sae = sl.SAE.load_from_disk(str(path), device="cpu")
    codes = sae.encode(x)
    scaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)  # then encode() gives codes times their norms
    keep(name, codes, sae.decode(codes), sae.W_dec.new_ones(F, 1) if scaled else sae.W_dec)

for name in ("Standard", "Gated", "TopK", "BatchTopK", "JumpReLU", "MatryoshkaBatchTopK"):
    for centres in (True, False):
        own = {"k": K} if "TopK" in name else {}
        if name.startswith("Matryoshka"):
            own["matryoshka_widths"] = [8, 64]
        config = getattr(sl, name + "TrainingSAEConfig")(d_in=D, d_sae=F, apply_b_dec_to_input=centres, **own)
        lens(f"sae_lens.{name}.{centres}", train(getattr(sl, name + "TrainingSAE")(config)))
plain = sl.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
lens("sae_lens.TopK.unfinished", train(sl.TopKTrainingSAE(plain)), finished=False)

def other(name, module):
    path = folder / ("dl." + name)
    path.mkdir()
    torch.save(module.state_dict(), path / "ae.pt")
    trainer = {"dict_class": type(module).__name__, "activation_dim": D, "dict_size": F, "k": K, "layer": 3,
               "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3"}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    if type(module).__name__ != "AutoEncoderNew":
        module = load_dictionary(str(path), "cpu")[0]
    W_dec = module.W_dec if hasattr(module, "W_dec") else module.decoder.weight.T
    codes = module.encode(x)
    keep("dl." + name, codes, module.decode(codes), W_dec)

with torch.no_grad():
    other("AutoEncoder", train(dl.AutoEncoder(D, F)))
    other("AutoEncoderNew", train(dl.AutoEncoderNew(D, F)))
    other("Gated", train(dl.GatedAutoEncoder(D, F)))
    other("JumpRelu", train(dl.JumpReluAutoEncoder(D, F)))
    unit = train(AutoEncoderTopK(D, F, K))
    unit.decoder.weight.data /= unit.decoder.weight.norm(dim=0, keepdim=True)
    other("TopK", unit)
    other("BatchTopK", train(BatchTopKSAE(D, F, K)))
    other("Matryoshka", train(MatryoshkaBatchTopKSAE(D, F, K, [16, 48])))
    coder = train(Sae(D, SaeConfig(expansion_factor=4, k=K)))
    coder.set_decoder_norm_to_unit_norm()
    path = folder / "sparsify" / "layers.3"
    coder.save_to_disk(path)
    coder = Sae.load_from_disk(path)
    top = coder.encode(x)
    dense = torch.zeros(len(x), F).scatter_add_(1, top.top_indices, top.top_acts)
    keep("sparsify/layers.3", dense, coder.decode(top.top_acts, top.top_indices), coder.W_dec)

# The loaders fetch from the hub: here from a folder.
import sae_lens.loading.pretrained_sae_loaders as loaders
def fetch(repo_id, filename, subfolder=None, force_download=False, **_):
    return str(folder / "hub" / repo_id / (subfolder or "") / filename)
loaders.hf_hub_download = fetch

@torch.no_grad()
def hub(name, loader, repo, sub, fold=None):
    config, state, _ = NAMED_PRETRAINED_SAE_LOADERS[loader](repo, sub, "cpu", False, {"dtype": "float32"})
    config = loaders.handle_config_defaulting(config)
    cls, config_cls = sl.registry.get_sae_class(config["architecture"])
    sae = cls(config_cls.from_dict(config | {"d_sae": F, "d_in": D}))
    sae.load_state_dict(state)
    if fold:
        sae.fold_activation_norm_scaling_factor(fold)
    codes = sae.encode(x)
    keep(name, codes, sae.decode(codes), sae.W_dec)

hub("gemma", "gemma_2", "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
hub("llama", "llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", D**0.5 / 5.0)
save_file(found, folder / "found.safetensors")
'''


@pytest.mark.skipif(not PEERS.exists(), reason="the other libraries are not installed: make peers")
def test_every_format_and_kind_as_the_packages_compute_it(parts, tmp_path):
    """Files made by SAELens, dictionary_learning and sparsify, and SAELens's loaders of Gemma Scope and Llama Scope."""
    x = raw()
    save_file({"x": x}, tmp_path / "x.safetensors")
    gemma = tmp_path / "hub/google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    gemma.mkdir(parents=True)
    np.savez(gemma / "params.npz", **{name: parts[name].numpy() for name in (*BASE, "threshold")})
    unit = parts | {"W_dec": torch.nn.functional.normalize(parts["W_dec"], dim=1)}
    llama = write_llama_scope(tmp_path / "hub/fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L8R-8x", unit)
    (tmp_path / "side.py").write_text(THEIR_SIDE)
    done = subprocess.run([str(PEERS), str(tmp_path / "side.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    names = sorted({name.rsplit(".", 1)[0] for name in found})
    assert len(names) == 12 + 1 + 7 + 1 + 2
    kinds = {}
    for name in names:
        folder = {"gemma": gemma, "llama": llama}.get(name, tmp_path / name)
        sae = agrees(folder, x, found[f"{name}.codes"], found[f"{name}.xhat"], scale=3.0)
        facts = kinds[name] = read_foreign(folder).facts
        assert 0 < float((found[f"{name}.codes"] > 0).float().mean()) < 0.9, name
        values, indices = sae.encode(x[:64])
        assert reload_error(sae, {"x": x[:64], "values": values, "indices": indices}) <= 1
        if name.startswith("dl."):
            assert facts["hook"] == "resid_post:3" and facts["model_name"] == "EleutherAI/pythia-70m"
    assert {facts["kind"] for facts in kinds.values()} == {"standard", "gated", "topk", "batchtopk", "jumprelu",
                                                           "matryoshka"}
    assert kinds["sparsify/layers.3"]["hook"] == "resid_post:3"
