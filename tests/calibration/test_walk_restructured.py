"""Walking restructured models: statistics of the halves that are there, zeros for the others."""

import pytest
import torch
from restructured import STRUCTURES, linears, reference, save
from tiny_models import BLOCKS, build
from walking import PROBE, changed, difference, direct_gram, outputs, real, start

from compresso.calibration.walk import walk_blocks


@pytest.mark.parametrize("kind", STRUCTURES)
def test_grams_are_those_of_the_whole_model(family_name, kind, tmp_path):
    structure = STRUCTURES[kind]
    source = save(build(family_name), structure, tmp_path / "restructured")
    adapter, states = start(source, probe=PROBE)
    family, model = adapter.family, reference(family_name, structure)
    for block in walk_blocks(adapter, source, states):
        for number, group in enumerate(family.linears):
            if structure.lacks(2 * block.index + (number >= 2)):
                half = "MLP" if number >= 2 else "attention"
                with pytest.raises(ValueError, match=f"block {block.index} has no {half}"):
                    block.gram(group)
            else:
                expected = direct_gram(model, f"{family.blocks}.{block.index}.{group[-1]}")
                assert difference(block.gram(group).double(), expected) < 1e-5
    last = f"{family.blocks}.{BLOCKS - 1}"
    for batch, expected in enumerate(outputs(model, last)):
        assert difference(states[batch], expected) < 1e-5
    assert difference(states.probe, outputs(model, last, [PROBE])[0]) < 1e-5
    assert real(adapter) == []


@pytest.mark.parametrize("kind", ["both kinds", "everything"])
def test_a_missing_half_adds_zeros(family_name, kind, tmp_path):
    structure = STRUCTURES[kind]
    source = save(build(family_name), structure, tmp_path / "restructured")
    adapter, states = start(source)
    _, expected = start(source)
    plain = walk_blocks(adapter, source, expected)
    for block in walk_blocks(adapter, source, states):
        for parts in block.forward_with_parts():
            attention, mlp = (parts.attention.any().item(), parts.mlp.any().item())
            assert attention != structure.lacks(2 * block.index)
            assert mlp != structure.lacks(2 * block.index + 1)
            total = parts.input + parts.attention + parts.mlp
            assert difference(parts.output, total) < 1e-5
    for _ in plain:
        pass
    assert all(torch.equal(states[batch], expected[batch]) for batch in range(3))


def test_removed_in_memory_it_walks_likewise(checkpoints, family_name):
    structure, source = STRUCTURES["both kinds"], checkpoints(family_name)
    adapter, states = start(source)
    adapter.remove([2 * block for block in structure.no_attention])
    adapter.remove([2 * block + 1 for block in structure.no_mlp])
    for block in walk_blocks(adapter, source, states):
        if block.index not in structure.no_mlp:
            block.gram(adapter.family.linears[3])
    model = reference(family_name, structure)
    for batch, expected in enumerate(outputs(model, f"{adapter.family.blocks}.{BLOCKS - 1}")):
        assert difference(states[batch], expected) < 1e-5


def test_borrowed_linears_are_those_of_the_finished_block(tmp_path):
    """What a block's owner was changed to counts for it, not what the source holds."""
    structure = STRUCTURES["shared"]
    source = save(build("llama"), structure, tmp_path / "restructured")
    model = reference("llama", structure)
    adapter, states = start(source)
    finished = {}
    for block in walk_blocks(adapter, source, states, restore=finished.get):
        assert not block.restored
        whole = model.get_submodule(adapter.family.blocks)
        if structure.owner(block.index) == block.index:
            for path in linears(adapter.family):
                weight = changed(adapter.weight(block.module, path))
                adapter.set_weight(block.module, path, weight)
                for user in range(BLOCKS):
                    if structure.owner(user) == block.index:
                        adapter.set_weight(whole[user], path, weight)
            parameters = dict(block.module.named_parameters())
            prefix = adapter.block_prefix(block.index)
            finished[block.index] = {
                f"{prefix}{name}": tensor.clone() for name, tensor in parameters.items()
            }
    for batch, expected in enumerate(outputs(model, f"{adapter.family.blocks}.{BLOCKS - 1}")):
        assert difference(states[batch], expected) < 1e-5
