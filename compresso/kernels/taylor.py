"""How much weights matter, one number per matrix: by their gradient, or by their size alone.

The importance of a sub-block is the sum over its linears, that of a block the sum of both halves.
Both are sums, not means, as in the source: of two halves with weights alike, the smaller one goes
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.errors import NumericalError


def taylor_importance(weight: Tensor, gradient: Tensor) -> float:
    """The sum over elements of |w dL/dw|: what the loss changes, to first order, as each goes to 0.

    weight, gradient: the same shape, any floating dtype. Not modified. The gradient is that of the
                      mean loss over all tokens.

    Changes are summed without their signs, as those of single elements do not add up that far
    from where the gradient was taken.

    Raises NumericalError if the sum is not finite.

    Source: Ma et al., arXiv:2305.11627 (LLM-Pruner), first order, element-wise; summed over whole
    matrices and blocks by Kim et al., arXiv:2402.02834 (Shortened LLaMA), Taylor.
    """
    if weight.shape != gradient.shape:
        raise ValueError(
            f"a gradient of another shape: {tuple(weight.shape)} and {tuple(gradient.shape)}"
        )
    return _finite_sum((weight.float() * gradient.float()).abs(), "gradients")


def magnitude_importance(weight: Tensor) -> float:
    """The sum over elements of |w|.

    weight: any shape, any floating dtype. Not modified.

    Raises NumericalError if the sum is not finite.

    Source: Kim et al., arXiv:2402.02834 (Shortened LLaMA), magnitude, l1: the form that LLM-Pruner
    and others compare with.
    """
    return _finite_sum(weight.float().abs(), "weights")


def _finite_sum(terms: Tensor, name: str) -> float:
    total = terms.sum(dtype=torch.float64)
    if not bool(torch.isfinite(total)):
        raise NumericalError(f"the {name} of a linear are not finite")
    return float(total)
