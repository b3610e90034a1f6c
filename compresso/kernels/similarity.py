"""How much a block, or a part of it, turns the residual stream.

Every function reads hidden states token by token and compares directions only. Products are summed
in float64: the massive activations of real models overflow float16, and the cosine of two nearly
parallel tokens loses its last digits in float32, which is where good candidates for dropping are.
A token is a row of the last dimension. Two zero tokens count as parallel, a zero token and another
one as orthogonal.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from compresso.errors import NumericalError


def similarity(x: Tensor, y: Tensor) -> float:
    """The mean over tokens of the cosine between `x` and `y`.

    x, y: (..., width), any floating dtype, the same shape. Not modified.

    A sub-block's score is the similarity of its residual stream before and after it. Exactly 1 if
    every token of `y` is a positive multiple of the one in `x`, up to float32 rounding of `y`.

    Raises NumericalError if a value is not finite.

    Source: He et al., arXiv:2406.15786 (LLM-Drop).
    """
    # Rounding each cosine to float32 takes parallel tokens to exactly 1.
    return float(_cosine(x, y).float().double().mean())


def block_influence(x: Tensor, y: Tensor) -> float:
    """One minus the mean over tokens of the cosine between a block's input and output.

    x, y: (..., width), any floating dtype, the same shape. Not modified.

    0 for a block that leaves every direction as it is, 2 for one that inverts it.

    Raises NumericalError if a value is not finite.

    Source: Men et al., arXiv:2403.03853 (ShortGPT), Block Influence.
    """
    return 1.0 - similarity(x, y)


def angular_distance(x: Tensor, y: Tensor) -> float:
    """The mean over tokens of the angle between `x` and `y`, in half turns.

    x, y: (..., width), any floating dtype, the same shape. Not modified.

    0 for parallel tokens, 0.5 for orthogonal, 1 for opposite ones.

    Raises NumericalError if a value is not finite.

    Source: Gromov et al., arXiv:2403.17887, equation 7.
    """
    return float(_half_turns(_cosine(x, y)).mean())


def pairwise_angular_distance(states: Tensor) -> Tensor:
    """The angular distance between every two of several states of the same tokens.

    states: (count, tokens, width), any floating dtype. Not modified.

    Returns (count, count) float64: entry (i, j) is angular_distance(states[i], states[j]).
    Needs 8 * count * (width + 3 * count) bytes per token.

    Raises NumericalError if a value is not finite.
    """
    rows = states.transpose(0, 1).double()
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    cosine = _ratio(products, squares[:, :, None], squares[:, None, :])
    return _half_turns(cosine).mean(dim=0)


def alignment(grams: Tensor) -> Tensor:
    """Linear CKA of every two representations of the same tokens, (n, n) float64.

    grams: (n, tokens, tokens), the products x x^T of each representation's tokens. Not modified.

    1 for representations that differ by a rotation and a scale, 0 for uncorrelated ones.

    Source: Kornblith et al., arXiv:1905.00414, equation 3.
    """
    centred = grams.double()
    centred = centred - centred.mean(1, keepdim=True)
    centred = (centred - centred.mean(2, keepdim=True)).flatten(1)
    products = centred @ centred.T
    lengths = products.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return products / lengths / lengths[:, None]


def relative_distance(samples: Tensor) -> Tensor:
    """||a - b|| / sqrt(||a||^2 + ||b||^2) of every two rows, (n, n) float64.

    samples: (n, weights), any floating dtype: the same weights of each. Not modified.

    0 for equal rows, 1 for orthogonal ones, sqrt(2) for opposite ones.
    """
    rows = samples.double()
    products = rows @ rows.T
    energy = products.diagonal()
    sums = energy + energy[:, None]
    return ((sums - 2 * products).clamp(min=0) / sums.clamp(min=1e-300)).sqrt()


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        raise ValueError(f"states of different shapes: {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    return _ratio((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1))


def _ratio(product: Tensor, square: Tensor, other_square: Tensor) -> Tensor:
    # One root of the product, not a product of two roots: sqrt(a * a) is exactly a.
    norms = (square * other_square).sqrt()
    parallel = ((square == 0) & (other_square == 0)).double()
    cosine = torch.where(norms == 0, parallel, product / norms)
    if not bool(torch.isfinite(cosine).all()):
        raise NumericalError(
            "hidden states are not finite",
            hint="the model overflows here: run it in `--dtype float32`",
        )
    return cosine.clamp(-1.0, 1.0)


def _half_turns(cosine: Tensor) -> Tensor:
    return cosine.arccos() / pi
