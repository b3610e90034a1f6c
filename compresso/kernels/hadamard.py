"""Rotation by an orthonormal Hadamard matrix, which makes any weights look normal."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.kernels.tiles import CPU_TILE, GPU_TILE

# Values transformed at once: they and their scratch copies fit the second-level cache of a CPU,
# while a GPU needs more work per launch.


def block_size(columns: int, most: int) -> int:
    """The largest power of two that divides `columns` and is at most `most`, itself at least 1."""
    return min(columns & -columns, 1 << (most.bit_length() - 1))


def transform(values: Tensor, block: int) -> Tensor:
    """Multiply every run of `block` values of the last dimension by the Hadamard matrix.

    values: (..., columns) of a floating type that matrices multiply well in. Not modified.
    block:  a power of two that divides `columns`.

    The matrix is Sylvester's over the root of `block`: symmetric and its own inverse, so this
    function is its own inverse too, and keeps the sum of squares of every run.

    Takes the matrix as a Kronecker product of two of about the root of its size: for 1024, 64
    multiplications a value, in the fast form of products of 32 x 32 matrices.
    """
    right = 1 << (block.bit_length() // 2)
    left = block // right
    row_wise, column_wise = _sylvester(right, values), _sylvester(left, values)
    flat = values.reshape(-1, left, right)
    result = torch.empty_like(flat)
    step = max(1, (CPU_TILE if values.device.type == "cpu" else GPU_TILE) // block)
    for start in range(0, len(flat), step):
        here = slice(start, start + step)
        half = torch.matmul(flat[here].reshape(-1, right), row_wise).view(-1, left, right)
        torch.matmul(column_wise, half, out=result[here])
    return result.view(values.shape)


def transform_gram(gram: Tensor, block: int) -> Tensor:
    """The gram of inputs whose runs of `block` were transformed: H G H^T.

    gram: G, (columns, columns), symmetric. Not modified.
    """
    return transform(transform(gram, block).t(), block)


def _sylvester(size: int, like: Tensor) -> Tensor:
    """The orthonormal matrix of `size`, in the type and on the device of `like`."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
