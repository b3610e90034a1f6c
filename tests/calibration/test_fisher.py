"""Squared gradients of single sequences against autograd on the whole model."""

from __future__ import annotations

import pytest
import torch
from restructured import STRUCTURES, save
from tiny_models import build
from walking import BATCHES

from compresso.calibration.fisher import measure_fisher
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


def measured(source, tmp_path, runtime=RUNTIME, batches=BATCHES):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    return measure_fisher(adapter, source, batches, runtime=runtime, spill_dir=tmp_path)


def expected(model, names):
    """Root means of squared gradients, (rows,) and (columns,), from whole gradients."""
    sequences = [sequence for batch in BATCHES for sequence in batch.split(1)]
    squares = {}
    for sequence in sequences:
        model.zero_grad()
        model(input_ids=sequence, labels=sequence).loss.backward()
        for name in names:
            gradient = model.get_parameter(f"{name}.weight").grad.double()
            squares[name] = squares.get(name, 0) + gradient.square() / len(sequences)
    return {name: (one.mean(1).sqrt(), one.mean(0).sqrt()) for name, one in squares.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_it_is_the_mean_of_squared_gradients(checkpoints, family, tmp_path):
    found = measured(checkpoints(family), tmp_path)
    blocks, paths = family_of(family).blocks, family_of(family).all_linears
    names = [f"{blocks}.{block}.{path}" for block in range(6) for path in paths]
    stored = [name if name in found else name.partition(".")[2] for name in names]
    assert sorted(stored) == sorted(found)
    wanted = expected(build(family).requires_grad_(True), names)
    for name, key in zip(names, stored, strict=True):
        rows, columns = wanted[name][:: -1 if family == "gpt2" else 1]
        torch.testing.assert_close(found[key].rows.double(), rows, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(found[key].columns.double(), columns, rtol=1e-3, atol=1e-9)


def test_how_sequences_are_batched_and_kept_changes_nothing(checkpoints, tmp_path):
    source = checkpoints("llama")
    small = Runtime(torch.device("cpu"), torch.float32, 0, trust_remote_code=False)
    others = measured(source, tmp_path, small, [torch.cat(BATCHES)])
    for name, one in measured(source, tmp_path).items():
        torch.testing.assert_close(one.rows, others[name].rows)
        torch.testing.assert_close(one.columns, others[name].columns)
    assert list(tmp_path.iterdir()) == []


def test_halves_and_blocks_that_are_not_there(tmp_path):
    """Shared linears have one entry, that of their owner, and what is removed has none."""
    source = save(build("llama"), STRUCTURES["everything"], tmp_path / "source")
    found = measured(source, tmp_path)
    assert {int(name.split(".")[2]) for name in found} == {0, 3, 4}
    assert "model.layers.0.self_attn.q_proj" in found
    assert all(bool((one.rows > 0).all()) for one in found.values())
