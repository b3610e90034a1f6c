"""Every row of the table is true of the transformers class it describes."""

import pytest
from tiny_models import TINY_MODELS
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresso.errors import ConfigError
from compresso.families import FAMILIES, family_of


def test_every_family_has_a_tiny_model():
    assert sorted(FAMILIES) == sorted(TINY_MODELS)


def test_the_linears_are_all_there_are(models, family_name):
    family = family_of(family_name)
    block = models(family_name).get_submodule(family.blocks)[0]
    matrices = [path for path, module in block.named_modules() if hasattr(module, "weight")]
    matrices = [path for path in matrices if block.get_submodule(path).weight.ndim == 2]
    assert sorted(matrices) == sorted(path for group in family.linears for path in group)
    kind = Conv1D if family.transposed else nn.Linear
    assert all(isinstance(block.get_submodule(path), kind) for path in matrices)


def test_the_parts_outside_the_blocks(models, family_name):
    family = family_of(family_name)
    model = models(family_name)
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert "norm" in type(model.get_submodule(family.final_norm)).__name__.lower()
    assert model.config.to_dict()[family.count] == len(model.get_submodule(family.blocks))


def test_the_input_groups_share_their_input(models, family_name):
    family = family_of(family_name)
    model = models(family_name)
    block = model.get_submodule(family.blocks)[2]
    order, inputs = [], {}

    def keep(path):
        def hook(module, given, named):
            order.append(path)
            inputs[path] = given[0] if given else named["hidden_states"]

        return hook

    paths = [path for group in family.linears for path in group]
    watched = {*paths, family.attention, family.mlp[0]}
    handles = [
        block.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True)
        for path in watched
    ]
    model(model.dummy_inputs["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    for group in family.linears:
        assert all(inputs[path] is inputs[group[0]] for path in group)
    places = [min(order.index(path) for path in group) for group in family.linears]
    assert places == sorted(places)
    assert inputs[family.attention] is inputs[family.linears[0][0]]
    assert inputs[family.mlp[0]] is inputs[family.linears[2][0]]


def test_an_unknown_family_says_what_to_add():
    with pytest.raises(ConfigError, match="unsupported architecture: `mamba`") as caught:
        family_of("mamba")
    assert "llama" in caught.value.hint
    assert "FAMILIES" in caught.value.hint and "TINY_MODELS" in caught.value.hint


def test_a_multimodal_wrapper_is_refused():
    with pytest.raises(ConfigError, match="`gemma3` is a multimodal model") as caught:
        family_of("gemma3")
    assert "gemma3_text" in caught.value.hint
