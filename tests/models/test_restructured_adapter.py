"""The adapter runs restructured checkpoints, and can make a model lack sub-blocks in memory."""

import json

import pytest
import torch
from restructured import STRUCTURES, linears, reference, save
from tiny_models import BLOCKS, build, tokens
from transformers import cache_utils
from walking import difference, real

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure

IDS = tokens(2, 20)


def opened(source, **options):
    return ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"), **options)


def run(adapter, source):
    """Logits, block by block."""
    hidden, arguments = adapter.enter(source, IDS)
    for index in range(adapter.count):
        block = adapter.load_block(index, source)
        hidden = block(hidden, *arguments[index].positional, **arguments[index].named)
        adapter.unload_block(index)
    return adapter.logits(source, hidden)


@torch.no_grad()
def expected_logits(name, structure):
    return reference(name, structure)(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", STRUCTURES)
def test_block_by_block_it_is_the_same_model(family_name, kind, tmp_path):
    structure = STRUCTURES[kind]
    source = save(build(family_name), structure, tmp_path / "restructured")
    adapter = opened(source)
    assert adapter.structure == structure
    assert difference(run(adapter, source), expected_logits(family_name, structure)) < 2e-5
    assert adapter.unmapped_tensors() == []
    inside = [name for index in range(BLOCKS) for name in adapter.block_tensors(index)]
    assert sorted(inside + adapter.outside_tensors()) == source.names()
    adapter.unload_outside()
    assert real(adapter) == []


def test_a_block_loads_the_linears_it_borrows(family_name, tmp_path):
    source = save(build(family_name), STRUCTURES["everything"], tmp_path / "restructured")
    adapter = opened(source)
    paths, blocks = linears(adapter.family), adapter.family.blocks
    block = adapter.load_block(2, source)
    attention = {path for group in adapter.family.linears[:2] for path in group}
    for path in attention:
        weight = adapter.weight(block, path)
        assert weight is adapter.weight(adapter.blocks[0], path) or adapter.family.transposed
        assert not weight.is_meta
        with pytest.raises(KeyError, match="already exists"):
            adapter.set_weight(block, path, weight)
    borrowed = {name for name in real(adapter) if name.startswith(f"{blocks}.0.")}
    assert {name.rpartition(".")[0] for name in borrowed} == {
        f"{blocks}.0.{path}" for path in paths if path in attention
    }
    adapter.unload_block(2)
    assert real(adapter) == []


def test_borrowed_linears_can_be_given(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    adapter = opened(source)
    given = {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64), "other": torch.ones(1)}
    block = adapter.load_block(1, source, given)
    assert block.mlp.up_proj.weight.eq(1).all()
    assert adapter.blocks[0].mlp.up_proj.weight is block.mlp.up_proj.weight
    assert not block.mlp.gate_proj.weight.eq(1).all()


@pytest.mark.parametrize("kind", ["first attention", "last mlp", "both kinds"])
def test_removed_in_memory_it_is_the_same_model(family_name, kind, checkpoints, tmp_path):
    structure, source = STRUCTURES[kind], checkpoints(family_name)
    adapter = opened(source)
    adapter.load_block(0, source)
    gone = [2 * block for block in structure.no_attention]
    adapter.remove(gone)
    adapter.remove(2 * block + 1 for block in structure.no_mlp)
    adapter.unload_block(0)
    assert real(adapter) == []
    assert adapter.structure == structure
    assert difference(run(adapter, source), expected_logits(family_name, structure)) < 2e-5
    written = save(build(family_name), structure, tmp_path / "restructured")
    names = [name for index in range(BLOCKS) for name in adapter.block_tensors(index)]
    assert sorted(names + adapter.outside_tensors()) == written.names()


def test_what_others_use_cannot_be_removed(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    adapter = opened(source)
    with pytest.raises(ConfigError, match="block 1 uses linears that block 0 lacks"):
        adapter.remove([1])
    adapter.remove([2, 3])
    assert adapter.structure == Structure((1,), (1,), (0, 0, 2, 3, 3, 3))
    assert adapter.block_tensors(1) == []
    run(adapter, source)


def test_a_wrong_structure_is_the_checkpoints_fault(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    for wrong, message in (
        ([0, 2, 2], "`compresso` in config.json is missing or wrong: block 1 cannot use"),
        ([0, 0], "has an invalid config.json: .* is not about a model of 6 blocks"),
    ):
        config = json.loads((source.path / "config.json").read_text())
        config["compresso"]["shared"] = wrong
        (source.path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            opened(Checkpoint(source.path))


def test_an_older_transformers_is_named(monkeypatch, tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    monkeypatch.delattr(cache_utils, "DummyLayer")
    with pytest.raises(ResourceError, match=r"cannot be loaded: .* needs transformers 5\.23") as e:
        opened(source)
    assert e.value.hint == "pip install -U transformers"


def test_trusting_remote_code_changes_nothing(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    adapter = opened(source, trust_remote_code=True)
    assert type(adapter.model).__module__ == "compresso.models.modeling_compresso"
