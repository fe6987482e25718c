"""The notebook's controls: what they show when they are moved, and that a rendered page does not run them."""
import re

import ipywidgets
import pytest
from conftest import tiny_model, word_tokenizer
from test_steering import MAXIMA, random_sae

from concepts.continuations import continue_texts
from concepts.widget import LIVE, NOT_LIVE, Opened, explorer
from lib.activations import SaveSettings
from lib.hooks import resolve


@pytest.fixture
def opened():
    model = tiny_model("llama")
    return Opened(random_sae(), model, word_tokenizer(), point=resolve(model, "resid_post:1"), settings=SaveSettings(),
                  maxima=MAXIMA)


def shown(opened, **changes):
    """The controls by their descriptions, and the three texts: card, reading, writing."""
    options = dict(name="latent {}".format, card="<p>card {}</p>".format, search=lambda query: [7, 3], n_latents=32,
                   opened=opened, text="the cat sat", prompt="a dog")
    box = explorer(5, **options | changes)
    flat = [inner for outer in box.children for inner in getattr(outer, "children", [outer])]
    controls = {control.description: control for control in flat if not isinstance(control, ipywidgets.HTML)}
    return controls, [control for control in flat if isinstance(control, ipywidgets.HTML)]


def plain(markup):
    return re.sub("<[^>]*>", "", markup)


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv(LIVE[0], "notebook.ipynb")


def test_a_rendered_page_does_not_run_it(monkeypatch, opened):
    for variable in LIVE:
        monkeypatch.delenv(variable, raising=False)
    made = explorer(5, name=str, card=str, search=list, n_latents=32, opened=opened, text="a", prompt="a")
    assert NOT_LIVE in made.data


def test_a_search_leads_to_a_latent(live, opened):
    controls, (card, _, _) = shown(opened)
    assert card.value == "<p>card 5</p>"
    controls["search"].value = "cat"
    assert controls["found"].options == (("7: latent 7", 7), ("3: latent 3", 3))
    controls["found"].value = 3
    assert controls["latent"].value == 3 and card.value == "<p>card 3</p>"
    controls["search"].value = "31"
    assert [latent for _, latent in controls["found"].options] == [31]
    controls["search"].value = "32"  # no latent: a word like any other
    assert [latent for _, latent in controls["found"].options] == [7, 3]


def test_the_text_is_coloured_where_the_latent_fires(live, opened):
    controls, (_, reading, _) = shown(opened)
    controls["text"].value = "the <b>dog</b> ran"
    assert "<b>" not in reading.value and plain(reading.value) == "the &lt;b&gt;dog&lt;/b&gt; ran"
    coloured = [opened.read("the cat sat on the mat", latent).count("rgba") for latent in range(32)]
    assert sum(coloured) == 2 * 6  # two latents on each of six tokens
    controls["text"].value = ""
    assert "no tokens to show" in reading.value


def test_steering_shows_both_texts(live, opened):
    controls, (_, _, writing) = shown(opened)
    unsteered = continue_texts(opened.model, opened.tokenizer, ["a dog"], 40, temperature=0.7, seed=0).texts[0]
    controls["strength"].value = 0.0
    assert plain(writing.value) == f"unsteered{unsteered}steered{unsteered}"
    controls["strength"].value = 4.0
    assert plain(writing.value).startswith(f"unsteered{unsteered}steered")
    assert plain(writing.value) != f"unsteered{unsteered}steered{unsteered}"
    controls["seed"].value = 1
    assert not plain(writing.value).startswith(f"unsteered{unsteered}steered")


def test_without_a_model_only_what_is_stored_is_shown(live):
    controls, texts = shown(None)
    assert set(controls) == {"latent", "search", "found"} and len(texts) == 1
