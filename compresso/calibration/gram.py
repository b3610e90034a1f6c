"""Means of products over tokens, weighted or not, such as the gram of a linear's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Columns whose products with themselves and all later ones are taken at once. Half of a gram
# follows from the other half; wide enough for full speed, narrow enough to leave most of it out.
PANEL = 128


class GramSum:
    """A running sum of x x^T, kept above the diagonal only until the mean is taken."""

    def __init__(self, columns: int, device: torch.device) -> None:
        """columns: size of x."""
        self._total = torch.zeros(columns, columns, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor, importance: Tensor | None = None) -> None:
        """Take in tokens: (..., columns), in any floating type. Not modified.

        importance: (...) float32, what each token counts; 1 if None. The mean divides by the
                    number of tokens all the same: let the mean of `importance` be 1.
        """
        rows = inputs.reshape(-1, len(self._total))
        if importance is not None:
            scaled = rows.float() * importance.reshape(-1, 1).sqrt()
            # bfloat16 rounds once more what was rounded to it before, and stays twice as fast.
            # float16 is no faster, and may overflow.
            rows = scaled.bfloat16() if rows.dtype == torch.bfloat16 else scaled
        with _products_of(rows.dtype):
            rows = rows.float()
            for start in range(0, len(self._total), PANEL):
                panel = rows[:, start : start + PANEL].T
                self._total[start : start + PANEL, start:].addmm_(panel, rows[:, start:])
        self._tokens += len(rows)

    def mean(self) -> Tensor:
        """The gram, (columns, columns) float32, exactly symmetric. Take it once, at the end."""
        for start in range(0, len(self._total), PANEL):
            end = start + PANEL
            corner = self._total[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self._total[end:, start:end] = self._total[start:end, end:].T
        return self._total.div_(self._tokens)


class ProductSum:
    """A running sum of y x^T."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        """rows: size of y. columns: size of x."""
        self._total = torch.zeros(rows, columns, device=device)
        self._tokens = 0

    def add(self, left: Tensor, right: Tensor, importance: Tensor | None = None) -> None:
        """Take in tokens: y, (..., rows), and x, (..., columns). Not modified.

        importance: as in `GramSum.add`.
        """
        rows = left.reshape(-1, len(self._total)).float()
        if importance is not None:
            rows = rows * importance.reshape(-1, 1)
        # Where x is bfloat16, y is rounded to it too: less than what x was rounded by.
        with _products_of(right.dtype):
            self._total.addmm_(rows.T, right.reshape(len(rows), -1).float())
        self._tokens += len(rows)

    def mean(self) -> Tensor:
        """The mean, (rows, columns) float32. Take it once, at the end."""
        return self._total.div_(self._tokens)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let a CPU multiply float32 copies of bfloat16 numbers as the bfloat16 that they are.

    The products and their float32 sum are exact either way, and oneDNN is twice as fast at it.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # None before torch 2.9
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
