"""Structures, and the config.json that says them."""

import json

import pytest
from restructured import STRUCTURES, save
from tiny_models import BLOCKS, build
from transformers import AutoModelForCausalLM

from compresso.errors import CheckpointError, ConfigError
from compresso.families import family_of
from compresso.models.depth import drop_blocks
from compresso.models.structure import (
    Structure,
    borrowed_linears,
    halves,
    removed_tensors,
    restructure,
    structure_of,
)


def plain_config(name):
    model = build(name)
    config = json.loads(model.config.to_json_string(use_diff=True))
    return config | {"architectures": [type(model).__name__]}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_config_says_its_structure_and_can_be_plain_again(family_name, kind):
    stock = plain_config(family_name)
    before = json.dumps(stock)
    config = json.loads(json.dumps(restructure(stock, STRUCTURES[kind])))
    assert json.dumps(stock) == before
    assert config["model_type"] == f"compresso_{family_name}"
    assert structure_of(config) == STRUCTURES[kind]
    assert restructure(config, Structure()) == stock
    other = restructure(config, STRUCTURES["shared"])
    assert other == restructure(stock, STRUCTURES["shared"])


def test_a_stock_config_is_left_alone():
    stock = plain_config("phi3") | {"auto_map": {"AutoConfig": "theirs.Config"}}
    assert restructure(stock, Structure()) == stock


def test_the_other_fields_stay():
    stock = plain_config("llama") | {"quantization_config": {"format": "any"}, "note": [1]}
    stock["auto_map"] = {"AutoTokenizer": ["a.B", None], "AutoConfig": "theirs.Config"}
    config = restructure(stock, STRUCTURES["shared"])
    assert config["auto_map"] == {
        "AutoTokenizer": ["a.B", None],
        "AutoConfig": "modeling_compresso.CompressoLlamaConfig",
        "AutoModelForCausalLM": "modeling_compresso.CompressoLlamaForCausalLM",
    }
    assert config["architectures"] == ["CompressoLlamaForCausalLM"]
    kept = ("quantization_config", "note", "num_hidden_layers", "rope_parameters", "hidden_size")
    assert all(config[key] == stock[key] for key in kept)
    assert restructure(config, Structure())["auto_map"] == {"AutoTokenizer": ["a.B", None]}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_removed_tensors_are_those_the_model_has_no_place_for(family_name, kind, tmp_path):
    model, structure = build(family_name), STRUCTURES[kind]
    family = family_of(family_name)
    loaded = AutoModelForCausalLM.from_pretrained(
        save(model, structure, tmp_path / "restructured").path
    )
    stock, ours = set(model.state_dict()), set(loaded.state_dict())
    prefix = f"{family.blocks}."
    gone = removed_tensors(stock, family, structure, prefix=prefix)
    assert gone == stock - ours
    assert removed_tensors(ours, family, structure, prefix=prefix) == set()


def test_packed_tensors_of_removed_linears_go_too():
    names = [f"model.layers.1.mlp.up_proj.weight_{end}" for end in ("packed", "scale", "shape")]
    for structure in (Structure(no_mlp=(1,)), Structure(shared=(0, 0))):
        gone = removed_tensors(names, family_of("llama"), structure, prefix="model.layers.")
        assert gone == set(names)


def test_halves_hold_all_norms_and_linears_of_a_block(models, family_name):
    family = family_of(family_name)
    block = models(family_name).get_submodule(family.blocks)[0]
    attention, mlp = halves(family)
    parts = [*attention.modules, *attention.norms, *mlp.modules, *mlp.norms]
    assert len(parts) == len(set(parts))
    children = [path for path, child in block.named_children() if list(child.parameters())]
    assert sorted(children) == sorted(parts)
    assert [*attention.linears, *mlp.linears] == [p for group in family.linears for p in group]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_mlp": (2, 1)}, "must ascend"),
        ({"no_attention": (1, 1)}, "must ascend"),
        ({"rank": 2}, "rank 2 with corrections of 0 blocks"),
        ({"corrected": (1,)}, "rank 0 with corrections of 1 blocks"),
        ({"shared": (1, 1)}, "block 0 cannot use the linears of block 1"),
        ({"shared": (0, -1)}, "block 1 cannot use the linears of block -1"),
        ({"shared": (0, 0, 1)}, "block 2 cannot use the linears of block 1"),
        ({"shared": (0, 0), "no_mlp": (0,)}, "block 1 uses linears that block 0 lacks"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Structure(**fields)


def test_sharing_with_oneself_is_not_sharing():
    assert Structure(shared=(0, 1, 2)) == Structure()
    assert Structure(shared=(0, 1, 2)).plain
    assert not any(structure.plain for structure in STRUCTURES.values())


def test_more_can_be_removed():
    structure = STRUCTURES["both kinds"].without([2, 0, 11])
    assert (structure.no_attention, structure.no_mlp) == ((0, 1, 3), (2, 3, 5))
    assert [structure.lacks(half) for half in (0, 1, 4, 5)] == [True, False, False, True]
    with pytest.raises(ConfigError, match="cannot be removed: block 1 uses linears that block 0 l"):
        STRUCTURES["shared"].without([0])
    assert STRUCTURES["shared"].without([2, 3]).no_mlp == (1,)


def test_what_a_block_borrows():
    family, structure = family_of("llama"), STRUCTURES["everything"]
    assert borrowed_linears(family, structure, 0) == []
    assert borrowed_linears(family, structure, 1) == [
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
        "0.mlp.down_proj",
    ]
    assert borrowed_linears(family, structure, 2)[-1] == "0.self_attn.o_proj"
    assert borrowed_linears(family, Structure(), 3) == []


def test_dropped_blocks_take_their_structure_along():
    structure = STRUCTURES["everything"].keeping([0, 2, 4, 5])
    assert structure == Structure((3,), (1,), (0, 0, 2, 2), 2, (0,))
    assert STRUCTURES["corrected"].keeping([0, 2]) == Structure()
    with pytest.raises(ConfigError, match="block 0 cannot be dropped: block 2 uses its linears"):
        STRUCTURES["everything"].keeping([2, 3, 4])


@pytest.mark.parametrize(
    ("kind", "keep", "left"),
    [
        ("both kinds", [0, 1, 4, 5], Structure(no_attention=(0,), no_mlp=(3,))),
        ("both kinds", [1, 4], Structure()),
        ("everything", [0, 2, 3], Structure((), (1,), (0, 0, 2), 2, (0, 2))),
    ],
)
def test_dropping_blocks_of_a_restructured_model(family_name, kind, keep, left):
    family, structure = family_of(family_name), STRUCTURES[kind]
    config = restructure(plain_config(family_name), structure)
    found = drop_blocks(config, family, keep)
    stock = drop_blocks(plain_config(family_name), family, keep)
    assert structure_of(found) == left
    assert found == restructure(stock, left)


def test_no_attention_at_all_is_refused():
    everywhere = Structure(no_attention=tuple(range(BLOCKS)))
    with pytest.raises(ConfigError, match="attention of every block would be removed"):
        restructure(plain_config("llama"), everywhere)
    config = restructure(plain_config("llama"), STRUCTURES["first attention"])
    with pytest.raises(ConfigError, match="attention of every block would be removed"):
        drop_blocks(config, family_of("llama"), [0])


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        {"attention": {"removed": 1}},
        {"attention": {"removed": []}, "mlp": {"removed": []}, "shared": [1, 1]},
    ],
)
def test_a_wrong_structure_is_the_checkpoints_fault(wrong):
    config = plain_config("llama") | {"model_type": "compresso_llama"}
    if wrong is not None:
        config["compresso"] = wrong | {"rank": 0, "corrected": []}
    with pytest.raises(CheckpointError, match=r"`compresso` in config\.json is missing or wrong"):
        structure_of(config)


def test_a_restructured_model_is_of_its_family():
    assert family_of("compresso_qwen3") == family_of("qwen3")
    with pytest.raises(ConfigError, match="unsupported architecture: `compresso_mamba`"):
        family_of("compresso_mamba")
