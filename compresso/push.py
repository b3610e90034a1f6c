"""Upload what was made to the Hugging Face Hub: `compresso push`. Imports no torch by itself."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresso.card import CARD
from compresso.checkpoint.checksums import CHECKSUMS
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.provenance import RECORD, read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BOOKKEEPING = {".git", ".cache", "__pycache__"}
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Upload:
    """What goes to a repository.

    files:   name there -> file here, of what goes as it is.
    changed: name there -> content, of what is made for it: the card, and records without the paths
             of this machine.
    """

    repository: str
    files: dict[str, Path]
    changed: dict[str, bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes of everything that goes, by name there, in order."""
        here = {name: path.stat().st_size for name, path in self.files.items()}
        made = {name: len(content) for name, content in self.changed.items()}
        return dict(sorted((here | made).items()))


def make_upload(
    path: Path, repository: str, *, base: str | None = None, evaluation: Path | None = None
) -> Upload:
    """Decide what goes, with a card for that repository. Uploads nothing.

    path:       an output of compresso. repository: `owner/name` on the hub.
    base:       the model on the hub that it was made from, where compresso does not know that.
    evaluation: an output of `compresso eval` on it, for the card; if not given, the newest beside
                it.

    Raises ConfigError for a name that cannot be one, or an evaluation of something else;
    CheckpointError if compresso did not make what is there.
    """
    parts = repository.split("/")
    if len(parts) != 2 or not all(part and part[0] not in ".-" for part in parts):
        raise ConfigError(
            f"`{repository}` is no name for a repository", hint="give it as `owner/name`"
        )
    record = read_record(path) if path.is_dir() else {}
    if not record:
        raise CheckpointError(
            f"`{path}` is no output of compresso", hint="give a directory that a stage has written"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        raise CheckpointError(f"`{path}` holds no weights: it is the report of a measurement")
    rows = _evaluated(path, record, evaluation)

    from compresso.publishing import card_of

    card = card_of(path, record, name=repository, base=base, evaluated=rows)
    files = _files(path)
    changed = {CARD: card.encode()}
    known = _without_paths(record)
    for name in (name for name, file in files.items() if file.name == ADAPTER_CONFIG):
        adapter = json.loads(files[name].read_text(encoding="utf-8"))
        changed[name] = _as_json(adapter | {BASE: repository})
        if name in known.get(CHECKSUMS, {}):
            known[CHECKSUMS][name] = hashlib.sha256(changed[name]).hexdigest()
    changed[RECORD] = _as_json(known)
    kept = {name: file for name, file in files.items() if name not in changed}
    return Upload(repository, kept, changed)


def push(upload: Upload, *, private: bool, revision: str | None, message: str) -> str:
    """Create the repository if there is none, and commit everything at once; its address.

    Raises ResourceError if the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    api: HfApi = HfApi(library_name="compresso")
    contents: dict[str, str | bytes] = {name: str(file) for name, file in upload.files.items()}
    contents |= upload.changed
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    try:
        made = api.create_repo(upload.repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(upload.repository, branch=revision, exist_ok=True)
        api.create_commit(upload.repository, operations, commit_message=message, revision=revision)
    except HFValidationError as error:
        raise ConfigError(f"the hub takes no such name: {_first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise ResourceError(
            "nobody is logged in to the hub", hint="run `hf auth login` first"
        ) from None
    except (HfHubHTTPError, HTTPError, ConnectionError, OSError) as error:
        raise ResourceError(
            f"`{upload.repository}` was not uploaded: {_first_line(error)}",
            hint="check the connection, and `hf auth whoami`; then run the same command again",
        ) from None
    return str(made)


def _files(path: Path) -> dict[str, Path]:
    """Everything in a directory, by its name within."""
    found = {}
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(set(folders) - BOOKKEEPING)
        for file in sorted(files):
            place = Path(folder) / file
            found[place.relative_to(path).as_posix()] = place
    return found


def _evaluated(path: Path, record: dict[str, Any], evaluation: Path | None) -> list[dict[str, Any]]:
    """The rows of an evaluation of this output, the original's first; none if there is none."""
    if evaluation is not None:
        found = read_record(evaluation) if evaluation.is_dir() else {}
        if not _is_of(found, record):
            raise ConfigError(
                f"`{evaluation}` is no evaluation of `{path}`",
                hint="give a directory that `compresso eval` has written about it",
            )
        return list(found["report"]["rows"])
    beside = [entry for entry in path.resolve().parent.iterdir() if (entry / RECORD).is_file()]
    records = [found for found in map(read_record, beside) if _is_of(found, record)]
    newest = max(records, key=lambda found: str(found["created"]), default=None)
    return list(newest["report"]["rows"]) if newest else []


def _is_of(found: dict[str, Any], record: dict[str, Any]) -> bool:
    return (
        bool(found)
        and found["step"]["stage"] == "eval"
        and found["source"]["key"] == record["key"]
        and bool(found["report"]["rows"])
    )


def _without_paths(values: Any) -> Any:
    """Plain values with the last part in place of every path of this machine."""
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    if isinstance(values, str) and values.startswith("/"):
        return Path(values).name
    return values


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
