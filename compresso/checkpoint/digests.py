"""What the files with weights were when they were written, to notice every later change.

A proof compares logits, which rounding moves, too: a scale or a code that flipped on a disk or in a
copy hides behind that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from compresso.checkpoint.directory import ADAPTER, ADAPTER_WEIGHTS

PATTERNS = ("model*.safetensors", "*.gguf", f"{ADAPTER}/{ADAPTER_WEIGHTS}")


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file with weights, by name within the directory. Reads all of them."""
    files = sorted(file for pattern in PATTERNS for file in directory.glob(pattern))
    return {file.relative_to(directory).as_posix(): _digest(file) for file in files}


def changed(directory: Path, recorded: Mapping[str, str]) -> list[str]:
    """Names of those files that are gone, or not what they were. recorded: see `digests`."""
    return [
        name
        for name, digest in recorded.items()
        if not (directory / name).is_file() or _digest(directory / name) != digest
    ]


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
