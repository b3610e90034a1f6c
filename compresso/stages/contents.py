"""What is stored at a path, tensor by tensor, in whatever form it is."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compresso.checkpoint.directory import INDEX, SINGLE, read_infos
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError

GGUF = ".gguf"
DENSE = ("F32", "F16", "BF16", "F64")  # types of GGUF that hold weights as they are
BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
# What other programs call the tensors of a linear that they pack.
CODES = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale")


@dataclass(frozen=True)
class Stored:
    """One tensor of a model. kind: how it is stored. nbytes: on disk, in all its parts."""

    name: str
    kind: str
    packed: bool
    nbytes: int


def contents_of(path: Path) -> list[Stored]:
    """Every tensor of the model at a path: a checkpoint directory, or a GGUF file or its directory.

    A linear that is stored in several tensors is one, if compresso can read its form. Reads no
    weights. Empty if there is nothing whose form is known here, as GGUF without its package.

    Raises CheckpointError if a checkpoint is damaged.
    """
    if is_checkpoint(path):
        return _of_checkpoint(path)
    files = [path] if path.is_file() else sorted(path.glob(f"*{GGUF}"))
    if importlib.util.find_spec("gguf") is None:
        return []
    return [tensor for file in files if file.suffix == GGUF for tensor in _of_gguf(file)]


def is_checkpoint(path: Path) -> bool:
    """Whether it is a directory with weights in safetensors."""
    return any((path / name).is_file() for name in (SINGLE, INDEX))


def is_gguf(path: Path) -> bool:
    """Whether it is a GGUF file, or a directory with one and no other weights."""
    if path.is_file():
        return path.suffix == GGUF
    return not is_checkpoint(path) and any(path.glob(f"*{GGUF}"))


def shortened(names: Iterable[str]) -> list[str]:
    """The names, `*` for a number in one, and how many names that stands for."""
    counts = Counter(BLOCK.sub("*", name) for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]


def by_kind(tensors: Iterable[Stored]) -> list[dict[str, Any]]:
    """One entry for all that are stored alike and have the same name but for numbers in it."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in tensors:
        name = BLOCK.sub("*", tensor.name)
        entry = entries.setdefault(
            (name, tensor.kind),
            {"name": name, "stored": tensor.kind, "packed": tensor.packed, "count": 0, "bytes": 0},
        )
        entry["count"] += 1
        entry["bytes"] += tensor.nbytes
    return list(entries.values())


def _of_checkpoint(path: Path) -> list[Stored]:
    source = Checkpoint(path)
    try:
        packing, names = source.packing, source.weight_names()
    except CheckpointError:  # another program's codes
        return [
            Stored(name, _word(info.dtype), name.endswith(CODES), info.nbytes)
            for name, info in read_infos(path).items()
        ]
    found = []
    for name in names:
        linear = name.removesuffix(".weight")
        if name != linear and linear in packing.shapes:
            size = sum(source.info(part).nbytes for part in packing.names(linear))
            kind = packing.kind(linear)
            found.append(Stored(name, _described(kind), True, size))
        else:
            info = source.info(name)
            found.append(Stored(name, _word(info.dtype), False, info.nbytes))
    if source.adapter is not None:
        sizes = source.adapter.sizes
        found += [
            Stored(f"adapter of {linear}", f"rank {rank}", False, sizes[linear])
            for linear, rank in source.adapter.ranks.items()
        ]
    return found


def _of_gguf(path: Path) -> list[Stored]:
    from gguf import GGUFReader

    return [
        Stored(
            str(tensor.name),
            tensor.tensor_type.name,
            tensor.tensor_type.name not in DENSE,
            int(tensor.n_bytes),
        )
        for tensor in GGUFReader(path).tensors
        if prod(tensor.shape)
    ]


def _described(kind: dict[str, Any]) -> str:
    values = dict(kind)
    words = [str(values.pop("kind"))] if "kind" in values else []
    if "bits" in values:
        words.append(f"{values.pop('bits')} bits")
    if (size := values.pop("group_size", None)) is not None:
        words.append("per row" if size == -1 else f"groups of {size}")
    if (symmetric := values.pop("symmetric", None)) is not None:
        words.append("symmetric" if symmetric else "asymmetric")
    return ", ".join([*words, *(f"{name} {value}" for name, value in values.items())])


def _word(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
