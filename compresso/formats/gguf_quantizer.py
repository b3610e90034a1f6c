"""llama.cpp's own quantizer, in a process of its own: it ends the process where it fails."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.directory import read_shard
from compresso.checkpoint.shard_file import write_safetensors
from compresso.errors import GateError, ResourceError
from compresso.formats.gguf_types import FILE_TYPES
from compresso.runtimes import llama_cpp
from compresso.runtimes.llama_cpp_model import open_library
from compresso.runtimes.process import apart

IMPORTANCE = "importance.safetensors"


def quantize_file(
    dense: Path,
    target: Path,
    file_type: str,
    *,
    kept: Mapping[str, int],
    outer: int | None,
    importance: Mapping[str, Tensor],
) -> None:
    """Quantize a file as llama.cpp's `llama-quantize` does, with its choice of type per tensor.

    dense:      the file to read. target: the one to write.
    kept:       tensors that are to have the type they have now: name -> llama.cpp's number of it.
    outer:      number of the type of embedding and head; None for llama.cpp's choice.
    importance: mean squares of the inputs, (columns,), by name of tensor; none if empty.

    Raises ResourceError if llama-cpp-python is not installed, GateError if it fails.
    """
    if (missing := llama_cpp.missing()) is not None:
        what, _, how = missing.partition(": ")
        raise ResourceError(f"the type `{file_type}` needs {what}", hint=how)
    place = dense.with_name(IMPORTANCE)
    tensors = {name: values.float().contiguous() for name, values in importance.items()}
    try:
        if tensors:
            with place.open("wb") as file:
                write_safetensors(file, tensors, {"format": "pt"})
        job = {
            "dense": str(dense),
            "target": str(target),
            "number": FILE_TYPES[file_type],
            "kept": dict(kept),
            "outer": outer,
            "importance": str(place) if tensors else None,
            "threads": torch.get_num_threads(),
        }
        apart(f"{__name__}:_quantize", job, path=target, runtime=llama_cpp.NAME)
    finally:
        place.unlink(missing_ok=True)


def _quantize(
    *,
    dense: str,
    target: str,
    number: int,
    kept: dict[str, int],
    outer: int | None,
    importance: str | None,
    threads: int,
) -> None:
    library, said = open_library()
    settings = library.llama_model_quantize_default_params()
    settings.nthread = threads
    settings.ftype = number
    if outer is not None:
        settings.output_tensor_type = settings.token_embedding_type = outer
    overrides = (library.llama_model_tensor_override * (len(kept) + 1))()
    for place, (name, kind) in enumerate(kept.items()):
        overrides[place].pattern = f"^{name.replace('.', '[.]')}$".encode()
        overrides[place].type = kind
    if kept:
        settings.tt_overrides = overrides
    entries, alive = _importance(library, importance)
    if alive:
        settings.imatrix = entries
    failed = library.llama_model_quantize(dense.encode(), target.encode(), ctypes.byref(settings))
    if failed:
        raise GateError(f"llama.cpp cannot quantize `{dense}`: {said.reason()}")


def _importance(library: Any, path: str | None) -> tuple[Any, list[Any]]:
    """The array that llama.cpp wants, ended by an empty entry, and what it points to."""
    if path is None:
        return None, []
    found = read_shard(Path(path), hint="run the command again")
    entries = (library.llama_model_imatrix_data * (len(found) + 1))()
    alive = []
    for place, (name, values) in enumerate(found.items()):
        data = (ctypes.c_float * len(values))(*values.tolist())
        alive.append(data)
        entries[place].name = name.encode()
        entries[place].data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
        entries[place].size = len(values)
    return entries, alive
