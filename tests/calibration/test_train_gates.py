"""Gates at their ends, their gradients, and what training does with a unit that does nothing."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import BLOCKS, build, tokens
from walking import difference, real

from compresso.calibration import gates as module
from compresso.calibration.gated_model import GatedModel
from compresso.calibration.gates import train_gates
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import NumericalError, ResourceError
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, False)
BATCHES = [tokens(4, 12, seed=seed) for seed in range(1, 4)]
UNITS = {"block": BLOCKS, "attention": BLOCKS, "mlp": BLOCKS, "sub-block": 2 * BLOCKS}


def opened(source):
    return ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))


def trained(source, **changes):
    options = {"unit": "sub-block", "remove_share": 0.2, "steps": 12, "rate": 0.2, "seed": 0}
    return train_gates(source, BATCHES, **options | changes, runtime=RUNTIME)


def silenced(model, halves):
    """The model with sub-blocks that add nothing: their last linears are zero."""
    family = family_of(model.config.model_type)
    blocks = model.get_submodule(family.blocks)
    with torch.no_grad():
        for half in halves:
            path = family.linears[1 if half % 2 == 0 else 3][0]
            for parameter in blocks[half // 2].get_submodule(path).parameters():
                parameter.zero_()
    return model


def saved(path, model):
    model.save_pretrained(path / "model")
    return Checkpoint(path / "model")


@pytest.mark.parametrize("unit", ["block", "sub-block"])
def test_open_gates_change_no_bit_and_closed_ones_remove(checkpoints, models, family_name, unit):
    open_and_close(checkpoints(family_name), models(family_name), family_name, unit)


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_one_kind_of_half_can_be_gated_alone(checkpoints, models, family, unit):
    open_and_close(checkpoints(family), models(family), family, unit)


@torch.no_grad()
def open_and_close(source, whole, family, unit):
    """Gates of 1 change no bit of the whole model, a gate of 0 removes just its unit."""
    adapter = opened(source)
    ones = torch.ones(UNITS[unit])
    with GatedModel(adapter, source, unit=unit) as model:
        hidden = model.forward(BATCHES[0], None)
        assert torch.equal(model.forward(BATCHES[0], ones), hidden)
        logits = whole(BATCHES[0], use_cache=False).logits
        assert torch.equal(adapter.logits(source, hidden), logits)
        for closed in (0, 3):
            halves = {
                "block": [2 * closed, 2 * closed + 1],
                "attention": [2 * closed],
                "mlp": [2 * closed + 1],
                "sub-block": [closed],
            }[unit]
            given = ones.clone()
            given[closed] = 0
            found = adapter.logits(source, model.forward(BATCHES[0], given))
            expected = silenced(build(family), halves)(BATCHES[0], use_cache=False).logits
            assert difference(found, expected) < 1e-5
            assert difference(found, logits) > 1e-3
        assert torch.equal(model.forward(BATCHES[0], None), hidden)
    assert real(adapter) == []
    assert len(model.costs) == UNITS[unit]


def test_costs_are_the_parameters_of_the_linears(checkpoints):
    source = checkpoints("llama")
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96
    for unit, costs in {
        "block": [attention + mlp],
        "attention": [attention],
        "mlp": [mlp],
        "sub-block": [attention, mlp],
    }.items():
        assert GatedModel(opened(source), source, unit=unit).costs == costs * BLOCKS


@pytest.mark.parametrize("unit", ["block", "sub-block"])
@torch.no_grad()
def test_gradients_are_those_of_finite_differences(checkpoints, family_name, unit):
    source = checkpoints(family_name)
    given = torch.linspace(0.2, 1.0, UNITS[unit])
    with GatedModel(opened(source), source, unit=unit) as model:
        original = model.forward(BATCHES[0], None)
        gradient = model.gradient(BATCHES[0], given, original)[1]
        step = 0.003
        for number in (0, 2, UNITS[unit] - 1):
            around = []
            for sign in (1, -1):
                moved = given.clone()
                moved[number] += sign * step
                around.append(model.gradient(BATCHES[0], moved, original)[0])
            slope = (around[0] - around[1]) / (2 * step)
            assert abs(gradient[number].item() - slope) < 0.02 * gradient.abs().max()


def test_the_model_itself_loses_nothing(checkpoints):
    source = checkpoints("granite")
    with GatedModel(opened(source), source, unit="block") as model:
        with torch.no_grad():
            original = model.forward(BATCHES[0], None)
        lost, gradient = model.gradient(BATCHES[0], torch.ones(BLOCKS), original)
    assert lost == 0 and gradient.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "half"), [("llama", 4), ("gemma2", 7), ("gpt_neox", 4), ("granite", 7)]
)
def test_a_sub_block_that_does_nothing_has_no_gradient_and_goes_first(family, half, tmp_path):
    source = saved(tmp_path, silenced(build(family), [half]))
    with GatedModel(opened(source), source, unit="sub-block") as model:
        with torch.no_grad():
            original = model.forward(BATCHES[0], None)
        gradient = model.gradient(BATCHES[0], torch.full((2 * BLOCKS,), 0.5), original)[1]
        assert [number for number, slope in enumerate(gradient) if slope == 0] == [half]
    found = trained(source, remove_share=0.06, rate=0.5)
    others = [gate for number, gate in enumerate(found.gates) if number != half]
    assert found.gates[half] < min(others)


def test_a_block_that_does_nothing_goes_first(tmp_path):
    source = saved(tmp_path, silenced(build("qwen3"), [6, 7]))
    found = trained(source, unit="block", remove_share=1 / 6, rate=0.5)
    others = [gate for block, gate in enumerate(found.gates) if block != 3]
    assert found.gates[3] < min(others) - 0.2


def test_the_history_and_the_budget(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", 6)
    found = trained(checkpoints("llama"), steps=12, remove_share=0.3)
    assert [record.step for record in found.history] == [2, 4, 6, 8, 10, 12]
    removed = [record.removed for record in found.history]
    assert removed == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    for record in found.history:
        closed = sum(
            cost * (1 - gate) for cost, gate in zip(found.costs, record.gates, strict=True)
        )
        assert closed / sum(found.costs) == pytest.approx(record.removed, rel=1e-5)
    assert found.gates == found.history[-1].gates
    assert "train gates: 12/12" in capsys.readouterr().err


def test_the_seed_decides(checkpoints):
    source = checkpoints("llama")
    first = trained(source, steps=4)
    with torch.no_grad():
        assert trained(source, steps=4) == first
    assert trained(source, steps=4, seed=1).gates != first.gates


def test_training_goes_on_where_it_was_stopped(checkpoints):
    source = checkpoints("llama")
    states = []
    whole = trained(source, steps=5, remember=lambda state: states.append(json.dumps(state)))
    for stopped in (1, 3, 5):
        assert trained(source, steps=5, recall=lambda n=stopped: json.loads(states[n - 1])) == whole
    other = json.loads(states[2])
    other["training"]["logits"][0] += 1
    assert trained(source, steps=5, recall=lambda: other) != whole


def test_what_is_kept_of_the_original_changes_nothing(checkpoints, monkeypatch):
    source = checkpoints("llama")
    kept = trained(source, steps=4)
    monkeypatch.setattr(module, "RECORDS", 1)
    tight = Runtime(torch.device("cpu"), torch.float32, 0, False)
    options = {"unit": "sub-block", "remove_share": 0.2, "steps": 4, "rate": 0.2, "seed": 0}
    assert train_gates(source, BATCHES, **options, runtime=tight).gates == kept.gates


def test_a_model_that_does_not_fit_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 1_000_000)
    with pytest.raises(ResourceError, match=r"about 1\.\d+ MB, but 1 MB are free") as refused:
        trained(checkpoints("llama"))
    assert "block by block" in refused.value.hint


def test_a_gradient_that_is_not_finite_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(
        GatedModel, "gradient", lambda *_: (1.0, torch.full((2 * BLOCKS,), float("nan")))
    )
    with pytest.raises(NumericalError, match="the gradient of the gates is not finite"):
        trained(checkpoints("llama"))
