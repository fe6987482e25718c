"""A trained SAE with its language model, for code of your own: which latents fire on a text, and what they are called.

    from sae_workbench import load_encoder            # in a checkout: from lib import load_encoder

    encoder = load_encoder("store/verify_sae_training/sae_model/topk_sae.pt")
    print(encoder.encode("Lily was happy. She ran to the big red ball."))

    'ran'    0.52 ran, hurried, rushed, dashed (+8) | 0.29 …an, drank, some, king (+8) | ...

It needs the SAE's file and its language model, but no run and no saved activations. Names come from the concepts.json
beside the SAE's file or one folder up, where 04_name_sae_concepts.ipynb writes it.
"""
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activations import SaveSettings, block_rows
from .blocks import max_positions
from .environment import InputError, choose_device, log
from .files import read_json
from .hooks import HookPoint, resolve
from .models import choose_dtype, load_model, load_tokenizer, require_same_model, source_of_run
from .sae import SAE, load_sae, sae_hash
from .schemas import Misfit, Schema, Text, check
from .store import META
from .texts import filler_id, tokenise

# What is read of concepts.json here; experiments/verify_sae_training/concepts/concepts.schema.json has the whole.
NAMES = Schema({"sae_hash": str, "concepts": {Text(r"0|[1-9][0-9]{0,8}"): {"name": str}}},
               remedy="correct it, or run notebook 04 again")
LONGEST = 100_000  # tokens of a text for a model that sets no limit


class Encoded(NamedTuple):
    """What the latents do on the T tokens of one text; printed, it shows every token with its latents."""

    tokens: list[str]
    """The pieces of the text. Special tokens are left out: the SAE was not trained on them."""
    latents: Tensor
    """Numbers of the latents, strongest first, int64 [T, k]."""
    codes: Tensor
    """Their codes, float32 [T, k]; 0: fewer than k latents fire."""
    names: list[list[str | None]]
    """Their names, T lists of k; None: no name."""

    def __str__(self) -> str:
        width = max(map(len, self.tokens), default=0)
        lines = []
        for token, latents, codes, names in zip(self.tokens, self.latents.tolist(), self.codes.tolist(), self.names):
            fired = [f"{code:.2f} {name or f'latent {latent}'}" for latent, code, name in zip(latents, codes, names)
                     if code > 0]
            lines.append(f"{token!r:<{width + 2}}  {' | '.join(fired)}")
        return "\n".join(lines)


class Encoder(NamedTuple):
    """An SAE and the model it reads; load_encoder() makes one."""

    sae: SAE
    model: Any
    tokenizer: Any
    point: HookPoint
    """Where in the model the SAE reads."""
    names: dict[int, str]
    """Latent -> its name, of those that have one."""

    def encode(self, text: str, skip_first: int = 0) -> Encoded:
        """The latents that fire on each token of `text`.

        skip_first: tokens to leave out at the start, as SKIP_FIRST where the activations were saved. Raises InputError
        for a text of more tokens than the model reads.
        """
        limit = max_positions(self.model) or LONGEST
        (item,) = tokenise(self.tokenizer, [text], 0, limit + 1, skip_first=skip_first)
        if len(item.ids) > limit:
            raise InputError(f"the text is longer than the {limit} tokens that the model reads; encode it in parts")
        _, (x,) = block_rows(self.model, [self.point], [item], pad_id=filler_id(self.tokenizer),
                             settings=SaveSettings())
        if not any(item.keep):
            x = torch.zeros(0, len(self.sae.mean))
        codes, latents = (part.cpu() for part in self.sae.encode(x.to(self.sae.mean)))
        tokens = [text[start:end] for (start, end), kept in zip(item.offsets, item.keep) if kept]
        return Encoded(tokens, latents, codes, [[self.names.get(i) for i in row] for row in latents.tolist()])


def load_encoder(
    path: str | Path, model: str | None = None, hook: str | None = None, device: str = "auto",
    trust_remote_code: bool = False,
) -> Encoder:
    """The SAE in the file `path`, or in the topk_sae.pt of a folder, with the language model that it was trained on.

    model: hub name or directory; None: the one that the SAE's file names, if its weights are still the same. hook: as
    LAYER_SIGNATURE of 01_save_activations.py; None: the one in the file. device: auto, cpu, cuda, mps.

    Raises InputError if the SAE or the model can't be loaded.
    """
    path = Path(path).expanduser()
    sae = load_sae(path / "topk_sae.pt" if path.is_dir() else path, choose_device(device))
    saved: Any = sae.config.get("model")
    source = model or _model_in_file(path, saved)
    dtype = saved.get("dtype", "auto") if isinstance(saved, dict) else "auto"
    loaded = load_model(source, sae.mean.device, choose_dtype(dtype, sae.mean.device),
                        trust_remote_code=trust_remote_code)
    if model is None:
        require_same_model(loaded, saved)
    point = resolve(loaded, hook or sae.config["hook"])
    return Encoder(sae, loaded, load_tokenizer(source, trust_remote_code), point, names=_names_beside(path, sae))


def _model_in_file(path: Path, saved: Any) -> str:
    """Where the language model is that the SAE was trained on, by the SAE's config."""
    try:
        if saved is None:
            raise InputError("it does not name its language model")
        check(saved, META.content["model?"])
        return source_of_run(saved)
    except (InputError, Misfit) as error:
        raise InputError(f"{path}: {error}; or give its name or folder: load_encoder(path, model=...)") from None


def _names_beside(path: Path, sae: SAE) -> dict[int, str]:
    """The names in the concepts.json beside the SAE, or one folder up; none if it is about another SAE."""
    folder = path if path.is_dir() else path.parent
    for place in (folder / "concepts.json", folder.parent / "concepts.json"):
        if place.exists():
            content = read_json(place, NAMES)
            if content["sae_hash"] == sae_hash(sae):
                return {int(latent): entry["name"] for latent, entry in content["concepts"].items()}
            log.warning("%s names the latents of another SAE, so it is not used", place)
    return {}
