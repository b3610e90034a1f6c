"""Find the directory that a model's name stands for, and download it if need be."""

from __future__ import annotations

import difflib
from pathlib import Path

import compresso
from compresso.checkpoint.directory import WEIGHT_SUFFIXES
from compresso.errors import CheckpointError, ResourceError

REFERENCE = "reference"
# Weights in other formats, and Mistral's second copy of the safetensors ones.
NOT_DOWNLOADED = [
    *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"),
    "consolidated*",
    "*.bin.index.json",
]


def resolve(name: str, *, revision: str | None = None) -> Path:
    """The directory of the model `name`.

    name:     `reference` for the bundled model, a local path, `org/name` or `org/name@revision`.
    revision: branch, tag or commit of a hub model.

    Raises CheckpointError if there is no such model, or the hub cannot be reached.
    """
    if name == REFERENCE:
        return Path(compresso.__file__).parent / REFERENCE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"`{name}` is a file", hint="give the directory that holds it")
    if _looks_local(name):
        raise CheckpointError(f"no checkpoint directory `{name}`", hint=_near(path))
    repository, _, named_revision = name.partition("@")
    return _download(repository, named_revision or revision)


def place_of(name: str) -> Path:
    """The same, or a file of that name, which may be an export. Raises as `resolve`."""
    file = Path(name).expanduser()
    return file if file.is_file() else resolve(name)


def _looks_local(name: str) -> bool:
    """Whether a name that is no directory can only have been meant as one."""
    parts = name.partition("@")[0].split("/")
    return len(parts) != 2 or name.startswith((".", "~", "/")) or Path(parts[0]).is_dir()


def _near(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"there is no `{path.parent}` either; hub models are given as `org/name`"
    folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    near = difflib.get_close_matches(path.name, folders, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(f'`{path.parent / folder}`' for folder in near)}?"
    return "hub models are given as `org/name`"


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library the hub uses
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        return Path(
            snapshot_download(repository, revision=revision, ignore_patterns=NOT_DOWNLOADED)
        )
    except GatedRepoError:
        problem = f"access to `{repository}` must be granted on the hub first"
    except RepositoryNotFoundError:
        problem = f"no model `{repository}` on the hub, or it is private"
    except RevisionNotFoundError:
        problem = f"`{repository}` has no revision `{revision}`"
    except HFValidationError:
        problem = f"`{repository}` is neither a directory nor a hub name"
    except (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RevisionResolutionError,
        ConnectionError,
    ):
        problem = f"`{repository}` is not in the local hub cache, and the hub cannot be reached"
    except OSError as error:
        raise ResourceError(f"cannot store `{repository}` in the hub cache: {error}") from None
    raise CheckpointError(
        problem, hint="give a local directory instead, or `reference` for the bundled model"
    )
