"""What an exported SAE says about itself, and what may be told of this machine."""
import os
import re
from pathlib import Path
from typing import Any

from lib.environment import PROJECT, InputError
from lib.origin import about_sae
from lib.outputs import safe_name
from lib.sae import SAE, sae_hash

EV_FORMULA = ("1 - sum of squared errors / sum of squared distances from the per-dimension mean, "
              "over all held-out tokens")
Facts = dict[str, Any]


def public_name(name: str) -> str:
    """What others may be told of a model or data set: a hub name as it is, of a local path the last part.

    What comes with the project is "embedded/model" and "embedded/stories/train.jsonl".
    """
    here = next((path for path in (os.path.expanduser(name), str(PROJECT / name)) if os.path.exists(path)), None)
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII)
    if here is None and on_hub and not name.endswith((".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")):
        return name
    path = Path(os.path.realpath(here or name))
    if path.is_relative_to(PROJECT / "store" / "embedded"):
        return path.relative_to(PROJECT / "store").as_posix()
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or "local"


def transformer_lens_name(path: str, point: str) -> str:
    """TransformerLens's name of a hook point given by module path and "input" or "output".

    Where it has no name for one: the module path, with ":input" behind it for an input.
    """
    place = re.fullmatch(r".*?\.(\d+)(?:\.([a-z0-9_]+))?", path)
    names = {
        ("", "input"): "hook_resid_pre", ("", "output"): "hook_resid_post",
        ("attn", "output"): "hook_attn_out", ("mlp", "output"): "hook_mlp_out", ("norm", "input"): "hook_resid_mid",
    }
    roles = {"self_attn": "attn", "attn": "attn", "attention": "attn", "mlp": "mlp", "feed_forward": "mlp", None: ""}
    roles |= dict.fromkeys(("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), "norm")
    name = names.get((roles.get(place[2], "?"), point)) if place else None
    return f"blocks.{place[1]}.{name}" if place and name else path + (":input" if point == "input" else "")


def hook_name(point: dict[str, Any]) -> str:
    """TransformerLens's name of a run's hook point, where running the block has shown that it is that place.

    A module's path alone doesn't tell: what Gemma's `mlp` puts out is normalised before it is added to the stream.
    Where there is none, the path. Files of before roles were confirmed have no names: there the path must do.
    """
    if "names" not in point:
        return transformer_lens_name(point["path"], point["point"])
    path = point["path"] + (":input" if point["point"] == "input" else "")
    return next((name for name in point["names"] if name.startswith("blocks.")), path)


def starts_with_special(settings: dict[str, Any], first_position: int | None) -> bool | None:
    """Whether the tokenizer put a special token first, as the first stored position tells; None where it does not."""
    drops_others = settings["skip_first"] or settings.get("max_norm_multiple") is not None
    return None if first_position is None or drops_others or not settings["skip_special"] else first_position > 0


def facts_of(sae: SAE) -> Facts:
    """What another tool should know of the SAE, in SAELens's words where it has them; from the SAE's file alone.

    Raises InputError if neither the file nor its run says where it reads.
    """
    about = about_sae(sae.config)
    point, settings = about["hooks"][0], about["settings"]
    if "model" not in about or "path" not in point:
        raise InputError("neither the SAE's file nor its run, which is gone, says where it reads; run 01 and 02 again")
    constants, final = sae.config.get("constants", {}), sae.config.get("final", {})
    return {
        "model_name": public_name(about["model"]["name"]),
        "hook_name": hook_name(point),
        "hf_module_path": point["path"], "hook_point": point["point"], "context_size": settings["max_length"],
        "dataset_path": public_name(about["dataset"]["name"]) if "dataset" in about else None,
        "prepend_bos": starts_with_special(settings, about.get("first_position")),
        "special_tokens_left_out": None if "imported" in sae.config else settings["skip_special"],
        "tokens_trained": sae.config.get("tokens_trained"),
        "steps": sae.config.get("steps"),
        "lr": constants.get("LR"), "seed": constants.get("SEED"), "kind": constants.get("KIND"),
        "n_latents": sae.n_latents, "k": sae.top_k,
        "explained_variance": final.get("ev"), "explained_variance_formula": EV_FORMULA,
        "dead_pct": final.get("dead_pct"),
        "run_id": sae.config["run_id"], "data_digest": sae.config["data_digest"], "sae_hash": sae_hash(sae),
        "code_revision": sae.config.get("provenance", {}).get("git"),
    }


def hook_folder(facts: Facts) -> str:
    """Folder of an SAE named by its hook point, as SAELens has it."""
    return safe_name(facts["hook_name"].replace(":", "_"))


def module_folder(facts: Facts) -> str:
    """Folder of an SAE named by the path inside the base model, as EleutherAI's tools have it."""
    path = facts["hf_module_path"].removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
    return safe_name(path)
