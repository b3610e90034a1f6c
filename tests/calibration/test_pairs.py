"""Blocks that are copies, and blocks that are not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BLOCKS, build, tokens

from compresso.calibration.pairs import compare_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.similarity import alignment, relative_distance
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


def test_alignment_is_the_textbook_formula():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found = alignment(torch.stack([x @ x.T, y @ y.T]))
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert found[0, 1] == found[1, 0] == pytest.approx(expected.item())
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    turned = 3 * x @ rotation
    assert alignment(torch.stack([x @ x.T, turned @ turned.T]))[0, 1] == pytest.approx(1.0)


def test_distance_of_equal_opposite_and_orthogonal_rows():
    rows = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 3.0]])
    found = relative_distance(rows)
    assert found[0, 1] == 0 and found[0, 3] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(2**0.5)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_copy_is_the_most_like(family, tmp_path):
    model = build(family)
    blocks = model.get_submodule(
        {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    )
    blocks[4].load_state_dict(blocks[1].state_dict())
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    batches = [tokens(4, 30, seed=1), tokens(2, 30, seed=2)]
    pairs = compare_blocks(adapter, source, batches, runtime=RUNTIME, spill_dir=tmp_path)
    assert pairs.distance[1][4] == pytest.approx(0, abs=1e-6)
    for block in range(BLOCKS):
        assert pairs.alignment[block][block] == pytest.approx(1)
        for other in set(range(BLOCKS)) - {block}:
            assert pairs.alignment[block][other] < 1 - 1e-6
            assert {block, other} == {1, 4} or pairs.distance[block][other] > 0.5
