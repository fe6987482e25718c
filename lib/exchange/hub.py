"""Files of an SAE that others published, from the hub or a local folder.

Nothing here runs unless the user names a repository; huggingface_hub finds the token.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import huggingface_hub

from ..environment import InputError, first_line
from ..models import local_path
from ..saes import ABOUT_FILE, MODEL_FILE
from .formats import READERS, folders_of, is_foreign

OWN = (MODEL_FILE, ABOUT_FILE, "concepts.json")  # of an SAE in this project's own format


def folder_of(source: str, subfolder: str = "") -> Path:
    """The folder of an SAE: inside the local folder `source`, or fetched from that repository.

    "user/repository/its/folder" may stand for both. Raises InputError for a subfolder that leaves it, and if the hub
    can't be reached.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise InputError(f"SUBFOLDER={subfolder} must be a folder inside SOURCE")
    parts = source.split("/")
    if len(parts) > 2 and not subfolder and source[0] not in "./~" and not Path(source).exists():
        source, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    path = local_path(source)
    return pull(source, subfolder) if path is None else path / subfolder


def pull(repo: str, subfolder: str = "") -> Path:
    """Local folder with the files of an SAE in a model repository, or in one folder of it.

    Raises InputError if it can't be reached, or holds SAEs only in other folders, of which it names some.
    """
    names = {*OWN, *(name for known in READERS.values() for name in known.files)}
    patterns = [str(PurePosixPath(subfolder) / name) for name in sorted(names)]
    with one_line(f"SOURCE={repo}", "set a local folder, or a repository that this machine can reach"):
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns)) / subfolder
        found = is_foreign(folder) or (folder / MODEL_FILE).exists()
        others = [] if found else folders_of(huggingface_hub.HfApi().list_repo_files(repo))
    if others:
        raise InputError(f"{repo}/{subfolder} holds no SAE; set SUBFOLDER to the folder of one, like "
                         f"{' or '.join(others)}")
    return folder


@contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
    """Turn any error inside into an InputError: the hub's client may change its HTTP library, and so its errors."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}; {advice}") from None
