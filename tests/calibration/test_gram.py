"""A gram is the mean of x x^T, to float32 precision, whatever type x has."""

import pytest
import torch

from compresso.calibration.gram import PANEL, GramSum


@pytest.mark.parametrize("columns", [24, PANEL, 2 * PANEL + 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_products(columns, dtype):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 2, columns)
    parts = [(torch.randn(n, 3, columns, generator=generator) * scales).to(dtype) for n in (50, 7)]
    kept = [part.clone() for part in parts]
    total = GramSum(columns, torch.device("cpu"))
    for part in parts:
        total.add(part)
    rows = torch.cat([part.reshape(-1, columns).double() for part in parts])
    expected = rows.T @ rows / len(rows)
    # Relative to the columns' own sizes, which differ by a factor of 10,000.
    sizes = expected.diagonal().sqrt()
    mean = total.mean()
    assert ((mean - expected) / sizes / sizes[:, None]).abs().max() < 1e-6
    assert mean.dtype == torch.float32 and torch.equal(mean, mean.T)
    assert all(map(torch.equal, parts, kept))


def test_the_backend_is_left_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    GramSum(8, torch.device("cpu")).add(torch.ones(4, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 1e-6)]
)
def test_tokens_count_as_they_are_told(dtype, limit):
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(4, 50, 24, generator=generator) * 8000).to(dtype)
    importance = torch.rand(4, 50, generator=generator) * 100
    kept = inputs.clone(), importance.clone()
    total = GramSum(24, torch.device("cpu"))
    total.add(inputs, importance)
    rows = inputs.reshape(-1, 24).double()
    expected = rows.T @ (rows * importance.reshape(-1, 1)) / len(rows)
    mean = total.mean()
    assert (mean - expected).abs().max() / expected.abs().max() < limit
    assert torch.equal(mean, mean.T) and torch.linalg.eigvalsh(mean).min() > 0
    assert torch.equal(inputs, kept[0]) and torch.equal(importance, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_importance_one_count_as_any(dtype):
    inputs = torch.randn(3, 9, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    grams = []
    for importance in (None, torch.ones(3, 9)):
        total = GramSum(200, torch.device("cpu"))
        total.add(inputs, importance)
        grams.append(total.mean())
    assert torch.equal(*grams)
