"""What linears miss is what two whole models, one of them changed, say of it."""

from __future__ import annotations

import pytest
import torch
from restructured import STRUCTURES, reference, save
from tiny_models import build
from walking import BATCHES, RAM, STATES_BYTES, changed, difference, direct_gram, start

from compresso.calibration.originals import Originals
from compresso.calibration.states import enter_blocks
from compresso.calibration.walk import walk_blocks
from compresso.errors import ResourceError

NORMED = ("gemma2", "gemma3_text", "olmo2")  # what a half adds is normed first


def following(source, **options):
    """A walk, and the original model beside it."""
    adapter, states = start(source, **options)
    entered = enter_blocks(
        adapter,
        source,
        BATCHES,
        probe=None,
        budget=options.get("budget", RAM),
        spill_dir=options.get("spill_dir"),
    )
    return adapter, states, Originals(adapter, entered)


@torch.no_grad()
def heard(model, family, block, path):
    """By token, in float64: a linear's input, its output, and the stream of its half."""
    root = model.get_submodule(f"{family.blocks}.{block}")
    kept = {"input": [], "output": [], "before": [], "attention": []}
    scale = getattr(model.config, family.multiplier) if family.multiplier else 1

    def rows(tensor):
        return tensor.reshape(-1, tensor.shape[-1]).double()

    def enters(_, inputs, named):
        kept["before"].append(rows(inputs[0] if inputs else named["hidden_states"]))

    def linear(_, inputs, output):
        kept["input"].append(rows(inputs[0]))
        kept["output"].append(rows(output))

    def attention(_, __, output):
        kept["attention"].append(rows(output[0] if isinstance(output, tuple) else output))

    handles = [
        root.register_forward_pre_hook(enters, with_kwargs=True),
        root.get_submodule(path).register_forward_hook(linear),
        root.get_submodule(family.attention_output).register_forward_hook(attention),
    ]
    for batch in BATCHES:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = {name: torch.cat(tensors) for name, tensors in kept.items()}
    stream = found["before"]
    if path in family.linears[3]:
        stream = stream + scale * found["attention"]
    return found["input"], stream / scale


def naive(model, original, family, block, paths, group, weights):
    """`missing` from the formula, in float64."""
    now, stream = heard(model, family, block, paths[0])
    then, original_stream = heard(original, family, block, paths[0])
    weight = torch.cat([one.double() for one in weights])
    missing = weight @ (then - now).T @ now
    if group % 2 and original.config.model_type not in NORMED:
        missing += (original_stream - stream).T @ now
    return missing / len(now)


def check(source, model, original, structure=None):
    adapter, states, originals = following(source)
    family = adapter.family
    largest = 0.0
    for block in walk_blocks(adapter, source, states):
        originals.record(block.index)
        whole = model.get_submodule(family.blocks)[block.index]
        effective = original.get_submodule(family.blocks)[block.index]
        for group, paths in enumerate(family.linears):
            if structure is not None and structure.lacks(2 * block.index + (group >= 2)):
                continue
            weights = [adapter.weight(effective, path) for path in paths]
            expected = naive(model, original, family, block.index, paths, group, weights)
            gram, missing = originals.gram(block, paths)
            direct = direct_gram(model, f"{family.blocks}.{block.index}.{paths[0]}")
            assert difference(gram.double(), direct) < 1e-5
            assert missing.dtype == torch.float32
            assert (missing - expected).abs().max() < 1e-5 * max(1, expected.abs().max().item())
            largest = max(largest, expected.abs().max().item())
            for path in paths:
                old = adapter.weight(block.module, path)
                new = changed(old)
                whole_weight = adapter.weight(whole, path)
                adapter.set_weight(whole, path, whole_weight + new - old)
                adapter.set_weight(block.module, path, new)
    assert largest > 1e-2


def test_what_is_missing_is_what_two_whole_models_say(models, checkpoints, family_name):
    check(checkpoints(family_name), build(family_name), models(family_name))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["both kinds", "corrected"])
def test_blocks_that_lack_a_half_or_have_corrections(family, kind, tmp_path):
    structure = STRUCTURES[kind]
    source = save(build(family), structure, tmp_path / "restructured")
    check(source, reference(family, structure), reference(family, structure), structure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nothing_was_changed_nothing_is_missing(checkpoints, family_name, dtype):
    """Not even by rounding: every bit is zero."""
    adapter, states, originals = following(checkpoints(family_name), dtype=dtype)
    _, plain = start(checkpoints(family_name), dtype=dtype)
    walk = walk_blocks(adapter, checkpoints(family_name), states)
    grams = []
    for block in walk:
        originals.record(block.index)
        for paths in adapter.family.linears:
            gram, missing = originals.gram(block, paths)
            assert missing.count_nonzero() == 0
            grams.append(gram)
    for block in walk_blocks(adapter, checkpoints(family_name), plain):
        for paths in adapter.family.linears:
            assert torch.equal(block.gram(paths), grams.pop(0))
    for batch in range(3):
        assert torch.equal(states[batch], plain[batch])
        assert torch.equal(originals.states[batch], plain[batch])


def missed(source, *, least=None, **options):
    adapter, states, originals = following(source, **options)
    found = []
    for block in walk_blocks(adapter, source, states):
        originals.record(block.index)
        if least is not None:
            block.weigh_tokens(least)
        for paths in adapter.family.linears:
            found.append(originals.gram(block, paths)[1])
            for path in paths:
                adapter.set_weight(block.module, path, changed(adapter.weight(block.module, path)))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_spilling_changes_nothing(checkpoints, family, tmp_path):
    source = checkpoints(family)
    spilled = missed(source, budget=0, spill_dir=tmp_path)
    assert all(map(torch.equal, missed(source), spilled))
    assert list(tmp_path.iterdir()) == []


def test_what_fits_nowhere_is_refused(checkpoints):
    adapter, _, originals = following(checkpoints("llama"), budget=4 * STATES_BYTES)
    adapter.load_block(0, checkpoints("llama"))
    with pytest.raises(ResourceError, match="hidden states need"):
        originals.record(0)


def test_tokens_count_as_they_do_in_the_gram(checkpoints):
    source = checkpoints("llama")
    alike, plain = missed(source, least=1.0), missed(source)
    assert all(map(torch.equal, alike, plain))
    assert difference(missed(source, least=0.01)[4], plain[4]) > 1e-2
