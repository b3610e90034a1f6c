"""Work on parts of a matrix that fit a cache, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Weights worked on at once: they stay in a cache, and with fewer, threads wait for the interpreter.
CPU_TILE = 2**19
GPU_TILE = 2**25


def row_tiles(matrix: Tensor) -> list[slice]:
    """Slices of the rows of a matrix, (rows, columns), that fit a cache."""
    rows, columns = matrix.shape
    step = max(1, (CPU_TILE if matrix.device.type == "cpu" else GPU_TILE) // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def on_each(work: Callable[[T], None], tiles: Iterable[T], device: torch.device) -> None:
    """Do some work on every tile, on a CPU with as many threads as PyTorch would use.

    work:   must not need gradients, and write nowhere that it does for another tile.
    device: where the tiles are.

    A tile is too small for its operations to be shared by cores: threads would wait for each
    other after each. So one thread does all the work on a tile. The result is the same.
    """
    every, threads = list(tiles), torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(every) == 1:
        for tile in every:
            work(tile)
        return

    def alone(tile: T) -> None:
        with torch.no_grad():  # the caller's is not known to other threads
            work(tile)

    try:
        with ThreadPoolExecutor(
            min(threads, len(every)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for _ in pool.map(alone, every):
                pass  # raises what a tile raised
    finally:
        torch.set_num_threads(threads)  # those that later threads start with
