"""Write a safetensors file, so that it stays written; and take files away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compresso.checkpoint.directory import DTYPES


def flush_directory(path: Path) -> None:
    """Make a rename in `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors in the safetensors format, to a file that is open.

    tensors: on any device; views and shared memory are written out in full. Not modified. If it
             makes them as they are asked for, it is asked for each twice, and none is held.

    Unlike the library's own writer, this lets the caller flush and name the file, keeps its
    access rights, and fails with the OSError of the system. Source: the format's README,
    github.com/huggingface/safetensors.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    kinds = {name: (one.dtype, list(one.shape), one.nbytes) for name, one in tensors.items()}
    # Wide types first, as the library does it: every tensor is then aligned to its element size.
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in names:
        dtype, shape, nbytes = kinds[name]
        end = start + nbytes
        header[name] = {"dtype": words[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)
