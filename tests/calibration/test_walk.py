"""The walk gives what the whole model gives, with one block in memory."""

import pytest
import torch
from tiny_models import BLOCKS
from walking import PROBE, STATES_BYTES, Identity, changed, difference, outputs, real, start

from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.errors import ResourceError
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import replaced


def test_hidden_states_are_those_of_the_whole_model(models, checkpoints, family_name):
    source, model = checkpoints(family_name), models(family_name)
    adapter, states = start(source, probe=PROBE)
    assert (states.batches, states.tokens, states.width) == (3, 160, 64)
    blocks = adapter.family.blocks
    for block in walk_blocks(adapter, source, states):
        assert all(name.startswith(f"{blocks}.{block.index}.") for name in real(adapter))
        if block.index:
            expected = outputs(model, f"{blocks}.{block.index - 1}")
            for batch in range(3):
                assert difference(states[batch], expected[batch]) < 1e-5
    assert real(adapter) == []
    last = f"{blocks}.{BLOCKS - 1}"
    for batch, expected in enumerate(outputs(model, last)):
        assert difference(states[batch], expected) < 1e-5
    assert difference(states.probe, outputs(model, last, [PROBE])[0]) < 1e-5


def test_a_probe_alone_can_be_walked(models, checkpoints):
    source = checkpoints("llama")
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    states = enter_blocks(adapter, source, [], probe=PROBE, budget=0, spill_dir=None)
    assert [block.index for block in walk_blocks(adapter, source, states)] == list(range(BLOCKS))
    assert (states.batches, states.tokens) == (0, 0)
    with torch.no_grad():
        expected = models("llama")(PROBE, use_cache=False).logits
    assert difference(adapter.logits(source, states.probe), expected) < 1e-5


def test_restored_blocks_are_only_run(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter, states = start(source)
    finished = {}
    grams = []
    for block in walk_blocks(adapter, source, states):
        for path in (path for group in adapter.family.linears for path in group):
            adapter.set_weight(block.module, path, changed(adapter.weight(block.module, path)))
        names = adapter.block_tensors(block.index)
        parameters = dict(block.module.named_parameters())
        prefix = adapter.block_prefix(block.index)
        finished[block.index] = {n: parameters[n.removeprefix(prefix)].clone() for n in names}
        grams.append(block.gram(adapter.family.linears[0]))
    again, restarted = start(source)
    walk = walk_blocks(again, source, restarted, restore=lambda i: finished[i] if i < 4 else None)
    for block in walk:
        assert block.restored == (block.index < 4)
        if not block.restored:
            for path in (path for group in again.family.linears for path in group):
                again.set_weight(block.module, path, changed(again.weight(block.module, path)))
        assert torch.equal(block.gram(again.family.linears[0]), grams[block.index])
    assert all(torch.equal(restarted[batch], states[batch]) for batch in range(3))


def test_blocks_left_out_pass_their_input_on(models, checkpoints, family_name):
    source, model = checkpoints(family_name), models(family_name)
    adapter, states = start(source, probe=PROBE)
    keep, blocks = [0, 2, 3, 5], adapter.family.blocks
    walked = [block.index for block in walk_blocks(adapter, source, states, keep=keep)]
    assert walked == keep
    with replaced(model, {f"{blocks}.{index}": Identity() for index in (1, 4)}):
        expected = outputs(model, f"{blocks}.5")
        expected_probe = outputs(model, f"{blocks}.5", [PROBE])[0]
    assert all(difference(states[batch], expected[batch]) < 1e-5 for batch in range(3))
    assert difference(states.probe, expected_probe) < 1e-5


def test_what_is_called_after_a_block_sees_it_loaded(checkpoints):
    source = checkpoints("llama")
    adapter, states = start(source)
    seen = []

    def after(block):
        seen.append((block.index, real(adapter) != [], states[0].clone()))

    before = [states[0].clone() for _ in walk_blocks(adapter, source, states, after=after)]
    assert [index for index, _, _ in seen] == list(range(BLOCKS))
    assert all(loaded for _, loaded, _ in seen)
    assert all(torch.equal(seen[i][2], before[i + 1]) for i in range(BLOCKS - 1))


def test_a_walk_that_is_given_up_frees_its_block(checkpoints):
    adapter, states = start(checkpoints("llama"))
    walk = walk_blocks(adapter, checkpoints("llama"), states)
    next(walk)
    assert real(adapter)
    walk.close()
    assert real(adapter) == []


def test_parts_add_up(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter, states = start(source)
    expected_adapter, expected = start(source)
    plain = walk_blocks(expected_adapter, source, expected)
    for block in walk_blocks(adapter, source, states):
        next(plain)
        for batch, parts in enumerate(block.forward_with_parts()):
            assert parts.parallel == (family_name == "gpt_neox")
            assert torch.equal(parts.input, expected[batch])
            total = parts.input + parts.attention + parts.mlp
            assert difference(parts.output, total) < 1e-5
            assert difference(parts.after_mlp, parts.before_mlp + parts.mlp) < 1e-5
            assert difference(parts.after_attention, parts.input + parts.attention) < 1e-5
            before_mlp = parts.input if parts.parallel else parts.after_attention
            assert torch.equal(parts.before_mlp, before_mlp)
    next(plain, None)
    assert all(torch.equal(states[batch], expected[batch]) for batch in range(3))


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "opt", "gpt_neox", "gpt2", "olmo2"])
def test_a_part_is_what_is_left_without_the_other(checkpoints, name, half):
    source = checkpoints(name)
    adapter, states = start(source)
    silenced = adapter.family.linears[3 if half == "attention" else 1][0]
    for block in walk_blocks(adapter, source, states):
        for parameter in block.module.get_submodule(silenced).parameters():
            parameter.zero_()
        for parts in block.forward_with_parts():
            left = parts.after_attention if half == "attention" else parts.after_mlp
            assert difference(left, parts.output) < 1e-5
            assert (parts.output - parts.input).abs().max() > 0.01


def test_parts_may_be_left_before_the_end(checkpoints):
    source = checkpoints("llama")
    adapter, states = start(source)
    expected_adapter, expected = start(source)
    for block in walk_blocks(adapter, source, states):
        parts = block.forward_with_parts()
        next(parts)
        next(parts)
        parts.close()
    for _ in walk_blocks(expected_adapter, source, expected):
        pass
    assert all(torch.equal(states[batch], expected[batch]) for batch in range(3))


def test_arguments_are_kept_once_per_shape(checkpoints):
    _, states = start(checkpoints("gemma2"))
    masks = {
        id(states.arguments(block, states[batch]).named["attention_mask"])
        for block in range(BLOCKS)
        for batch in range(3)
    }
    assert len(masks) == 4  # two shapes, with and without a window


def test_states_that_fit_nowhere_are_refused(checkpoints, tmp_path):
    with pytest.raises(ResourceError, match=r"hidden states need .* GB, but `max_memory` is 0.00"):
        start(checkpoints("llama"), budget=STATES_BYTES - 1)
    with pytest.raises(
        ResourceError, match=r"cannot keep .* of hidden states in `.*gone`: No such"
    ):
        start(checkpoints("llama"), budget=0, spill_dir=tmp_path / "gone")
