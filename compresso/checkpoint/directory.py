"""The files of a checkpoint directory: which hold weights, and what is in their headers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compresso.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
RECORD = "compresso.json"
SINGLE = "model.safetensors"
# A folder beside the weights, and what it holds: see adapter_folder.py.
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# The safetensors name of every type torch can hold.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (
    *PICKLES,
    ".safetensors",
    ".gguf",
    ".ggml",
    ".llamafile",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
)
INDEX_SUFFIXES = (".bin.index.json", ".safetensors.index.json")
# Families whose dense checkpoints hold linears as (in, out), and the same restructured.
TRANSPOSED = ("gpt2", "compresso_gpt2")
# Left by git and by the hub's downloader; not part of a checkpoint.
BOOKKEEPING = {".git", ".cache", "__pycache__"}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its shard's header describes it.

    nbytes: bytes on disk. shard: file name within the directory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    shard: str


Load = Callable[[Iterable[str]], dict[str, Tensor]]
"""Reads the named tensors of a checkpoint as they are stored."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is absent or does not hold a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object")
    return found


@contextmanager
def open_shard(path: Path, *, hint: str = "copy or download it again") -> Iterator[Any]:
    """A `safe_open` handle on a safetensors file. hint: what to do if it is damaged.

    Its tensors are private maps of the file: nothing is read before it is used, changing one
    does not change the file, and the memory is given back when the last of them is dropped.
    That only holds if the handle is closed soon, as an open one keeps every page it touched.

    Raises CheckpointError if the file is absent, cut short or otherwise damaged.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except FileNotFoundError:
        raise CheckpointError(f"`{path.parent}` lacks its shard `{path.name}`") from None
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            hint = "it is a git-lfs pointer, not the weights: run `git lfs pull`"
        raise CheckpointError(f"`{path}` is damaged: {error}", hint=hint) from None


def read_shard(path: Path, *, hint: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises as `open_shard`."""
    with open_shard(path, hint=hint) as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - as below


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `path`, sorted by name. Reads all headers, no data.

    Raises CheckpointError if there are no safetensors weights, a shard is missing or damaged,
    or the index and the shards disagree.
    """
    listed = _listed_shards(path)
    infos: dict[str, TensorInfo] = {}
    for shard_name in sorted(set(listed.values()) or {SINGLE}):
        with open_shard(path / shard_name) as shard:
            for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                if name in infos and name not in listed:
                    raise CheckpointError(
                        f"`{path}` stores `{name}` in both `{infos[name].shard}` and `{shard_name}`"
                    )
                if listed.get(name, shard_name) == shard_name:
                    infos[name] = _tensor_info(name, shard.get_slice(name), path / shard_name)
    for name, shard_name in listed.items():
        if name not in infos:
            raise CheckpointError(
                f"the index of `{path}` lists `{name}` in `{shard_name}`, which does not hold it",
                hint="copy or download the checkpoint again",
            )
    return dict(sorted(infos.items()))


def has_adapter(path: Path) -> bool:
    """Whether there is an adapter, or part of one, beside the checkpoint in `path`."""
    return any((path / ADAPTER / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def carried_and_left_out(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Sort the files that are neither weights in use nor rewritten by every stage.

    An adapter is in use: no stage carries it, as what it corrects has changed.

    Returns the ones to carry byte for byte (name within the directory -> file), and the names
    of those that hold weights in some other form, which would be stale in an output.
    """
    own = {CONFIG, RECORD, INDEX, SINGLE, *_listed_shards(path).values()}
    carried: dict[str, Path] = {}
    left_out: list[str] = []
    for folder, folders, files in os.walk(path):
        adapter = {ADAPTER} if Path(folder) == path and has_adapter(path) else set()
        folders[:] = sorted(set(folders) - BOOKKEEPING - adapter)
        for file in sorted(files):
            name = (Path(folder) / file).relative_to(path).as_posix()
            if name in own:
                continue
            dangling = not (path / name).is_file()
            if dangling or file.endswith((*WEIGHT_SUFFIXES, *INDEX_SUFFIXES)):
                left_out.append(name)
            else:
                carried[name] = path / name
    return carried, left_out


def _listed_shards(path: Path) -> dict[str, str]:
    """Tensor name -> shard, by the index; empty for a checkpoint in one file."""
    if (path / SINGLE).is_file():  # transformers, too, then ignores an index
        return {}
    if not (path / INDEX).is_file():
        raise _no_weights(path)
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"`{path / INDEX}` has no `weight_map`")
    for shard in listed.values():
        if not isinstance(shard, str) or shard != os.path.basename(shard) or "\\" in shard:
            raise CheckpointError(f"`{path / INDEX}` names a file outside its directory: `{shard}`")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"`{path / INDEX}` names `{shard}`, which is not safetensors")
    return listed


def _no_weights(path: Path) -> CheckpointError:
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    for file in files:
        if file.endswith(".safetensors"):
            return CheckpointError(
                f"`{path}` holds `{file}` but neither `{SINGLE}` nor `{INDEX}`",
                hint="rename a single file, or copy the index of a sharded checkpoint too",
            )
    for file in files:
        if file.endswith(PICKLES):
            return CheckpointError(
                f"`{path}` holds only pickled weights (`{file}`), which can run code when read",
                hint="convert them: load and save the model with transformers, "
                "which writes safetensors",
            )
        if file.endswith(".gguf"):
            return CheckpointError(
                f"`{path}` holds only GGUF weights (`{file}`)",
                hint="start from the safetensors checkpoint that they were made from",
            )
    return CheckpointError(f"no safetensors weights in `{path}`")


def _tensor_info(name: str, stored: Any, shard: Path) -> TensorInfo:
    dtype = DTYPES.get(stored.get_dtype())
    if dtype is None:
        raise CheckpointError(f"`{name}` in `{shard}` has the unknown type {stored.get_dtype()}")
    shape = tuple(stored.get_shape())
    return TensorInfo(shape, dtype, prod(shape) * dtype.itemsize, shard.name)


def _is_lfs_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."
