"""A trained TopK sparse autoencoder: the weights of overcomplete's TopKSAE with the centring and scale of its inputs.

    x' = (x - mean) / scale        z = TopK_k(ReLU(W_enc x' + b_enc))        xhat = scale * (z W_dec) + mean

An SAE that refines codes a row twice with the same weights: x' + refine (x' - z0 W_dec) takes the place of x', z0 the
codes of x' above thresholds of their own. Where an SAE has thresholds (lib.training.kinds; standard and gated SAEs of
lib.exchange), codes that don't exceed them are 0, and k is the most a row keeps. x: raw activations [N, D]; rows of
W_dec have unit norm; codes z are sparse: (values, indices) [N, k], with thresholds [N, K], K those of the fullest row.

    sae = load_sae(folder / "topk_sae.pt")
    values, indices = sae.encode(x)
    xhat = sae.decode(values, indices)
"""
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import schemas
from .environment import InputError, as_device
from .files import fingerprint, read_torch, write_json, write_torch
from .origin import Config
from .rounding import reload_error
from .schemas import Misfit, check, check_tensors

SCHEMA_VERSION = 1
ENCODE_ROWS, ENCODE_SIZE = 4096, 1 << 28  # rows encoded at once, with dense pre-activations [rows, F], and their number
PROBE_ROWS = 64  # rows kept in the file with their codes, which loading must reproduce
TENSORS = ("W_enc", "b_enc", "W_dec", "mean", "threshold", "threshold_first")


@dataclass
class SAE:
    """Weights, input statistics and origin of one trained SAE. Build it with make_sae() or load_sae()."""

    W_enc: Tensor
    """Encoder rows [F, D], acting on x'."""
    b_enc: Tensor
    """Encoder bias [F], in x' units."""
    W_dec: Tensor
    """Dictionary [F, D], rows of unit norm."""
    mean: Tensor
    """Mean of the training activations, [D]."""
    scale: float
    """Divisor of x - mean, in raw activation units."""
    top_k: int
    """Latents that may fire on one row: of a standard or gated SAE all."""
    config: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: model, hook, run_id, data digest, seed, constants, final metrics."""
    threshold: Tensor | None = None
    """[F], in x' units: codes up to it are 0. None: the k largest fire."""
    threshold_first: Tensor | None = None
    """[F], in x' units, of the first of two codings; None: there is one coding."""
    refine: float = 0.0
    """Share of the first coding's error that is added to x' before the second."""
    maxima: Tensor | None = None
    """[F]: each latent's highest code on the activations that it was trained on; None: not known."""

    @property
    def n_latents(self) -> int:
        return len(self.W_dec)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that this SAE has, by name."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def overcomplete(self) -> nn.Module:
        """overcomplete's TopKSAE on x', in eval mode, without gradients; it shares the memory of these weights.

        Raises InputError where overcomplete is not installed, and for an SAE with thresholds, which that class does
        not have.
        """
        try:
            from overcomplete.sae import TopKSAE  # encode and decode do without it
        except ImportError as error:
            raise InputError(f"overcomplete is missing ({error}); pip install --no-deps overcomplete==0.3.0") from None
        if self.threshold is not None:
            raise InputError("overcomplete's TopKSAE has no thresholds; use encode and decode")
        n_inputs, device = self.W_dec.shape[1], str(self.W_dec.device)
        # The random start is drawn on "meta", without memory. The dictionary is set after eval(), which normalises it:
        # normalising again would change the last digit.
        with torch.random.fork_rng(devices=[]):
            module = TopKSAE(n_inputs, nb_concepts=self.n_latents, top_k=self.top_k, device="meta")
            module = module.untied(bias=True).eval()
        module.encoder.weight, module.encoder.bias = nn.Parameter(self.W_enc), nn.Parameter(self.b_enc)
        dictionary = module.dictionary
        dictionary._weights, dictionary._fused_dictionary = nn.Parameter(self.W_dec), self.W_dec
        dictionary.multiplier = torch.zeros((), device=self.W_dec.device)
        module.device = dictionary.device = device
        return module.requires_grad_(False)

    def to(self, device: torch.device | str) -> "SAE":
        """This SAE on `device`; what is there already is shared."""
        device = as_device(device)
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved, config=copy(self.config))

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of raw activations x [N, D]: values [N, k] in x' units, descending, and latent indices [N, k].

        With thresholds: as many columns as the fullest row needs, 1 to k. A value of 0 is a free slot; its index means
        nothing: make codes dense with scatter_add. Raises InputError for rows of another width.
        """
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise InputError(f"this SAE takes rows of shape [N, {len(self.mean)}], not {list(x.shape)}")
        parts = [self._fired(rows) for rows in x.split(max(1, min(ENCODE_ROWS, ENCODE_SIZE // self.n_latents)))]
        width = max(values.shape[1] for values, _ in parts)
        values, indices = (torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in column])
                           for column in zip(*parts))
        return values, indices

    def refined(self, scaled: Tensor) -> Tensor:
        """The rows x' that the encoder codes, [N, D], refined where this SAE refines."""
        if self.threshold_first is None:
            return scaled
        values, indices = _packed(functional.linear(scaled, self.W_enc, self.b_enc), self.threshold_first)
        first = functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return scaled + self.refine * (scaled - first)

    def _fired(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """encode() of a few rows, with as many columns as they need."""
        pre = functional.linear(self.refined((rows.to(self.mean) - self.mean) / self.scale), self.W_enc, self.b_enc)
        if self.threshold is None:
            return pre.relu_().topk(self.top_k, dim=1)
        values, indices = _packed(pre, self.threshold)  # sorting so few takes less time than the top k of all
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values[:, : self.top_k], indices.gather(1, order)[:, : self.top_k]

    @torch.no_grad()
    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Reconstruction [N, D] in raw activation units, from sparse codes [N, k]; costs k rows, not F."""
        rebuilt = functional.embedding_bag(indices, self.W_dec, per_sample_weights=values.to(self.W_dec), mode="sum")
        return self.scale * rebuilt + self.mean


def _packed(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """What exceeds its threshold in each row of pre [N, F], to the left: values and latents [N, K], 0 in free slots."""
    row, latent = (pre > threshold).nonzero(as_tuple=True)
    count = row.bincount(minlength=len(pre))
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    values = pre.new_zeros(len(pre), max([1, *count.tolist()]))
    indices = torch.zeros_like(values, dtype=torch.int64)
    values[row, column], indices[row, column] = pre[row, latent], latent
    return values, indices


def make_sae(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, mean: Tensor, scale: float, top_k: int, *,
    config: dict[str, Any] | None = None, threshold: Tensor | None = None,
) -> SAE:
    """An SAE on the CPU, from float32 copies of its tensors; see SAE for shapes. Rows of W_dec are normalised.

    Raises InputError if shapes disagree, top_k exceeds the number of latents or a threshold is negative.
    """
    n_latents, n_inputs = W_dec.shape
    if W_enc.shape != W_dec.shape or b_enc.shape != (n_latents,) or mean.shape != (n_inputs,):
        raise InputError(f"shapes disagree: W_enc {tuple(W_enc.shape)}, b_enc {tuple(b_enc.shape)}, W_dec "
                         f"{tuple(W_dec.shape)}, mean {tuple(mean.shape)}")
    if not 1 <= top_k <= n_latents:
        raise InputError(f"TOP_K={top_k} must be between 1 and the number of latents, {n_latents}")
    if threshold is not None and (threshold.shape != b_enc.shape or (threshold < 0).any()):
        raise InputError(f"thresholds of shape {tuple(threshold.shape)} must be {n_latents} numbers from 0 up")
    # Unit rows stay as they are: normalising again would change their last digit at each save and load.
    if (W_dec.detach().float().norm(dim=1) - 1).abs().max() > 1e-6:
        W_dec = functional.normalize(W_dec.detach().cpu().double(), dim=1)
    kept: dict[str, Any] = {name: tensor.detach().float().to("cpu", copy=True)
                            for name, tensor in zip(TENSORS, (W_enc, b_enc, W_dec, mean, threshold))
                            if tensor is not None}
    # In float32, as the file keeps it, so that an SAE and its file have the same hash.
    return SAE(**kept, scale=float(torch.tensor(scale, dtype=torch.float32)), top_k=top_k, config=dict(config or {}))


def refining(sae: SAE, threshold_first: Tensor, refine: float) -> SAE:
    """The SAE with a first coding of these thresholds [F], in x' units. Raises InputError if they can't be."""
    if threshold_first.shape != sae.b_enc.shape or (threshold_first < 0).any() or not 0 < refine <= 1:
        raise InputError(f"a first coding needs {sae.n_latents} thresholds from 0 up and a share of its error above 0 "
                         f"and at most 1, not {refine}")
    kept = threshold_first.detach().float().to(sae.mean.device, copy=True)
    return replace(sae, threshold_first=kept, refine=float(torch.tensor(refine, dtype=torch.float32)))


def save_sae(sae: SAE, path: Path, probe: Tensor) -> None:
    """Write `path` (topk_sae.pt, which loads with weights_only=True), and a .json beside it without the tensors.

    probe: raw activations [N, D]; loading must reproduce the codes of the first 64, which go into the file. Raises
    InputError, and writes nothing, if a weight or a score is not finite.
    """
    probe = probe[:PROBE_ROWS].float().cpu().clone()
    codes = dict(zip(("values", "indices"), (column.cpu() for column in sae.encode(probe.to(sae.mean.device)))))
    config = {"n_inputs": len(sae.mean), "n_latents": sae.n_latents, "top_k": sae.top_k, **sae.config}
    found = sae.tensors | {"scale": torch.tensor(sae.scale)}
    found |= {} if sae.threshold_first is None else {"refine": torch.tensor(sae.refine)}
    state = {name: value.detach().float().cpu().clone() for name, value in found.items()}
    try:  # write nothing that could not be read back
        check(config, schemas.SAE_CONFIG)
        check_tensors(state, schemas.SAE_STATE)
    except Misfit as misfit:
        raise InputError(f"this SAE can't be saved: {misfit}; lower its learning rate, or take another SAE") from None
    mark = {"schema_version": SCHEMA_VERSION, "sae_hash": sae_hash(sae)}
    maxima = {} if sae.maxima is None else {"maxima": sae.maxima.float().cpu().clone()}
    write_torch(path, {**mark, "config": config, "state": state, "probe": {"x": probe, **codes}, **maxima})
    write_json(path.with_suffix(".json"), {**mark, **config}, sealed=True)


def load_sae(path: Path, device: torch.device | str = "cpu") -> SAE:
    """Load what save_sae wrote.

    Raises InputError if it is missing, damaged or of another schema, if its weights are not those that were saved, or
    if the codes of its probe rows differ by more than rounding explains.
    """
    content = read_torch(path, "run 02_train_sae.py first", dict)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is not an SAE of schema {SCHEMA_VERSION}; train it again")
    try:
        check(content, {"config": schemas.SAE_CONFIG})
        state, config, probe = content.get("state"), content["config"], content.get("probe")
        sizes = check_tensors(state, schemas.SAE_STATE, F=config["n_latents"], D=config["n_inputs"])
        if ("threshold_first" in state) != ("refine" in state):
            raise Misfit("threshold_first and refine together", sorted(state))
        width = {} if "threshold" in state else {"K": config["top_k"]}
        check_tensors(probe, schemas.SAE_PROBE, D=sizes["D"], **width)
        check_tensors(content, {"maxima?": "float32 F"}, F=sizes["F"])
    except Misfit as misfit:
        raise InputError(f"{path} is damaged: {misfit}; delete it, then run 02_train_sae.py again") from None
    weights = {name: state[name] for name in TENSORS if name in state and name != "threshold_first"}
    sae = make_sae(**weights, scale=state["scale"].item(), top_k=config["top_k"], config=config)
    if "refine" in state:
        sae = refining(sae, state["threshold_first"], state["refine"].item())
    sae = sae.to(device)
    if content.get("sae_hash", sae_hash(sae)) != sae_hash(sae):
        raise InputError(f"{path}: its weights are not those that were saved; the file was altered, so train again")
    if not (error := reload_error(sae, probe)) <= 1:
        raise InputError(f"{path}: the codes of its stored rows come out {error:.3g} times further from the stored "
                         "ones than float32 rounding explains; the file was altered, or this device multiplies "
                         "float32 in a lower precision")
    sae.config, sae.maxima = Config(sae.config), content.get("maxima")
    return sae


def sae_hash(sae: SAE) -> str:
    """Sixteen hex digits that identify this SAE's weights."""
    refined = [] if sae.threshold_first is None else [sae.refine]
    return fingerprint([*map(fingerprint, sae.tensors.values()), sae.scale, sae.top_k, *refined])
