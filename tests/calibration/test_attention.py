"""Tokens count in grams by the attention they receive, as the model's own attention computes it."""

from types import SimpleNamespace

import pytest
import torch
from restructured import save
from tiny_models import BLOCKS, build
from torch.nn import functional
from walking import BATCHES, PROBE, STATES_BYTES, changed, difference, start

from compresso.calibration import attention
from compresso.calibration.attention import (
    ReceivedAttention,
    attention_received,
    token_importance,
)
from compresso.calibration.walk import walk_blocks
from compresso.errors import ConfigError
from compresso.families import family_of
from compresso.models.structure import Structure

LENGTH, WIDTH = 11, 8


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lower(keep=LENGTH):
    """What queries see of the last `keep` tokens up to their own."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return seen & ~torch.ones_like(seen).tril(-keep)


CASES = {
    "causal": {"causal": True},
    "all": {},
    "window": {"mask": lower(3)[None, None]},
    "bias": {"mask": numbers(2, 4, LENGTH, LENGTH, seed=9).masked_fill(~lower(), -1e30)},
    "scale": {"causal": True, "scale": 0.7},
}


@pytest.mark.parametrize("room", [1, 200, 10**6])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_received_attention_is_that_of_softmax(monkeypatch, case, key_heads, room):
    monkeypatch.setattr(attention, "SCORES_BYTES", room)
    query, key = numbers(2, 4, LENGTH, WIDTH), numbers(2, key_heads, LENGTH, WIDTH, seed=1)
    kept = query.clone(), key.clone()
    found = attention_received(query, key, **CASES[case])
    asked = SimpleNamespace(**{"mask": None, "causal": False, "scale": WIDTH**-0.5} | CASES[case])
    scores = query.double() @ key.double().repeat_interleave(4 // key_heads, 1).mT * asked.scale
    if asked.causal:
        scores.masked_fill_(~lower(), -torch.inf)
    if asked.mask is not None and asked.mask.dtype == torch.bool:
        scores.masked_fill_(~asked.mask, -torch.inf)
    elif asked.mask is not None:
        scores += asked.mask
    assert difference(found, scores.softmax(-1).sum((1, 2))) < 1e-6
    assert found.sum().item() == pytest.approx(2 * 4 * LENGTH)
    assert torch.equal(query, kept[0]) and torch.equal(key, kept[1])


def test_watched_attention_has_the_shape_of_any():
    query, key, value = numbers(2, 4, 6, 8), numbers(2, 2, 6, 8), numbers(2, 2, 6, 5)
    arguments = {"is_causal": True, "enable_gqa": True}
    expected = functional.scaled_dot_product_attention(query, key, value, **arguments)
    with ReceivedAttention() as watched:
        found = functional.scaled_dot_product_attention(query, key, value, **arguments)
    assert found.shape == expected.shape and not found.any()
    assert watched.received.shape == (2, 6)


def test_attention_that_shows_nothing_is_refused():
    with ReceivedAttention() as watched:
        functional.softmax(torch.ones(3, 4), dim=-1)  # as of an expert's router
    with pytest.raises(ConfigError, match="does not show its probabilities"):
        _ = watched.received


def test_importance_grows_as_attention_does():
    received = torch.tensor([[1.0, 3.0, 2.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    kept = received.clone()
    found = token_importance(received, least=0.2)
    weights = torch.tensor([0.2, 1.0, 0.6, 0.2])
    assert torch.allclose(found[0], weights / 0.5)
    assert torch.equal(found[1], torch.ones(4))
    assert torch.equal(token_importance(received, least=1), torch.ones(2, 4))
    assert torch.equal(token_importance(torch.ones(1, 1), least=0.1), torch.ones(1, 1))
    assert found.dtype == torch.float32 and torch.equal(received, kept)


def weighted_gram(rows, importance):
    """The mean of r x x^T with r divided by its mean in each sequence, token by token."""
    total, count = 0, 0
    for row, weight in zip(rows, importance, strict=True):
        for tokens, share in zip(row.double(), weight.double(), strict=True):
            for x, r in zip(tokens, share / share.mean(), strict=True):
                total = total + r * torch.outer(x, x)
                count += 1
    return total / count


@torch.no_grad()
def reference(name, block, path, least):
    """That gram of a linear's input in the whole model, by the probabilities that it returns."""
    model = build(name, attn_implementation="eager")
    rows, importance = [], []
    place = f"{family_of(name).blocks}.{block}.{path}"
    handle = model.get_submodule(place).register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0])
    )
    for batch in BATCHES:
        found = model(batch, use_cache=False, output_attentions=True).attentions[block]
        assert found.shape[0] == len(batch) and found.shape[2:] == (20, 20)
        received = found.sum((1, 2))
        low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        importance.append(least + (1 - least) * (received - low) / (high - low))
        rows[-1] = rows[-1].view(*batch.shape, -1)
    handle.remove()
    return weighted_gram(rows, importance)


def test_grams_are_weighted_by_the_models_own_attention(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter, states = start(source, probe=PROBE)
    for block in walk_blocks(adapter, source, states):
        block.weigh_tokens(0.05)
        if block.index in (1, BLOCKS - 1):  # with and without a window, where there are both
            for group in adapter.family.linears:
                expected = reference(family_name, block.index, group[0], 0.05)
                assert difference(block.gram(group).double(), expected) < 1e-5


def quantized(source, least=None, **options):
    """All grams and the final states of a walk that changes every linear."""
    adapter, states = start(source, **options)
    grams = []
    for block in walk_blocks(adapter, source, states):
        if least is not None:
            block.weigh_tokens(least)
        for group in adapter.family.linears:
            grams.append(block.gram(group))
            for path in group:
                adapter.set_weight(block.module, path, changed(adapter.weight(block.module, path)))
    return grams, [states[batch].clone() for batch in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_equal_importance_changes_no_bit(checkpoints, name, dtype):
    grams, states = quantized(checkpoints(name), dtype=dtype)
    same, same_states = quantized(checkpoints(name), least=1.0, dtype=dtype)
    weighted, _ = quantized(checkpoints(name), least=0.1, dtype=dtype)
    assert all(map(torch.equal, grams, same)) and all(map(torch.equal, states, same_states))
    assert all(difference(one, other) > 0.01 for one, other in zip(weighted, grams, strict=True))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_spilling_changes_nothing(checkpoints, name, tmp_path):
    grams, states = quantized(checkpoints(name), least=0.1)
    for budget in (0, STATES_BYTES):
        spilled = quantized(checkpoints(name), least=0.1, budget=budget, spill_dir=tmp_path)
        assert all(map(torch.equal, grams, spilled[0]))
        assert all(map(torch.equal, states, spilled[1]))


def test_without_attention_all_tokens_count_alike(tmp_path):
    source = save(build("llama"), Structure(no_attention=(1,)), tmp_path / "restructured")
    found = []
    for weigh in (True, False):
        adapter, states = start(source)
        for block in walk_blocks(adapter, source, states):
            if block.index == 1:
                if weigh:
                    block.weigh_tokens(0.1)
                found.append(block.gram(adapter.family.linears[2]))
    assert torch.equal(*found)


def test_a_block_that_was_run_cannot_be_weighed(checkpoints):
    adapter, states = start(checkpoints("llama"))
    walk = walk_blocks(adapter, checkpoints("llama"), states)
    block = next(walk)
    list(block.forward_with_parts())
    with pytest.raises(RuntimeError, match="block 0 has been run"):
        block.weigh_tokens(0.1)
