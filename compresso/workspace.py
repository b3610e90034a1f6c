"""What a bare command reads and where it writes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from compresso.errors import CheckpointError
from compresso.provenance import RECORD, read_record

RUNS = Path("compresso-runs")
REFERENCE = "reference"
EXPORT = "export"


def newest_checkpoint(runs: Path = RUNS) -> Path | None:
    """The checkpoint under `runs` that was made last, by the time its record gives; no export."""
    dated = [(record_time(path), str(path)) for path in _checkpoints(runs)]
    return Path(max(dated)[1]) if dated else None


def next_target(name: str, runs: Path = RUNS) -> Path:
    """Where a bare command writes what a step of this name makes: `NN-stage-method`.

    An output of this name that was left unfinished is taken up again; else NN is one more than
    the highest number that is in use by a finished one.
    """
    entries = list(runs.iterdir()) if runs.is_dir() else []
    unfinished = sorted(
        entry for entry in entries if re.fullmatch(rf"\d+-{re.escape(name)}\.partial", entry.name)
    )
    for entry in reversed(unfinished):
        target = entry.with_suffix("")
        if not target.exists():
            return target
    numbers = [
        int(found[1])
        for entry in entries
        if (found := re.match(r"(\d+)-", entry.name)) and ".partial" not in entry.name
    ]
    return runs / f"{max(numbers, default=0) + 1:02d}-{name}"


def record_time(path: Path) -> str:
    """When the directory's content was made, as ISO text; empty if it does not say."""
    return str(read_record(path).get("created", ""))


def _checkpoints(runs: Path) -> Iterator[Path]:
    for config in (*runs.glob("*/config.json"), *runs.glob("*/*/config.json")):
        path = config.parent
        unfinished = any(".partial" in part for part in path.parts)
        if not (path / RECORD).is_file() or unfinished:
            continue
        if (read_record(path)["step"] or {}).get("stage") != EXPORT:
            yield path


def check_output(target: Path) -> None:
    """Raises CheckpointError if `target` cannot be made, or holds something of the user's."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"`{target}` is a file", hint="choose another `-o`")
    if target.is_dir() and any(target.iterdir()) and not read_record(target):
        raise CheckpointError(
            f"`{target}` exists and was not made by compresso", hint="choose another `-o`"
        )
