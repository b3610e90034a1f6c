"""How the C library gives freed memory back. Imports no torch."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_LARGE_TENSOR, _KEPT = 4 * 2**20, 64 * 2**20


def return_freed_memory() -> None:
    """Let glibc give large tensors back to the system when they are freed, and keep small ones.

    It raises the size from which it does so each time one is freed, up to 32 MB, and a heap of
    smaller tensors grows holes: by a block's size per block, measured on one of 115 MB. With that
    size given, it returns all but 128 KB at the end of a heap, and work in tiles, each of some MB,
    spends a third of its time on getting them back.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_TENSOR)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
