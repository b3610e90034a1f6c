"""Tokens are drawn as often as they are probable."""

import pytest
import torch

from compresso.kernels.sampling import draw_tokens

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


def drawn(count=10000, logits=LOGITS, **options):
    draws = (torch.arange(count) + 0.5) / count  # evenly: shares are exact
    settings = {"temperature": 1.0, "top_p": 1.0} | options
    tokens = draw_tokens(logits.expand(count, -1), draws, **settings)
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_shares_are_probabilities():
    assert torch.allclose(drawn(), torch.tensor([0.4, 0.1, 0.3, 0.2]), atol=2e-4)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(drawn(temperature=temperature), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("top_p", "shares"),
    [
        (0.05, [1, 0, 0, 0]),
        (0.4, [1, 0, 0, 0]),
        (0.41, [4 / 7, 0, 3 / 7, 0]),
        (0.8, [4 / 9, 0, 3 / 9, 2 / 9]),
        (0.999, [0.4, 0.1, 0.3, 0.2]),
    ],
)
def test_top_p_leaves_the_least_probable_out(top_p, shares):
    assert torch.allclose(drawn(top_p=top_p), torch.tensor(shares).float(), atol=2e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_draws(top_p):
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert set(draw_tokens(logits, ends, temperature=1.0, top_p=top_p).tolist()) == {1, 2}


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    draws = torch.rand(6, generator=generator)
    options = {"temperature": 0.8, "top_p": 0.9}
    together = draw_tokens(logits, draws, **options)
    alone = [draw_tokens(logits[i : i + 1], draws[i : i + 1], **options) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
