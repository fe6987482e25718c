"""Public SAEs: what other tools published, from the hub or a folder, as an SAE of ours.

    from sae_workbench.exchange import open_foreign            # in a checkout: from lib.exchange import open_foreign

    sae = open_foreign("user/repository", subfolder="blocks.8.hook_resid_pre")
    values, indices = sae.encode(x)                            # x: raw activations [N, D]
"""
from ..environment import InputError
from ..sae import SAE
from .folded import unfold
from .formats import read_foreign
from .hub import folder_of


def open_foreign(source: str, subfolder: str = "") -> SAE:
    """The SAE in a hub repository or a local folder; codes are in raw activation units.

    config: "imported" (format, source, subfolder, kind and, where the files tell, model_name and hook_name), and
    "hook", a LAYER_SIGNATURE, where the files tell. Raises InputError for a kind that ours can't be, by its name.
    """
    found = read_foreign(folder_of(source, subfolder), f"{source}/{subfolder}")
    if found.sae.wants_norm is not None:
        raise InputError(f"{source} leaves the scale of its activations to an estimate (expected_average_only_in); "
                         "import it with import_sae.py, which has activations to estimate it from")
    about = {"format": found.format, "source": source, "subfolder": subfolder, **found.facts}
    hook = {"hook": about.pop("hook")} if "hook" in about else {}
    return unfold(found.sae, 1.0, {"imported": about, **hook})
