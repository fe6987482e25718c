"""Controls for a live notebook: pick a latent, read its card, type a text, and steer the model by it.

    display(explorer(latent, name=name, card=card, search=search, opened=opened, text=MY_TEXT, prompt="One day"))

A page that was rendered from the notebook does not run them: there, and without ipywidgets, a sentence stands instead.
"""
import html
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from IPython.display import HTML
from torch import Tensor

from concepts.codes import live_codes
from concepts.continuations import continue_texts
from concepts.page import AS_TEXT, coloured, pieces
from lib.activations import SaveSettings
from lib.environment import InputError
from lib.hooks import HookPoint
from lib.sae import SAE
from lib.steering import Edit, left_out, steer

LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # set where a person has the notebook open
NOT_LIVE = "In a live notebook, controls stand here: a latent, a text of your own, and steering."
STRONGEST = 4.0  # on the slider, in units of the latent's highest code
TEMPERATURE = 0.7


class Opened(NamedTuple):
    """A model with the SAE that reads it."""

    sae: SAE
    model: Any
    tokenizer: Any
    point: HookPoint
    settings: SaveSettings
    """How texts were cut and masked where the SAE was trained."""
    maxima: Tensor
    """Highest code of each latent, [F]: the unit of strengths, and the deepest colour."""

    def read(self, text: str, latent: int) -> str:
        """HTML of a text with the latent's codes as colours."""
        live = live_codes([text], self.model, self.tokenizer, point=self.point, sae=self.sae, settings=self.settings)
        _, values, indices = next(iter(live))
        codes = (values * (indices == latent)).sum(1)
        spans = torch.stack([live.rows["char_start"], live.rows["char_end"]], 1).tolist()
        shown = pieces(text, spans, codes.tolist(), peak=int(codes.argmax()) if codes.any() else None, margin=len(text))
        return coloured(shown, float(self.maxima[latent]) or 1.0)

    def write(self, prompt: str, latent: int, strength: float, seed: int, n_tokens: int = 40) -> list[str]:
        """HTML of what the model writes after the prompt, unsteered and steered, with the latent's codes as colours."""
        edited = steer(self.model, self.point, self.sae, [Edit(latent, "add", strength)], maxima=self.maxima,
                       spare=left_out(self.tokenizer, asdict(self.settings)))
        return [self.read(continue_texts(self.model, self.tokenizer, [prompt], n_tokens, steering=steering,
                                         temperature=TEMPERATURE, seed=seed).texts[0], latent)
                for steering in (None, edited)]


def explorer(
    start: int, *, name: Callable[[int], str], card: Callable[[int], str], search: Callable[[str], Sequence[int]],
    opened: Opened | None, n_latents: int, text: str, prompt: str,
) -> Any:
    """The controls, for display(). start: the latent to begin with; opened: None for no reading and no steering.

    card: HTML of a latent; search: the latents that fit a query, best first.
    """
    if not any(name in os.environ for name in LIVE):
        return HTML(f"<p>{NOT_LIVE}</p>")
    try:
        import ipywidgets
    except ImportError:
        return HTML("<p>ipywidgets is not installed: use concepts.html.</p>")
    wide = ipywidgets.Layout(width="98%")
    latent = ipywidgets.IntSlider(start, 0, n_latents - 1, description="latent", continuous_update=False, layout=wide)
    query = ipywidgets.Text(description="search", placeholder="word or number", continuous_update=False)
    found = ipywidgets.Select(description="found", rows=6, layout=wide)
    about, reading, writing = (ipywidgets.HTML() for _ in range(3))
    typed = ipywidgets.Textarea(text, description="text", continuous_update=False, layout=wide)
    opening = ipywidgets.Text(prompt, description="prompt", continuous_update=False, layout=wide)
    strength = ipywidgets.FloatSlider(0.5, min=-STRONGEST, max=STRONGEST, step=0.05, description="strength",
                                      continuous_update=False, layout=wide)
    seed = ipywidgets.BoundedIntText(0, 0, 2**31, description="seed")

    def look(_change=None):
        about.value = card(latent.value)

    def seek(_change=None):
        wanted = query.value.strip()
        is_number = wanted.isascii() and wanted.isdecimal() and int(wanted[:12]) < n_latents
        fitting = [int(wanted)] if is_number else list(search(wanted)) if wanted else []
        found.options = [(f"{i}: {name(i)}", i) for i in fitting]

    latent.observe(look, names="value")
    query.observe(seek, names="value")
    found.observe(lambda change: change["new"] is not None and latent.set_trait("value", change["new"]), names="value")
    look()
    if opened is None:
        return ipywidgets.VBox([latent, query, found, about])

    def read(_change=None):
        reading.value = answer(lambda: f"<div {AS_TEXT}>{opened.read(typed.value, latent.value)}</div>")

    def write(_change=None):
        writing.value = answer(lambda: side_by_side(
            opened.write(opening.value, latent.value, strength.value, seed.value)))

    for controls, change in (([latent, typed], read), ([latent, opening, strength, seed], write)):
        for control in controls:
            control.observe(change, names="value")
        change()
    return ipywidgets.VBox([latent, query, found, about, typed, reading, opening,
                            ipywidgets.HBox([strength, seed]), writing])


def answer(make: Callable[[], str]) -> str:
    """The HTML, or what is wrong with the input."""
    try:
        return make()
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"


def side_by_side(texts: Sequence[str]) -> str:
    """HTML of the unsteered and the steered text, beside each other where there is room."""
    columns = (f'<div {AS_TEXT} style="flex:1 1 18em"><b>{heading}</b><br>{text}</div>'
               for heading, text in zip(("unsteered", "steered"), texts))
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{"".join(columns)}</div>'
