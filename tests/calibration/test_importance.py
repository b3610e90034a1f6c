"""Scores of sub-blocks against sums over a whole model."""

from __future__ import annotations

import pytest
import torch
from restructured import STRUCTURES, save
from tiny_models import BLOCKS, build, tokens
from torch.nn.functional import cross_entropy

from compresso.calibration.importance import magnitude_scores, taylor_scores
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, False)
BATCHES = [tokens(2, 16, seed=1), tokens(2, 16, seed=2)]


def opened(source):
    return ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))


def in_halves(model, importance):
    """The sums of all linear weights of the attentions and MLPs, told apart by their names."""
    blocks = model.get_submodule(family_of(model.config.model_type).blocks)
    scores = []
    for block in blocks:
        halves = {"attention": 0.0, "mlp": 0.0}
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2:
                attention = name.startswith(("self_attn.", "attn.", "attention."))
                halves["attention" if attention else "mlp"] += importance(parameter).item()
        scores += halves.values()
    return scores


def test_taylor(checkpoints, family_name, tmp_path, capsys):
    source, model = checkpoints(family_name), build(family_name)
    for batch in BATCHES:
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        (cross_entropy(logits, batch[:, 1:].flatten()) / len(BATCHES)).backward()
    expected = in_halves(model, lambda p: (p.double() * p.grad.double()).abs().sum())
    found = taylor_scores(opened(source), source, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) == 2 * BLOCKS
    assert "measure gradients: 6/6" in capsys.readouterr().err


def test_magnitude(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    expected = in_halves(build(family_name), lambda p: p.double().abs().sum())
    assert magnitude_scores(adapter, source) == pytest.approx(expected, rel=1e-9)
    assert all(parameter.is_meta for parameter in adapter.model.parameters())


def test_a_half_without_effect_has_no_taylor_importance(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    scores = taylor_scores(opened(source), source, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert [half for half, score in enumerate(scores) if score == 0] == [4, 9]


def test_a_half_that_is_gone_has_none_and_a_shared_linear_counts_where_it_is_used(tmp_path):
    structure = STRUCTURES["everything"]
    source = save(build("llama"), structure, tmp_path / "model")
    taylor = taylor_scores(opened(source), source, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    magnitude = magnitude_scores(opened(source), source)
    gone = [half for half in range(2 * BLOCKS) if structure.lacks(half)]
    assert [half for half, score in enumerate(taylor) if score == 0] == gone
    assert [half for half, score in enumerate(magnitude) if score == 0] == gone
    whole = magnitude_scores(opened(Checkpoint(source.path)), source)
    for block in range(BLOCKS):
        for half in (2 * block, 2 * block + 1):
            if not structure.lacks(half):
                assert magnitude[half] == whole[2 * structure.owner(block) + half % 2]
