"""Where in a model an SAE belongs: other tools' names of hook points as layer signatures of lib.hooks.

    signature_of("blocks.8.hook_resid_pre")      # "resid_pre:8"
    signature_of("resid_post_layer_8")           # "resid_post:8"
    signature_of("layers.8")                     # "resid_post:8": the output of a block, by sparsify's path
    signature_of("model.layers.8.output")        # "resid_post:8", as Gemma Scope 2 has it
    signature_of("model.layers.8.mlp")           # as it is: a module's path
"""
import re

from ..environment import InputError
from ..hooks import role_and_number
from ..store import Run

# hub names of models that TransformerLens calls by shorter ones: its prefix -> what stands before it
OWNERS = {"pythia": "EleutherAI/", "gpt-neo": "EleutherAI/", "gpt-j": "EleutherAI/", "gemma": "google/",
          "Llama": "meta-llama/", "Mistral": "mistralai/", "Qwen": "Qwen/", "opt": "facebook/"}


def hub_name(model: str) -> str:
    """A language model's hub name from TransformerLens's: gpt2-small is gpt2, pythia-70m is EleutherAI/pythia-70m."""
    if model == "gpt2-small":
        return "gpt2"
    owner = next((owner for prefix, owner in OWNERS.items() if model.startswith(prefix)), "")
    return model if "/" in model else owner + model


def signature_of(name: str) -> str:
    """The LAYER_SIGNATURE of another tool's hook name. Raises InputError for a place that has none."""
    if role := role_and_number(name):
        return ":".join(role)
    if found := re.fullmatch(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)_layer_(\d+)", name):
        return f"{found[1]}:{found[2]}"
    if found := re.fullmatch(r"(?:layers|h)\.(\d+)", name):
        return f"resid_post:{found[1]}"
    if name.endswith("hook_z"):
        raise InputError(f"the SAE belongs at {name}, the outputs of attention heads side by side, which no "
                         "LAYER_SIGNATURE names; take one at resid_pre, resid_mid, resid_post, attn_out or mlp_out")
    if "hook_" in name:
        raise InputError(f"the SAE belongs at {name}, which no LAYER_SIGNATURE names; take one at resid_pre, "
                         "resid_mid, resid_post, attn_out or mlp_out")
    if found := re.fullmatch(r"(?:.*\.)?layers\.(\d+)(\.post_feedforward_layernorm)?\.output", name):  # Gemma Scope 2
        return f"{'mlp_out' if found[2] else 'resid_post'}:{found[1]}"
    if found := re.fullmatch(r"(.+)\.(input|output)", name):
        return f"{found[1]}:{found[2]}"
    return name


def hook_in_run(run: Run, hook: str) -> str | None:
    """The run's hook point that a LAYER_SIGNATURE of signature_of means; None if the run does not hold it."""
    try:
        return run.hook(hook)
    except InputError:  # a path inside the base model, without what stands before it
        found = [point["signature"] for point in run.meta["hooks"]
                 if point["path"].endswith(f".{hook}") and point["point"] == "output"]
        return found[0] if found else None


def same_model(one: str, other: str) -> bool:
    """Whether two names may mean the same model: equal in their last part, whatever owner or folder they name."""
    last = [re.sub(r"[^a-z0-9]", "", re.split(r"[/\\]", hub_name(name).rstrip("/\\"))[-1].lower())
            for name in (one, other)]
    return last[0] == last[1]
