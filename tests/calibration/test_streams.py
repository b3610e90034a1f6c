"""Against a run of the whole, changed model for every candidate."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tiny_models import BLOCKS, TINY_MODELS, build, tokens
from torch import nn
from torch.nn import functional as F
from walking import RAM

from compresso.calibration.candidates import Candidate
from compresso.calibration.streams import Streams
from compresso.families import FAMILIES
from compresso.models.adapter import ModelAdapter

BATCHES = [tokens(3, 16, seed=1), tokens(3, 16, seed=2), tokens(1, 16, seed=3)]
SUB_BLOCKS = range(2 * BLOCKS)
MIXED = [
    Candidate(),
    Candidate(frozenset({0})),
    Candidate(frozenset({3})),
    Candidate(frozenset({2, 3})),
    Candidate(frozenset({2, 3, 5})),
    Candidate(frozenset({2 * BLOCKS - 1, 2 * BLOCKS - 2})),
    Candidate(frozenset({4}), borrowed=((1, 0),)),
    Candidate(borrowed=((0, 1), (3, 2))),
    Candidate(frozenset(SUB_BLOCKS)),
]


class Zero(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *_, **__):
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def changed(model, family, candidate):
    """The whole model with what the candidate asks for."""
    blocks = model.get_submodule(family.blocks)
    originals = {name: value.clone() for name, value in blocks.state_dict().items()}
    with torch.no_grad():
        for block, source in candidate.borrowed:
            for path in (path for group in family.linears for path in group):
                for name, parameter in blocks[block].get_submodule(path).named_parameters():
                    parameter.copy_(originals[f"{source}.{path}.{name}"])
    for sub_block in candidate.removed:
        block, half = divmod(sub_block, 2)
        for path in set(family.mlp) if half else {family.attention}:
            parent, _, name = path.rpartition(".")
            setattr(blocks[block].get_submodule(parent), name, Zero(not half))
    return model


@torch.no_grad()
def loss(model, original=None):
    lost, count = 0.0, 0
    for batch in BATCHES:
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        if original is None:
            lost += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        else:
            expected = original(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            lost += F.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True)
        count += batch[:, 1:].numel()
    return (lost / count).item()


def streams_of(source, tmp_path, budget=RAM):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    return Streams(adapter, source, BATCHES, budget=budget, spill_dir=tmp_path)


@pytest.mark.parametrize("family", sorted(TINY_MODELS))
def test_scores_are_those_of_the_changed_models(family, checkpoints, tmp_path):
    found = streams_of(checkpoints(family), tmp_path).score(MIXED, metric="loss")
    expected = [loss(changed(build(family), FAMILIES[family], candidate)) for candidate in MIXED]
    assert found == pytest.approx(expected, rel=1e-5)


def test_divergences_from_the_original(checkpoints, models, tmp_path):
    found = streams_of(checkpoints("qwen2"), tmp_path).score(MIXED, metric="kl")
    expected = [
        loss(changed(build("qwen2"), FAMILIES["qwen2"], candidate), models("qwen2"))
        for candidate in MIXED
    ]
    assert found[0] == 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_together_is_bit_for_bit_alone(checkpoints, tmp_path):
    source = checkpoints("llama")
    together = streams_of(source, tmp_path).score(MIXED, metric="loss")
    streams = streams_of(source, tmp_path)
    assert together == [streams.score([candidate], metric="loss")[0] for candidate in MIXED]
    assert together == streams_of(source, tmp_path, budget=0).score(MIXED, metric="loss")


def test_what_candidates_share_runs_once(checkpoints, tmp_path):
    """One step of a greedy search: the trunk, and every sub-block left out once."""
    streams = streams_of(checkpoints("llama"), tmp_path)
    streams.score([Candidate(frozenset({one})) for one in SUB_BLOCKS], metric="loss")
    forwards, naive = streams.take_forwards()
    assert naive == 2 * BLOCKS * (2 * BLOCKS - 1)
    # Sub-block n runs once for each of the n candidates that left the trunk before it, and for the
    # trunk unless it is the last.
    assert forwards == sum(SUB_BLOCKS) + 2 * BLOCKS - 1
    assert forwards < 0.6 * naive
    assert streams.take_forwards() == (0, 0)


def test_scores_on_some_batches(checkpoints, tmp_path):
    streams = streams_of(checkpoints("llama"), tmp_path)
    whole = streams.score(MIXED[:2], metric="loss")
    some = [streams.score(MIXED[:2], metric="loss", batches=[b]) for b in range(len(BATCHES))]
    weights = [batch[:, 1:].numel() for batch in BATCHES]
    for place, expected in enumerate(whole):
        means = [scores[place] for scores in some]
        mean = sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(expected, rel=1e-6)


def test_pairs(checkpoints, tmp_path):
    pairs = [Candidate(frozenset(pair)) for pair in combinations(range(5), 2)]
    found = streams_of(checkpoints("llama"), tmp_path).score(pairs, metric="loss")
    expected = [loss(changed(build("llama"), FAMILIES["llama"], pair)) for pair in pairs]
    assert found == pytest.approx(expected, rel=1e-5)


def other(block, version):
    """Other weights for two linears of a block, by a name."""
    generator = torch.Generator().manual_seed(100 * block + version)
    prefix = f"model.layers.{block}."
    return {
        f"{prefix}self_attn.o_proj.weight": torch.randn(64, 64, generator=generator),
        f"{prefix}mlp.up_proj.weight": torch.randn(96, 64, generator=generator),
    }


VERSIONS = [
    Candidate(),
    Candidate(versions=((0, 1),)),
    Candidate(versions=((2, 1),)),
    Candidate(versions=((2, 2),)),
    Candidate(versions=((2, 2), (4, 1))),
    Candidate(versions=((2, 2), (4, 2))),
    Candidate(frozenset({2}), borrowed=((2, 0),), versions=((2, 2), (4, 2))),
]


def versioned(source, tmp_path, budget=RAM):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    return Streams(adapter, source, BATCHES, budget=budget, spill_dir=tmp_path, versions=other)


def test_versions_are_the_model_with_those_weights(checkpoints, tmp_path):
    found = versioned(checkpoints("llama"), tmp_path).score(VERSIONS, metric="loss")
    expected = []
    for candidate in VERSIONS:
        model = changed(build("llama"), FAMILIES["llama"], candidate)
        for block, version in candidate.versions:
            model.load_state_dict(other(block, version), strict=False)
        expected.append(loss(model))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == len(found)


def test_versions_together_are_bit_for_bit_alone(checkpoints, tmp_path):
    source = checkpoints("llama")
    for metric in ("loss", "kl"):
        together = versioned(source, tmp_path).score(VERSIONS, metric=metric)
        streams = versioned(source, tmp_path)
        assert together == [streams.score([one], metric=metric)[0] for one in VERSIONS]
        assert together == versioned(source, tmp_path, budget=0).score(VERSIONS, metric=metric)


def test_what_versions_share_runs_once(checkpoints, tmp_path):
    streams = versioned(checkpoints("llama"), tmp_path)
    streams.score(VERSIONS[2:6], metric="loss")
    forwards, naive = streams.take_forwards()
    assert naive == 4 * 2 * BLOCKS
    # Blocks 0 and 1 once, 2 and 3 with each of two versions of 2, then three ways of 4 and 5.
    streams_at = [1, 1, 2, 2, 4, 4]
    assert forwards == 2 * sum(streams_at)
