"""Corrections of pooled inputs: merged into zeros they are what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compresso.errors import NumericalError
from compresso.kernels.grid import Packed, quantize
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.hqq import quantize as quantize_hqq
from compresso.kernels.pooled import merge_pooled, pool, spread

ROWS, COLUMNS, GROUP = 24, 96, 16


def weights(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def factors(rank: int = 3, groups: int = COLUMNS // GROUP) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(ROWS, rank, generator=generator) * 0.1
    return up, torch.randn(rank, groups, generator=generator) * 0.1


def codes_of(kind: str, bits: int = 2, dtype: torch.dtype = torch.float32) -> Packed | AffineCodes:
    if kind == "hqq":
        return quantize_hqq(weights(), bits=bits, group_size=GROUP, scale_dtype=dtype)
    return quantize(
        weights(),
        bits=bits,
        group_size=GROUP,
        symmetric=kind == "symmetric",
        grid="mse",
        scale_dtype=dtype,
    )


def test_pooling_is_a_sum_and_spreading_its_transpose() -> None:
    inputs = torch.arange(12.0).reshape(2, 6)
    assert pool(inputs, 3).tolist() == [[3, 12], [21, 30]]
    down = torch.tensor([[1.0, 10.0]])
    assert spread(down, 3).tolist() == [[1, 1, 1, 10, 10, 10]]
    x = torch.randn(5, COLUMNS)
    down = factors()[1]
    torch.testing.assert_close(pool(x, GROUP) @ down.T, x @ spread(down, GROUP).T)
    with pytest.raises(ValueError, match="6 columns do not divide into groups of 4"):
        pool(inputs, 4)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "hqq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merged_equals_unmerged(kind: str, bits: int) -> None:
    codes, (up, down) = codes_of(kind, bits), factors()
    kept = (codes.codes.clone(), codes.decode(), up.clone(), down.clone())
    merged = merge_pooled(codes, up, down)
    inputs = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(2))
    unmerged = inputs @ codes.decode().T + pool(inputs, GROUP) @ down.T @ up.T
    found = inputs @ merged.decode().T
    assert (found - unmerged).abs().max() < 1e-5 * 2**bits
    assert (unmerged - inputs @ codes.decode().T).abs().max() > 0.1
    assert torch.equal(merged.codes, kept[0]) and merged.zeros_in == torch.float32
    for now, before in zip((codes.decode(), up, down), kept[1:], strict=True):
        assert torch.equal(now, before)  # no argument was changed


def test_one_group_for_a_row() -> None:
    codes = quantize(
        weights(), bits=3, group_size=-1, symmetric=False, grid="mse", scale_dtype=torch.float32
    )
    up, down = factors(groups=1)
    change = merge_pooled(codes, up, down).decode() - codes.decode()
    torch.testing.assert_close(change, (up @ down).expand(-1, COLUMNS), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "worst"), [(2, 2**-11), (4, 2**-8)])
def test_zeros_are_rounded_once_and_to_nearest(bits: int, worst: float) -> None:
    """What is lost is at most half of the last digit of the largest zero, times the scale."""
    codes, (up, down) = codes_of("asymmetric", bits, torch.bfloat16), factors()
    exact = merge_pooled(codes, up, down)
    for dtype, digits in ((torch.float16, 1), (torch.bfloat16, 8)):
        merged = merge_pooled(codes, up, down, zero_dtype=dtype)
        assert merged.zeros_in == dtype and merged.dtype == torch.bfloat16
        assert torch.equal(merged.zero.to(dtype).float(), merged.zero)
        lost = (merged.zero - exact.zero).abs().max()
        assert 0.1 * worst * digits < lost <= 2 * worst * digits


def test_merging_twice_is_merging_the_sum() -> None:
    codes, (up, down) = codes_of("asymmetric"), factors()
    twice = merge_pooled(merge_pooled(codes, up, down), up, down)
    torch.testing.assert_close(twice.zero, merge_pooled(codes, 2 * up, down).zero)
    parts = twice.split([8, 16])
    assert [part.zeros_in for part in parts] == [torch.float32] * 2
    back = merge_pooled(twice, -2 * up, down)
    torch.testing.assert_close(back.decode(), codes.decode())


def test_the_wrong_shapes() -> None:
    codes, (up, down) = codes_of("asymmetric"), factors()
    for pair in ((up[1:], down), (up, down[:, 1:]), (up[:, 1:], down)):
        with pytest.raises(ValueError, match="do not fit 24 rows of 6 groups"):
            merge_pooled(codes, *pair)


def test_zeros_that_are_too_large() -> None:
    codes, (up, down) = codes_of("asymmetric"), factors()
    with pytest.raises(NumericalError, match=r"is not finite in torch\.float16") as caught:
        merge_pooled(codes, up * 1e6, down, zero_dtype=torch.float16)
    assert "float32" in str(caught.value.hint)
    assert merge_pooled(codes, up * 1e6, down).decode().isfinite().all()
