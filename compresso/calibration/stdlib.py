"""Python's own standard library as a calibration and evaluation text.

Every machine that runs compresso has it, so a first result needs no download. One fixed split
serves everything: the reference model was trained on the files that are not held out, calibration
(`--dataset stdlib`) draws from the same ones, and evaluation reads only the held-out ones.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

HELD_OUT_ONE_IN = 20

_SKIPPED_DIRS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})
_SKIPPED_PREFIXES = ("idlelib/idle_test/", "lib2to3/tests/")


def is_held_out(name: str) -> bool:
    """Say whether the file of this posix relative path is kept from training and calibration.

    The path alone decides (`json/decoder.py`, or `transformers/models/llama/modeling_llama.py`
    for an installed package), so a file stays on its side across Python and package versions.
    """
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def python_files(root: Path, *, held_out: bool, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (prefix + relative path, text) of the Python files under `root`, sorted by name.

    Test directories are left out (they repeat themselves), as are empty files and files that
    cannot be read as UTF-8; `held_out` picks the side of the split.
    """
    names = sorted(prefix + path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        if is_held_out(name) != held_out or _is_skipped(name):
            continue
        try:
            text = (root / name.removeprefix(prefix)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name, text


def stdlib_files(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of this interpreter's standard library on one side of the split."""
    yield from python_files(Path(sysconfig.get_path("stdlib")), held_out=held_out)


def _is_skipped(name: str) -> bool:
    """Say whether a file lies in a directory that is no part of the text."""
    parents = PurePosixPath(name).parts[:-1]
    return name.startswith(_SKIPPED_PREFIXES) or not _SKIPPED_DIRS.isdisjoint(parents)
