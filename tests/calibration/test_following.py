"""What is wanted of a model that lacks blocks or halves, against two whole models."""

from __future__ import annotations

import pytest
import torch
from restructured import save
from tiny_models import BLOCKS, build
from transformers import AutoModelForCausalLM
from walking import BATCHES, RAM, start

from compresso.calibration.following import Following
from compresso.calibration.states import enter_blocks
from compresso.calibration.walk import walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.structure import Structure


@torch.no_grad()
def heard(model, module):
    """What enters a module, and what leaves it, by token in float64."""
    kept = [], []

    def hook(_, inputs, named, output):
        for list_of, one in zip(
            kept, (inputs[0] if inputs else named["hidden_states"], output), strict=True
        ):
            found = one[0] if isinstance(one, tuple) else one
            list_of.append(found.reshape(-1, found.shape[-1]).double())

    handle = model.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
    for batch in BATCHES:
        model(batch, use_cache=False)
    handle.remove()
    return torch.cat(kept[0]), torch.cat(kept[1])


def pruned(family, keep, tmp_path):
    """A model of some of the blocks of another."""
    model = build(family)
    blocks = model.get_submodule(family_of(family).blocks)
    left = torch.nn.ModuleList([blocks[block] for block in keep])
    for index, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.set_submodule(family_of(family).blocks, left)
    setattr(model.config, family_of(family).count, len(keep))
    model.save_pretrained(tmp_path / "pruned")
    return Checkpoint(tmp_path / "pruned")


def walked(source, original, blocks, structure):
    """For every block, the missing of all groups that it has."""
    adapter, states = start(source)
    theirs, _ = start(original)
    entered = enter_blocks(theirs, original, BATCHES, probe=None, budget=RAM, spill_dir=None)
    following = Following(theirs, original, entered, blocks, structure)
    for block in walk_blocks(adapter, source, states):
        following.follow(block.index, keep=True)
        found = {}
        for group, paths in enumerate(adapter.family.linears):
            if not structure.lacks(2 * block.index + (group >= 2)):
                found[paths] = following.originals.gram(block, paths)[1].double()
        yield block.index, found


@pytest.mark.parametrize("keep", [[0, 1, 3, 5], [1, 2, 3, 4], [0, 5], list(range(BLOCKS))])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_linear_wants_what_lies_behind_removed_blocks(checkpoints, family, keep, tmp_path):
    source = pruned(family, keep, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source.path).eval()
    original, known = build(family), family_of(family)
    for index, found in walked(source, checkpoints(family), keep, Structure()):
        here = f"{known.blocks}.{index}"
        behind = keep[index + 1] if index + 1 < len(keep) else BLOCKS
        inputs, _ = heard(model, f"{here}.{known.linears[3][0]}")
        wanted = heard(original, f"{known.blocks}.{behind - 1}")[1]
        expected = (wanted - heard(model, here)[1]).T @ inputs / len(inputs)
        torch.testing.assert_close(found[known.linears[3]], expected, rtol=1e-3, atol=2e-4)
        first = known.linears[0]
        now, _ = heard(model, f"{here}.{first[0]}")
        then, _ = heard(original, f"{known.blocks}.{keep[index]}.{first[0]}")
        weight = torch.cat(
            [
                one.T if known.transposed else one
                for one in (model.get_parameter(f"{here}.{path}.weight").double() for path in first)
            ]
        )
        expected = weight @ (then - now).T @ now / len(now)
        torch.testing.assert_close(found[first], expected, rtol=1e-3, atol=2e-4)


def test_attention_makes_up_for_an_mlp_that_is_gone(checkpoints, tmp_path):
    structure = Structure(no_attention=(1,), no_mlp=(2, 5))
    source = save(build("llama"), structure, tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source.path).eval()
    original = build("llama")
    for index, found in walked(source, checkpoints("llama"), list(range(BLOCKS)), structure):
        here = f"model.layers.{index}"
        last = "self_attn.o_proj" if index in structure.no_mlp else "mlp.down_proj"
        inputs, _ = heard(model, f"{here}.{last}")
        wanted, own = heard(original, here)[1], heard(model, here)[1]
        expected = (wanted - own).T @ inputs / len(inputs)
        torch.testing.assert_close(found[last,], expected, rtol=1e-3, atol=2e-4)


def test_norms_of_what_is_added_hide_the_stream(checkpoints, tmp_path):
    """There a linear wants its own output, whatever was removed behind it."""
    keep = [0, 1, 3, 5]
    source = pruned("olmo2", keep, tmp_path)
    model, original = AutoModelForCausalLM.from_pretrained(source.path).eval(), build("olmo2")
    for index, found in walked(source, checkpoints("olmo2"), keep, Structure()):
        down = "mlp.down_proj"
        inputs, own = heard(model, f"model.layers.{index}.{down}")
        _, wanted = heard(original, f"model.layers.{keep[index]}.{down}")
        expected = (wanted - own).T @ inputs / len(inputs)
        torch.testing.assert_close(found[down,], expected, rtol=1e-3, atol=2e-4)
