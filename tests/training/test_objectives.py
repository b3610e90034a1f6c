"""Objectives and their gradients: against whole stock models and the formulas."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, tokens
from torch.nn import functional

from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.training import objectives as module
from compresso.training.lessons import Wanted
from compresso.training.model import TrainingModel
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.teacher import ResidentTeacher

TOKENS = tokens(3, 14, seed=5)
ROWS = torch.arange(3)
TEMPERATURE = 2.0
EVERYTHING = Shares(next_token=0.7, divergence=0.4, hidden=0.2, blocks=0.3)
PAIRS = {0: 1, 3: 4, 5: 5}


def opened(source):
    return ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The tiny model of a family with moved weights, saved once."""
    saved = {}

    def changed_of(family):
        if family not in saved:
            model = build(family)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=0.03)
            path = tmp_path_factory.mktemp("changed") / family
            model.save_pretrained(path)
            saved[family] = (model, Checkpoint(path))
        return saved[family]

    return changed_of


def heard(model, family):
    """What the blocks return and what the head reads, of a stock model, and its logits."""
    blocks = model.get_submodule(family.blocks)
    returned, read = {}, []
    handles = [
        block.register_forward_hook(lambda _, __, out, i=i: returned.__setitem__(i, out))
        for i, block in enumerate(blocks)
    ]
    head = model.get_submodule(family.head)
    handles.append(head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])))
    logits = model(TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return returned, read[0], logits


def dense(original, model, family):
    """Every part by its formula, in float64."""
    with torch.no_grad():
        blocks, read, logits = heard(original, family)
    own_blocks, own_read, own_logits = heard(model, family)
    expected, actual = (one.double() / TEMPERATURE for one in (logits, own_logits))
    ratio = expected.log_softmax(-1) - actual.log_softmax(-1)

    def unit(states):
        states = states.double()
        return states / states.square().mean(-1, keepdim=True).sqrt()

    errors = [(unit(own_blocks[i]) - unit(blocks[j])).square().mean() for i, j in PAIRS.items()]
    return {
        "next_token": functional.cross_entropy(
            own_logits[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten()
        ),
        "divergence": TEMPERATURE**2 * (expected.softmax(-1) * ratio).sum(-1).mean(),
        "hidden": (own_read - read).double().square().mean(),
        "blocks": sum(errors) / len(errors),
    }


def wanted(shares):
    blocks = tuple(sorted(set(PAIRS.values()))) if shares.blocks else ()
    return Wanted(bool(shares.hidden), blocks, bool(shares.divergence), None, TEMPERATURE)


@pytest.fixture
def one_position_at_a_time(monkeypatch):
    """Room for the logits of two positions of the batch."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 3 * 128 * 4)
    asked = []
    logits = TrainingModel.logits

    def recorded(self, hidden):
        asked.append(hidden.shape[1])
        return logits(self, hidden)

    monkeypatch.setattr(TrainingModel, "logits", recorded)
    return asked


def check(checkpoints, models, changed, name):
    """Parts, loss and the gradients of a linear and the final norm."""
    stock, source = changed(name)
    family = family_of(name)
    adapter = opened(source)
    linear = f"{adapter.block_prefix(2)}{family.linears[3][0]}.weight"
    norm = adapter.stored[f"{family.final_norm}.weight"]
    stored = [linear, norm]
    names = {stored: own for own, stored in adapter.stored.items()}
    stock.requires_grad_(False).zero_grad()
    for one in stored:
        stock.get_parameter(names[one]).requires_grad_()
    expected = dense(models(name), stock, family)
    loss = sum(getattr(EVERYTHING, part) * value for part, value in expected.items())
    loss.backward()
    teacher = ResidentTeacher(opened(checkpoints(name)), checkpoints(name), wanted(EVERYTHING))
    with teacher, TrainingModel(adapter, source) as model:
        parameters = model.train_tensors(stored)
        found = MixedObjective(EVERYTHING, teacher, PAIRS)(model, TOKENS, ROWS)
        found["loss"].backward()
        for part, value in {"loss": loss, **expected}.items():
            assert found[part].item() == pytest.approx(value.item(), rel=1e-4), part
            assert value > 1e-5
        for one, parameter in zip(stored, parameters, strict=True):
            slope = stock.get_parameter(names[one]).grad
            assert (parameter.grad - slope).abs().max() < 1e-4 * slope.abs().max(), one
    stock.requires_grad_(False)


def test_parts_and_gradients_are_those_of_whole_stock_models(
    checkpoints, models, changed, family_name
):
    check(checkpoints, models, changed, family_name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_few_positions_at_a_time_are_the_same(
    checkpoints, models, changed, name, one_position_at_a_time
):
    check(checkpoints, models, changed, name)
    assert max(one_position_at_a_time) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(checkpoints, family_name, dtype):
    source = checkpoints(family_name)
    shares = Shares(divergence=1.0, hidden=1.0, blocks=1.0)
    adapters = [
        ModelAdapter.open(source, dtype=dtype, device=torch.device("cpu")) for _ in range(2)
    ]
    same = {block: block for block in PAIRS.values()}
    teacher = ResidentTeacher(adapters[0], source, wanted(shares))
    with teacher, TrainingModel(adapters[1], source) as model:
        found = MixedObjective(shares, teacher, same)(model, TOKENS, ROWS)
    assert {name: float(value) for name, value in found.items()} == {
        "loss": 0,
        "divergence": 0,
        "hidden": 0,
        "blocks": 0,
    }


def test_what_counts_nothing_is_not_computed(checkpoints, one_position_at_a_time):
    source = checkpoints("llama")
    shares = Shares(hidden=0.5)
    teacher = ResidentTeacher(opened(source), source, wanted(shares))
    with teacher, TrainingModel(opened(source), source) as model:
        objective = MixedObjective(shares, teacher)
        assert set(objective(model, TOKENS, ROWS)) == {"loss", "hidden"}
        assert one_position_at_a_time == []
        with torch.no_grad():
            judged = objective(model, TOKENS, ROWS)
    assert set(judged) == {"loss", "hidden", "next_token"}
    assert judged["loss"] == 0.5 * judged["hidden"]


def test_the_next_token_needs_no_teacher(checkpoints, models):
    with TrainingModel(opened(checkpoints("llama")), checkpoints("llama")) as model:
        found = MixedObjective(Shares(next_token=1.0))(model, TOKENS, ROWS)
    expected = models("llama")(TOKENS, labels=TOKENS).loss
    assert set(found) == {"loss", "next_token"}
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
