"""SHA-256 of the files of an output, which tell it from one that was changed later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "sha256"  # their place in a record
READ_BY_PEOPLE = (".md", ".csv", ".png")  # cards and reports: no model is made of those


def checksums(folder: Path, *, without: Iterable[str]) -> dict[str, str]:
    """Name -> hexadecimal SHA-256, of all files in a folder that a model is made of.

    without: patterns of files and folders in it that do not count.
    """
    left_out = {path for pattern in without for path in folder.glob(pattern)}
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in READ_BY_PEOPLE
        if left_out.isdisjoint((path, *path.parents))
    ]
    names = (path.relative_to(folder).as_posix() for path in paths)
    return {name: digest.hex() for name, digest in zip(names, digests(paths), strict=True)}


def altered(folder: Path, expected: dict[str, str]) -> dict[str, list[str]]:
    """The files that are not as they were: names of those `changed`, and of those `gone`.

    expected: what `checksums` said of them.
    """
    gone = [name for name in expected if not (folder / name).is_file()]
    there = [name for name in expected if name not in gone]
    found = zip(there, digests([folder / name for name in there]), strict=True)
    changed = [name for name, digest in found if digest.hex() != expected[name]]
    return {"changed": changed, "gone": gone}


def digests(paths: Iterable[Path]) -> list[bytes]:
    """The SHA-256 of every file, hashed side by side: hashing lets go of the interpreter."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
