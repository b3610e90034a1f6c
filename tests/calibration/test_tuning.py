"""Training of rounding: against its start, plain rounding, and gradients of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from walking import BATCHES, start

from compresso.calibration.states import States, enter_blocks
from compresso.calibration.tuning import Tuned, advance, tune_block
from compresso.calibration.walk import LiveBlock, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels import gptq
from compresso.kernels.grid import Packed, quantize
from compresso.models.adapter import ModelAdapter

SETTINGS = {"bits": 2, "group_size": 32, "grid": "mse", "scale_dtype": torch.float32}
STEPS = 40


def rounded(
    adapter: ModelAdapter, index: int, *, symmetric: bool = False
) -> dict[str, tuple[Tensor, Packed]]:
    """Every linear of a loaded block, and its plain rounding."""
    weights = {
        path: adapter.weight(adapter.blocks[index], path).float()
        for group in adapter.family.linears
        for path in group
    }
    return {
        path: (weight, quantize(weight, None, symmetric=symmetric, **SETTINGS))
        for path, weight in weights.items()
    }


def put(adapter: ModelAdapter, index: int, packed: dict[str, Packed]) -> None:
    for path, one in packed.items():
        adapter.set_weight(adapter.blocks[index], path, one.decode())


def tune(
    adapter: ModelAdapter,
    source: Checkpoint,
    states: States,
    targets: Any,
    **changes: Any,
) -> Tuned:
    """Block 1, on what really enters it; the adapter is left with the block loaded."""
    adapter.load_block(1, source)
    options: dict[str, Any] = {"symmetric": False, "steps": STEPS, "sequences": 3, "seed": 0}
    options |= {"rule": "sign", **changes}
    starts = options.pop("starts", None)
    if starts is None:
        starts = rounded(adapter, 1, symmetric=options["symmetric"])
    return tune_block(adapter, states, 1, starts, targets=targets, **options)


@torch.no_grad()
def at_block_1(source: Checkpoint) -> tuple[ModelAdapter, States, list[Tensor]]:
    """States that enter block 1 with the error of block 0, and its output without any error."""
    adapter, states = start(source)
    _, originals = start(source)
    for index in range(2):
        adapter.load_block(index, source)
        advance(adapter, originals, index)
        if index == 0:
            put(adapter, 0, {path: one for path, (_, one) in rounded(adapter, 0).items()})
            advance(adapter, states, 0)
            adapter.unload_block(0)
    return adapter, states, [originals[batch].clone() for batch in range(originals.batches)]


@torch.no_grad()
def error(
    adapter: ModelAdapter, states: States, targets: list[Tensor], packed: dict[str, Packed]
) -> float:
    """Mean squared error of block 1 with these weights, by running it."""
    put(adapter, 1, packed)
    total, count = 0.0, 0
    for batch, target in enumerate(targets):
        hidden = states[batch]
        arguments = states.arguments(1, hidden)
        output = adapter.blocks[1](hidden, *arguments.positional, **arguments.named)
        total += (output - target).double().square().sum().item()
        count += target.numel()
    return total / count


def test_every_family_gets_better_than_rounding(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter, states, targets = at_block_1(source)
    entering = [states[batch].clone() for batch in range(states.batches)]
    found = tune(adapter, source, states, targets)
    plain = {path: one for path, (_, one) in rounded(adapter, 1).items()}
    assert set(found.packed) == set(plain)
    assert found.before == pytest.approx(error(adapter, states, targets, plain), rel=1e-4)
    assert found.after == pytest.approx(error(adapter, states, targets, found.packed), rel=1e-4)
    assert found.after < 0.8 * found.before
    assert all(torch.equal(states[b], kept) for b, kept in enumerate(entering))


def test_the_targets_are_what_the_whole_model_computes(checkpoints, models):
    source = checkpoints("llama")
    _, _, targets = at_block_1(source)
    with torch.no_grad():
        whole = [models("llama")(b, output_hidden_states=True).hidden_states[2] for b in BATCHES]
    for target, expected in zip(targets, whole, strict=True):
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["sign", "gradient"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_it_is_never_worse_than_its_start(checkpoints, steps, symmetric, rule):
    source = checkpoints("llama")
    adapter, states, targets = at_block_1(source)
    first = tune(adapter, source, states, targets, symmetric=symmetric)
    again = {path: (w, first.packed[path]) for path, (w, _) in rounded(adapter, 1).items()}
    found = tune(adapter, source, states, targets, symmetric=symmetric, steps=steps, starts=again)
    assert found.before == pytest.approx(first.after, rel=1e-6)
    assert found.after <= found.before
    if steps == 0:
        for path, packed in found.packed.items():
            assert torch.equal(packed.codes, first.packed[path].codes)


def test_gptq_gets_better_by_the_size_of_gradients(checkpoints):
    source = checkpoints("llama")
    adapter, states = start(source)
    with torch.no_grad():
        adapter.load_block(0, source)
        advance(adapter, states, 0)
    targets = at_block_1(source)[2]
    adapter.load_block(1, source)
    live = LiveBlock(adapter, states, 1, restored=False)
    starts: dict[str, tuple[Tensor, Packed]] = {}
    with torch.no_grad():
        for group in adapter.family.linears:
            gram = live.gram(group)
            for path in group:
                weight = adapter.weight(adapter.blocks[1], path)
                packed = gptq.quantize(
                    weight, gram, symmetric=False, damping=0.01, act_order=True, **SETTINGS
                )
                starts[path] = weight, packed
            put(adapter, 1, {path: starts[path][1] for path in group})
    found = tune(adapter, source, states, targets, starts=starts, rule="gradient")
    plain = tune(adapter, source, states, targets, steps=0)
    assert found.before < 0.8 * plain.before
    assert found.after < 0.97 * found.before


def test_the_same_seed_gives_the_same_and_another_does_not(checkpoints):
    source = checkpoints("llama")
    adapter, states, targets = at_block_1(source)
    one, same, other = (
        tune(adapter, source, states, targets, seed=seed, sequences=3) for seed in (0, 0, 1)
    )
    assert one.after == same.after
    for path, packed in one.packed.items():
        assert torch.equal(packed.codes, same.packed[path].codes)
        assert torch.equal(packed.grid.scale, same.packed[path].grid.scale)
    assert other.after != one.after


def test_gradients_may_be_off_outside_and_no_argument_changes(checkpoints):
    source = checkpoints("gpt2")
    adapter, states, targets = at_block_1(source)
    adapter.load_block(1, source)
    starts = rounded(adapter, 1)
    copies = {path: (w.clone(), p.codes.clone()) for path, (w, p) in starts.items()}
    held = {name: p.clone() for name, p in adapter.blocks[1].named_parameters()}
    options: dict[str, Any] = {"symmetric": False, "steps": 10, "sequences": 3, "seed": 0}
    options["rule"] = "sign"
    with torch.no_grad():
        off = tune_block(adapter, states, 1, starts, targets=targets, **options)
    on = tune_block(adapter, states, 1, starts, targets=targets, **options)
    assert off.after == on.after < on.before
    for path, (weight, codes) in copies.items():
        assert torch.equal(weight, starts[path][0])
        assert torch.equal(codes, starts[path][1].codes)
    for name, parameter in adapter.blocks[1].named_parameters():
        assert torch.equal(parameter, held[name])
        assert parameter.grad is None and not parameter.requires_grad


def test_dead_columns_zero_groups_and_one_sequence(checkpoints):
    source = checkpoints("llama")
    adapter, _ = start(source)
    states = enter_blocks(
        adapter, source, [BATCHES[0][:1]], probe=None, budget=10**9, spill_dir=None
    )
    adapter.load_block(0, source)
    starts = rounded(adapter, 0)
    weight, _ = starts["mlp.up_proj"]
    weight = weight.clone()
    weight[:, :32], weight[3], weight[4] = 0, 0.25, 0
    starts["mlp.up_proj"] = weight, quantize(weight, None, symmetric=False, **SETTINGS)
    targets = [torch.zeros_like(states[0])]
    options: dict[str, Any] = {"symmetric": False, "steps": 5, "sequences": 8, "seed": 0}
    for rule in ("sign", "gradient"):
        found = tune_block(adapter, states, 0, starts, targets=targets, rule=rule, **options)
        assert found.after <= found.before
        assert all(torch.isfinite(one.decode()).all() for one in found.packed.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_within_a_walk(checkpoints, family):
    """As the stage uses it: targets flow apart, and the error of tuned blocks flows on."""
    source = checkpoints(family)
    adapter, states = start(source)
    _, originals = start(source)
    with torch.no_grad():
        for block in walk_blocks(adapter, source, states):
            if block.index == 2:
                break
            advance(adapter, originals, block.index)
            starts = rounded(adapter, block.index)
            found = tune_block(
                adapter,
                states,
                block.index,
                starts,
                targets=originals,
                symmetric=False,
                steps=10,
                sequences=3,
                seed=0,
                rule="sign",
            )
            assert found.after < found.before
            put(adapter, block.index, found.packed)
