"""A trained SAE with its language model, for code of your own: which latents fire on a text, and steering by them.

    from sae_workbench import load_encoder            # in a checkout: from lib import load_encoder

    encoder = load_encoder()                          # the SAE trained last; or its name, folder or hub repository
    print(encoder.encode("Lily was happy. She ran to the big red ball."))
    with encoder.steer("dog", 2):
        print(encoder.generate("One day"))

It needs the SAE's file and its language model, but no run and no saved activations.
"""
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activations import STORE_DTYPES, SaveSettings, block_rows
from .blocks import input_device, max_positions
from .environment import InputError, choose_device, log
from .exchange import open_foreign
from .exchange.hub import folder_of
from .files import read_json, read_tensors
from .hooks import HookPoint
from .origin import about_sae
from .reopen import open_model
from .sae import SAE, load_sae, sae_hash
from .saes import MODEL_FILE, find_sae
from .schemas import Schema, Text
from .steering import Edit, left_out, plain_writing, steer
from .texts import filler_id, tokenise

# What is read of concepts.json here; experiments/verify_sae_training/concepts/concepts.schema.json has the whole.
NAMES = Schema({"sae_hash": str, "concepts": {Text(r"0|[1-9][0-9]{0,8}"): {"name": str, "f1?": (float, None)}}},
               remedy="correct it, or run notebook 04 again")
LONGEST = 100_000  # tokens of a text for a model that sets no limit


def fit_of(word: str, name: str) -> tuple[bool, int, bool] | None:
    """How well a word fits a latent's name, the least best, as Encoder.find tells; None: the name lacks it."""
    text, sought = name.lower(), word.lower()
    if sought not in text:
        return None
    patterns = re.split(r"[,;] | \(\+", text)
    is_word = re.search(rf"(?<!\w){re.escape(sought)}(?![\w…])", text) is not None
    return sought not in patterns, patterns.index(sought) if sought in patterns else len(patterns), not is_word


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
    """Latent -> its name, of those that have one; the best by F1 first."""
    settings: SaveSettings
    """How texts were cut and masked where the SAE was trained."""

    def encode(self, text: str, skip_first: int | None = None) -> Encoded:
        """The latents that fire on each token of `text`.

        skip_first: tokens to leave out at the start; None: as many as in training. Raises InputError for a text of more
        tokens than the model reads.
        """
        limit = max_positions(self.model) or LONGEST
        skip_first = self.settings.skip_first if skip_first is None else skip_first
        (item,) = tokenise(self.tokenizer, [text], 0, limit + 1, skip_special=self.settings.skip_special,
                           skip_first=skip_first)
        if len(item.ids) > limit:
            raise InputError(f"the text is longer than the {limit} tokens that the model reads; encode it in parts")
        _, (x,) = block_rows(self.model, [self.point], [item], pad_id=filler_id(self.tokenizer),
                             settings=self.settings)
        if not any(item.keep):
            x = torch.zeros(0, len(self.sae.mean))
        x = x.to(STORE_DTYPES[self.settings.store_dtype])  # as the activations were that it was trained on
        codes, latents = (part.cpu() for part in self.sae.encode(x.to(self.sae.mean)))
        tokens = [text[start:end] for (start, end), kept in zip(item.offsets, item.keep) if kept]
        return Encoded(tokens, latents, codes, [[self.names.get(i) for i in row] for row in latents.tolist()])

    def find(self, word: str) -> list[int]:
        """The latents with this in their names: first where it is one of the listed patterns, the sooner the better,
        then where it is a word of one, then where it is part of a word; then by F1.
        """
        fits = {latent: fit for latent, name in self.names.items() if (fit := fit_of(word, name))}
        return sorted(fits, key=lambda latent: fits[latent])  # which keeps the order by F1

    @contextmanager
    def steer(self, latent: int | str, strength: float = 1.0, mode: str = "add") -> Iterator[int]:
        """Edit one latent's code on every token that the model reads inside the block; yields the latent's number.

        latent: its number, or a word of its name (see find). strength: in units of its highest code; mode: add, scale,
        clamp or ablate, see lib/steering.py. Raises InputError for a word in no name, and where a strength makes no
        sense.
        """
        if isinstance(latent, str):
            if not (found := self.find(latent)):
                raise InputError(f"no latent has {latent!r} in its name; give its number, or a word of encoder.names")
            latent = found[0]
        maxima = self.sae.maxima
        if maxima is None and mode in ("add", "clamp"):
            raise InputError("the highest codes of this SAE's latents, the unit of a strength, are not known; take "
                             "them from texts: encoder = encoder.measured_on(texts)")
        maxima = torch.zeros(self.sae.n_latents) if maxima is None else maxima
        spare = left_out(self.tokenizer, asdict(self.settings))
        with steer(self.model, self.point, self.sae, [Edit(latent, mode, strength)], maxima=maxima, spare=spare):
            yield latent

    @torch.no_grad()
    def generate(self, prompt: str, n_tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> str:
        """The prompt and what the model writes after it. temperature 0: always the likeliest token.

        Raises InputError for a model that can't write or reads fewer tokens, and a prompt without a token.
        """
        if not hasattr(self.model, "generate") or self.model.get_output_embeddings() is None:
            raise InputError(f"{type(self.model).__name__} writes no text")
        ids = [*self.tokenizer(prompt)["input_ids"]]
        if len(ids) > 1 and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            del ids[-1]  # some tokenizers end every text
        if not ids:
            raise InputError("the prompt holds no token; give it a word")
        limit = max_positions(self.model)
        if limit is not None and len(ids) + n_tokens - 1 > limit:  # the last one is written and not read
            raise InputError(f"{len(ids)} tokens of the prompt and {n_tokens} new ones are more than the {limit} that "
                             "the model reads; lower n_tokens, or shorten the prompt")
        tokens = torch.tensor([ids], device=input_device(self.model))
        with plain_writing(self.model, temperature, seed) as how:
            written = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_tokens,
                                          pad_token_id=filler_id(self.tokenizer), **how)
        return str(self.tokenizer.decode(written[0], skip_special_tokens=True))

    def measured_on(self, texts: Sequence[str]) -> "Encoder":
        """This encoder with the latents' highest codes on these texts, [F], as the unit of steering."""
        maxima = torch.zeros(self.sae.n_latents)
        for text in texts:
            _, latents, codes, _ = self.encode(text)
            maxima.scatter_reduce_(0, latents.flatten(), codes.flatten(), "amax")
        sae = self.sae.to(self.sae.mean.device)
        sae.maxima = maxima
        return self._replace(sae=sae)


def load_encoder(
    sae: str | Path | None = None, model: str | None = None, hook: str | None = None,
    device: str | torch.device = "auto", *, subfolder: str = "", trust_remote_code: bool = False,
) -> Encoder:
    """A trained SAE with the language model that it reads.

    sae: its name, file or folder, or a repository on the hub, "user/name", of this project's format or of one that
    lib/exchange reads; None: the SAE trained or imported last. subfolder: the SAE's folder inside that.
    model: hub name or directory; None: the one that the SAE's files name, with the same weights where they tell. hook:
    as LAYER_SIGNATURE of 01_save_activations.py; None: the one in the files. device: auto, cpu, cuda, mps.

    Names and F1 come from the concepts.json beside the SAE's file or one folder up, where notebook 04 writes it, and
    where the file does not hold the latents' highest codes, they come from the latent_stats.safetensors beside that.

    Raises InputError if the SAE or the model can't be loaded.
    """
    chosen, place = choose_device(device), _place(sae, subfolder)
    if not (place / MODEL_FILE).exists():
        return _foreign(open_foreign(str(place)).to(chosen), model, hook, trust_remote_code)
    loaded = load_sae(place / MODEL_FILE, chosen)
    about = about_sae(loaded.config)
    try:
        opened = open_model(about, chosen, trust_remote_code, model=model, hook=hook)
    except InputError as error:
        raise InputError(f"{place}: {error}" + ("" if model else "; or give its name or folder: load_encoder(..., "
                                                "model=...)")) from None
    names, folder = _names_beside(place, sae_hash(loaded))
    if loaded.maxima is None and folder and (stats := folder / "latent_stats.safetensors").exists():
        loaded.maxima = read_tensors(stats, {"max": "float32 F"}, finite=True, F=loaded.n_latents)["max"]
    return Encoder(loaded, *opened, names=names, settings=SaveSettings(**about["settings"]))


def _foreign(sae: SAE, model: str | None, hook: str | None, trust_remote_code: bool) -> Encoder:
    """The encoder of an SAE in another tool's files, which tell no more than the model's name and the place."""
    model, hook = model or sae.config["imported"].get("model_name"), hook or sae.config.get("hook")
    if model is None or hook is None:
        raise InputError("the SAE's files don't say which language model it reads, and where; give them: "
                         "load_encoder(..., model=..., hook=...)")
    opened = open_model({}, sae.mean.device, trust_remote_code, model=model, hook=hook)
    return Encoder(sae, *opened, names={}, settings=SaveSettings())


def _place(sae: str | Path | None, subfolder: str) -> Path:
    """The folder of an SAE, fetched from the hub if that is where it is."""
    if sae is None or not subfolder:
        try:
            return find_sae(sae)
        except InputError:
            name = str(sae)
            if sae is None or not (Path(name).expanduser().exists() or re.fullmatch(r"[\w.\-]+/[\w.\-]+", name)):
                raise
    return folder_of(str(sae), subfolder)


def _names_beside(place: Path, digest: str) -> tuple[dict[int, str], Path | None]:
    """The names in the concepts.json beside the SAE, or one folder up, the best by F1 first, and that folder; none if
    it is about another SAE.
    """
    for path in (place / "concepts.json", place.parent / "concepts.json"):
        if path.exists():
            content = read_json(path, NAMES)
            if content["sae_hash"] == digest:
                entries = content["concepts"].items()
                best = sorted(entries, key=lambda item: (-(item[1].get("f1") or 0), int(item[0])))
                return {int(latent): entry["name"] for latent, entry in best}, path.parent
            log.warning("%s names the latents of another SAE, so it is not used", path)
    return {}, None
