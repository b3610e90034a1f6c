"""A live block's grams are those of the whole model, and nothing is run twice for them."""

import pytest
import torch
from tiny_models import BLOCKS, build
from walking import (
    PROBE,
    RAM,
    STATES_BYTES,
    changed,
    difference,
    direct_gram,
    outputs,
    start,
)

from compresso.calibration.walk import walk_blocks
from compresso.families import family_of


def test_grams_are_those_of_the_whole_model_with_the_weights_as_they_are(
    checkpoints, family_name, tmp_path
):
    source, model = checkpoints(family_name), build(family_name)
    adapter, states = start(source, probe=PROBE)
    family = adapter.family
    for block in walk_blocks(adapter, source, states):
        reference = model.get_submodule(family.blocks)[block.index]
        for group in family.linears:
            gram = block.gram(group)
            assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
            for path in group:
                expected = direct_gram(model, f"{family.blocks}.{block.index}.{path}")
                assert difference(gram.double(), expected) < 1e-5
            for path in group:
                weight = changed(adapter.weight(block.module, path))
                adapter.set_weight(block.module, path, weight)
                adapter.set_weight(reference, path, weight)
    for batch, expected in enumerate(outputs(model, f"{family.blocks}.{BLOCKS - 1}")):
        assert difference(states[batch], expected) < 1e-5


def quantized(source, **options):
    """All grams and the final states of a walk that changes every linear."""
    adapter, states = start(source, **options)
    grams = []
    for block in walk_blocks(adapter, source, states):
        for group in adapter.family.linears:
            grams.append(block.gram(group))
            for path in group:
                adapter.set_weight(block.module, path, changed(adapter.weight(block.module, path)))
    return grams, [states[batch].clone() for batch in range(3)]


@pytest.mark.parametrize("budget", [0, STATES_BYTES, 2 * STATES_BYTES])
def test_spilling_changes_nothing(checkpoints, family_name, tmp_path, budget):
    grams, states = quantized(checkpoints(family_name))
    spilled_grams, spilled_states = quantized(
        checkpoints(family_name), budget=budget, spill_dir=tmp_path
    )
    assert all(map(torch.equal, grams, spilled_grams))
    assert all(map(torch.equal, states, spilled_states))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_states_spill_too(checkpoints, tmp_path):
    grams, states = quantized(checkpoints("gemma2"), dtype=torch.bfloat16)
    spilled = quantized(checkpoints("gemma2"), dtype=torch.bfloat16, budget=0, spill_dir=tmp_path)
    assert states[0].dtype == torch.bfloat16
    assert all(map(torch.equal, grams, spilled[0])) and all(map(torch.equal, states, spilled[1]))


def calls(module, paths):
    """Count how often each of the modules is called from now on."""
    counts = dict.fromkeys(paths, 0)

    def count(path):
        def hook(*_):
            counts[path] += 1

        return hook

    for path in paths:
        module.get_submodule(path).register_forward_hook(count(path))
    return counts


@pytest.mark.parametrize("budget", [RAM, STATES_BYTES])
def test_no_linear_is_run_twice_on_the_same_tokens(checkpoints, family_name, tmp_path, budget):
    source = checkpoints(family_name)
    adapter, states = start(source, budget=budget, spill_dir=tmp_path)
    family = adapter.family
    for block in walk_blocks(adapter, source, states, keep=[2]):
        counts = calls(block.module, [path for group in family.linears for path in group])
        for group in family.linears:
            block.gram(group)
    # Without the room for what reaches the last linear, the first of the MLP run once more.
    again = family.linears[2] if budget != RAM else ()
    assert counts == {path: 6 if path in again else 3 for path in counts}


def test_groups_may_be_left_out(models, checkpoints, family_name):
    source, family = checkpoints(family_name), family_of(family_name)
    for asked in ([2], [3], [0, 1, 3]):
        adapter, states = start(source)
        for block in walk_blocks(adapter, source, states):
            for group in asked:
                path = family.linears[group][-1]
                expected = direct_gram(models(family_name), f"{family.blocks}.{block.index}.{path}")
                assert difference(block.gram((path,)).double(), expected) < 1e-5
        expected = outputs(models(family_name), f"{family.blocks}.{BLOCKS - 1}")[1]
        assert difference(states[1], expected) < 1e-5


def test_the_probe_is_in_no_statistic(checkpoints, family_name):
    source = checkpoints(family_name)
    grams = []
    for probe in (None, PROBE):
        adapter, states = start(source, probe=probe)
        walk = walk_blocks(adapter, source, states)
        grams.append([b.gram(group) for b in walk for group in adapter.family.linears])
    assert all(map(torch.equal, *grams))


def first_block(checkpoints, name="llama"):
    adapter, states = start(checkpoints(name))
    walk = walk_blocks(adapter, checkpoints(name), states)
    return adapter, next(walk), walk


@pytest.mark.parametrize("in_place", [True, False])
def test_stale_recordings_are_never_used(checkpoints, in_place):
    adapter, block, walk = first_block(checkpoints)
    block.gram(("self_attn.o_proj",))
    weight = adapter.weight(block.module, "self_attn.v_proj")
    if in_place:
        weight.mul_(2)
    else:
        adapter.set_weight(block.module, "self_attn.v_proj", weight * 2)
    with pytest.raises(RuntimeError, match=r"v_proj\.weight was changed after the input of self_a"):
        block.gram(("mlp.up_proj",))
    with pytest.raises(RuntimeError, match=r"v_proj\.weight was changed"):
        next(walk)


@pytest.mark.parametrize(
    ("asked", "later"),
    [("mlp.up_proj", "self_attn.o_proj"), ("mlp.down_proj", "mlp.gate_proj")],
)
def test_weights_of_earlier_groups_must_not_change_any_more(checkpoints, asked, later):
    adapter, block, walk = first_block(checkpoints)
    block.gram((asked,))
    adapter.set_weight(block.module, later, adapter.weight(block.module, later) * 2)
    with pytest.raises(RuntimeError, match=f"{later}.weight was changed"):
        next(walk)


def test_any_weight_may_change_once_recordings_are_forgotten(checkpoints):
    grams, left = [], []
    for recorded in (True, False):
        adapter, states = start(checkpoints("llama"))
        walk = walk_blocks(adapter, checkpoints("llama"), states)
        block = next(walk)
        if recorded:
            block.gram(("mlp.down_proj",))
        block.module.get_parameter("self_attn.v_proj.weight").mul_(2)
        block.forget()
        grams.append(block.gram(("mlp.down_proj",)))
        next(walk)
        left.append(states[1].clone())
    assert torch.equal(*grams) and torch.equal(*left)


def test_a_block_that_was_run_has_no_gram(checkpoints):
    _, block, _ = first_block(checkpoints)
    next(block.forward_with_parts())
    list(block.forward_with_parts())
    with pytest.raises(RuntimeError, match="block 0 has been run"):
        block.gram(("self_attn.o_proj",))


@pytest.mark.parametrize(
    "paths", [(), ("self_attn.q_proj", "self_attn.o_proj"), ("mlp.third_proj",)]
)
def test_a_gram_is_of_one_group(checkpoints, paths):
    _, block, _ = first_block(checkpoints)
    with pytest.raises(ValueError, match="not linears of one input group"):
        block.gram(paths)
