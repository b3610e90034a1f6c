"""The record of a fingerprint, as kept in compresso.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from samples import rewrite

from compresso.checkpoint.proof import Fingerprint, prove
from compresso.errors import GateError


def test_fingerprint_survives_json(llama: tuple[Path, Fingerprint]) -> None:
    full = llama[1]
    values = json.loads(json.dumps(full.to_json()))
    read = Fingerprint.from_json(values)
    assert read.to_json() == values
    assert torch.equal(read.tokens, full.tokens) and read.tokens.dtype == torch.int64
    assert read.logits.shape == full.logits.shape
    recorded = read.logits != -torch.inf
    assert recorded.sum() == 8 * 20
    assert torch.equal(read.logits.argmax(-1), full.logits.argmax(-1))
    assert (read.logits - full.logits)[recorded].abs().max() < 1e-5
    least = full.logits[0].topk(8).values[:, -1:]
    assert (full.logits[0] >= least)[recorded[0]].all()
    assert len(json.dumps(values)) < 6000


def test_a_recorded_fingerprint_proves_and_disproves(llama: tuple[Path, Fingerprint]) -> None:
    path, full = llama
    read = Fingerprint.from_json(full.to_json())
    report = prove(path, read, dtype=torch.float32)
    assert report.difference < 1e-5 and report.top_agreement == 1
    rewrite(path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1.05))
    with pytest.raises(GateError, match="not the model"):
        prove(path, read, dtype=torch.float32)


def test_a_vocabulary_smaller_than_what_is_recorded() -> None:
    small = Fingerprint(torch.tensor([[0, 1]]), torch.tensor([[[1.0, 2.0], [3.0, 0.5]]]))
    assert torch.equal(Fingerprint.from_json(small.to_json()).logits, small.logits)
