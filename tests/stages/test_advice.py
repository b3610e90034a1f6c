"""What methods would remove, and what that is predicted to cost."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BLOCKS, tokens

from compresso.calibration.candidates import Candidate
from compresso.calibration.statistics import measure_blocks
from compresso.calibration.streams import Streams
from compresso.kernels.allocation import total
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime
from compresso.stages.advice import ALL_RATIOS, advise_bits, make_advice, measure_damage
from compresso.stages.prune_units import cost_of, sub_block_costs, unit_of

BATCHES = [tokens(3, 16, seed=1), tokens(2, 16, seed=2)]
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    source, work = checkpoints("llama"), tmp_path_factory.mktemp("work")
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    scores = measure_blocks(adapter, source, BATCHES, angles="all", runtime=RUNTIME, spill_dir=work)
    streams = Streams(adapter, source, BATCHES, budget=10**9, spill_dir=work)
    damage = measure_damage(streams, BLOCKS)
    return source, adapter, streams, scores, damage


def test_damage_is_of_each_unit_alone(measured):
    _, _, streams, _, damage = measured
    assert damage[""]["kl"] == 0
    assert len(damage) == 1 + 3 * BLOCKS
    for name in ("a2", "m5", "3"):
        alone = Candidate(frozenset(unit_of(name)))
        assert streams.score([alone], metric="loss") == [damage[name]["loss"]]
        assert streams.score([alone], metric="kl") == [damage[name]["kl"]]


def test_advice_says_what_goes_and_predicts_the_sum(measured):
    source, adapter, _, scores, damage = measured
    costs = sub_block_costs(adapter, source)
    advice = make_advice(scores, costs, total=source.parameters, ratios=ALL_RATIOS, damage=damage)
    assert list(advice) == [f"{percent}%" for percent in range(5, 55, 5)]
    for ratio, choices in zip(ALL_RATIOS, advice.values(), strict=True):
        for choice in choices.values():
            if "impossible" in choice:
                continue
            units = [unit_of(name) for name in choice["drop"]]
            share = sum(cost_of(unit, costs) for unit in units) / source.parameters
            assert choice["share"] == pytest.approx(share)
            assert abs(share - ratio) <= max(costs) / source.parameters
            assert choice["kl"] == pytest.approx(sum(damage[str(n)]["kl"] for n in choice["drop"]))


def test_without_damage_nothing_is_predicted_from_it(measured):
    source, adapter, _, scores, _ = measured
    costs = sub_block_costs(adapter, source)
    advice = make_advice(scores, costs, total=source.parameters, ratios=(0.3,), damage=None)
    assert "least damage" not in advice["30%"]
    assert "kl" not in advice["30%"]["shortgpt"] and "influence" in advice["30%"]["shortgpt"]


def test_advice_on_bits_is_the_least_sum_that_fits():
    damage = [[5.0, 2.0, 1.0], [0.5, 0.2, 0.1]]
    sizes = [[25, 35, 45]] * 2
    advice = advise_bits(damage, sizes, weights=160)
    assert list(advice) == ["2.5", "3", "3.5", "4"]
    assert advice["2.5"] == {"levels": [0, 0], "kl": 5.5, "kl_uniform": 5.5}
    assert advice["3"] == {"levels": [1, 0], "kl": 2.5, "kl_uniform": 5.5}
    assert advice["3.5"] == {"levels": [2, 0], "kl": 1.5, "kl_uniform": 2.2}
    for bits, entry in advice.items():
        assert total(sizes, entry["levels"]) <= float(bits) * 160 / 8
    assert list(advise_bits(damage, [[31, 35, 45]] * 2, weights=160)) == ["3.5", "4"]
