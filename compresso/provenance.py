"""Where a checkpoint comes from: the keys of finished work, and the record `compresso.json`.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresso import __version__
from compresso.checkpoint.checksums import CHECKSUMS
from compresso.errors import CheckpointError
from compresso.recipe import Step

if TYPE_CHECKING:
    import torch

    from compresso.checkpoint.reader import Checkpoint

RECORD = "compresso.json"
# What a record says of the files beside it: in the record of what comes next it would be copied on
# and on.
OF_THE_FILES = ("fingerprint", CHECKSUMS)
# Settings that trade memory for time, and change not a bit of a result: a run that memory was too
# small for can go on with another.
OF_MEMORY = ("checkpointing",)
KEYS = ("key", "created", "versions", "step", "calibration", "source", "report", "parent")


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint in another's history.

    name: `stage-method`, or `original` for the one no stage made.
    path: where it was when it was read; it may be gone.
    """

    name: str
    path: Path
    key: str


def step_key(
    step: Step, *, source: str, data: str | None, dtype: torch.dtype, original: str | None = None
) -> str:
    """A hash of all that decides a step's result: equal keys mean equal work.

    source:   the source checkpoint's key. data: the key of the token batches, if it reads any.
    dtype:    the type it is computed in.
    original: for a step that can be told an `original`, the key of what it takes for that; where
              it is has no part in the result.

    Gates are no part of it, nor is what only decides how much memory the step takes: they do not
    change a result.
    """
    settings = {k: v for k, v in asdict(step.settings).items() if k not in OF_MEMORY}
    parts = {
        "compresso": __version__,
        "step": [step.stage, step.method, settings],
        "data": data,
        "source": source,
        "dtype": str(dtype),
    }
    if original is not None:
        settings["original"] = original
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_record(
    step: Step, source: Checkpoint, *, key: str, data: dict[str, Any] | None, report: dict[str, Any]
) -> dict[str, Any]:
    """What `compresso.json` says about a result: all that is needed to make it again.

    data: the record of the token batches. report: what the stage measured.
    """
    return {
        "key": key,
        "created": datetime.now(UTC).isoformat(),
        "versions": {
            "compresso": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "step": step.to_json(),
        "calibration": data,
        "source": {"path": str(source.path.resolve()), "key": source.key},
        "report": report,
        "parent": {k: v for k, v in source.provenance.items() if k not in OF_THE_FILES} or None,
    }


def read_record(directory: Path) -> dict[str, Any]:
    """The `compresso.json` of a directory; empty if it has none.

    Raises CheckpointError if it is not such a record.
    """
    path = directory / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(record, dict) or not set(KEYS) <= set(record):
        raise CheckpointError(f"`{path}` is not a record that compresso wrote")
    return record


def history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of all that led to this one, the first made first and this one last."""
    found = []
    while record:
        found.append(record)
        record = record["parent"] or {}
    return found[::-1]


def lineage(source: Checkpoint) -> list[Ancestor]:
    """The checkpoints `source` was made from, the original first and `source` itself last."""
    records = history(read_record(source.path))
    if not records:
        return [Ancestor("original", source.path, source.key)]
    first = records[0]["source"]
    paths = [Path(record["source"]["path"]) for record in records[1:]] + [source.path]
    return [
        Ancestor("original", Path(first["path"]), first["key"]),
        *(
            Ancestor(f"{record['step']['stage']}-{record['step']['method']}", path, record["key"])
            for record, path in zip(records, paths, strict=True)
        ),
    ]
