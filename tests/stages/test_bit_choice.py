"""Choosing bits: against all choices of a small model, and what must hold of every search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
import torch
from tiny_models import BLOCKS, build, tokens

from compresso.calibration import sensitivity
from compresso.calibration.data import Calibration
from compresso.calibration.sensitivity import Sensitivity, noise_ledger
from compresso.calibration.statistics import measure_blocks
from compresso.checkpoint.layout import pack
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.allocation import in_order, total, uniform
from compresso.kernels.linearity import by_importance
from compresso.models.adapter import ModelAdapter
from compresso.quantize_settings import GptqSettings, RtnSettings
from compresso.runtime import Runtime
from compresso.stages import bit_choice
from compresso.stages.bit_choice import budget_of, choose_bits
from compresso.stages.bit_job import BitJob
from compresso.stages.bit_search import evolve
from compresso.stages.ladder import make_ladder, packed_bytes
from compresso.stages.quantize_plan import make_plan

BATCHES = [tokens(2, 16, seed=1), tokens(2, 16, seed=2)]
TEXT = Calibration(BATCHES, {"dataset": "test", "hash": "text"})
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


@dataclass(frozen=True)
class Settings:
    target_bits: float | None = 5.5
    size: str | None = None
    allocation: str = "dp"
    predict: str = "damage"
    sensitivity_tokens: int = 64
    score_tokens: int = 64
    first_tokens: int = 32
    generations: int = 3
    offspring: int = 6
    survivors: int = 2
    seed: int = 0


@pytest.fixture
def job(checkpoints, tmp_path):
    """Makes jobs; a model of them is the tiny llama."""
    made = []

    def make(settings=None, *, name="out", method="rtn", source=None, calibration=TEXT, **changes):
        source = source or checkpoints("llama")
        chosen = settings or Settings(**changes)
        adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
        classes = {"rtn": RtnSettings, "gptq": GptqSettings}
        quantizer = classes[method](group_size=16)
        for other in made:
            other.target.close()
        made.append(
            BitJob(
                chosen,
                adapter,
                source,
                calibration,
                make_plan(adapter, quantizer, packed_as="compressed-tensors").groups,
                make_ladder(method, quantizer, source.dtype),
                CheckpointWriter(tmp_path / name, key="test", parts=BLOCKS + 1),
                RUNTIME,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.target.close()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sizes_are_those_of_what_is_stored(bits, group_size, symmetric):
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    settings = RtnSettings(group_size=group_size, symmetric=symmetric)
    ladder = make_ladder("rtn", settings, torch.bfloat16)
    stored = pack("x", ladder.quantize(weight, None, bits), torch.bfloat16, symmetric=symmetric)
    expected = sum(tensor.nbytes for tensor in stored.values())
    assert ladder.nbytes((24, 96), bits) == expected
    options = {"group_size": group_size, "symmetric": symmetric, "dtype": torch.bfloat16}
    assert packed_bytes((24, 96), bits, **options) == expected


@pytest.mark.parametrize("allocation", ["dp", "search", "lim", "zd", "uniform"])
def test_every_allocation_hits_the_target(allocation, job):
    made = job(allocation=allocation, target_bits=5.9)
    found = choose_bits(made)
    assert [len(own) for own in found.bits] == [4] * BLOCKS
    stored = sum(row["bytes"] for row in found.rows)
    names = [name for place in made.places for name in made.weights(place)]
    weights = sum(made.source.weight_info(name).nbytes // 4 for name in names)
    assert found.summary["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert found.summary["bits_per_weight"] <= 5.905
    if allocation != "uniform":
        assert found.summary["bits_per_weight"] > 5.8
    assert [row["bits"] for row in found.rows] == [bits for own in found.bits for bits in own]
    assert found.summary["measured_kl"] > 0
    if allocation in ("dp", "search"):
        predicted = sum(row["damage"] for row in found.rows)
        assert found.summary["predicted_kl"] == pytest.approx(predicted)
    assert not list(made.target.partial.parent.glob("*levels*"))


def test_the_size_is_of_everything_stored(job):
    least = job()
    smallest = least.other_bytes + total(least.sizes, [0] * len(least.sizes))
    made = job(target_bits=None, size=f"{smallest + 9000}")
    found = choose_bits(made)
    assert smallest + 6000 < found.summary["bytes"] <= smallest + 9000
    dense = sum(made.source.weight_info(n).nbytes for p in made.places for n in made.weights(p))
    assert made.other_bytes == made.source.stored_bytes - dense
    assert replace(made, elsewhere=5).other_bytes == 5


def test_a_target_out_of_reach(job):
    with pytest.raises(ConfigError, match="`target_bits`: 2 bits per weight cannot be") as raised:
        choose_bits(job(target_bits=2.0))
    # 2 bits, 2 bytes of scale for 16 columns in float32 are 4, and 16 bytes of shape per linear.
    assert "come to 4.0" in raised.value.hint and "to 10.0" in raised.value.hint
    with pytest.raises(ConfigError, match="`target_bits`: 12 bits"):
        choose_bits(job(target_bits=12.0))
    with pytest.raises(ConfigError, match="`size`: 1kB cannot be reached") as raised:
        choose_bits(job(target_bits=None, size="1kB"))
    assert "kB to" in raised.value.hint


def test_nothing_is_better_than_dp_on_what_was_measured(job, tmp_path):
    """All choices of a model of one block."""
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "small")
    made = job(source=Checkpoint(tmp_path / "small"), target_bits=6.2)
    found = choose_bits(made)
    ledger = made.ledger
    damage = [ledger.get(made.sensitivity.name(place))["kl"] for place in made.places]
    choices = product(range(4), repeat=4)
    best = min(
        sum(group[level] for group, level in zip(damage, levels, strict=True))
        for levels in choices
        if total(made.sizes, levels) <= budget_of(made)
    )
    assert found.summary["predicted_kl"] == pytest.approx(best)


def test_slopes_and_errors_can_predict_instead(job, monkeypatch):
    monkeypatch.setattr(sensitivity, "noise_levels", lambda: [0.01, 0.02])
    made = job(predict="noise", target_bits=6.2)
    found = choose_bits(made)
    lines = made.sensitivity.noise(noise_ledger(made.sensitivity, made.target.target.parent))
    for row, place in zip(found.rows, made.places, strict=True):
        assert row["damage"] == pytest.approx(lines[place].slope * row["error"], rel=1e-5)


def test_orders_of_blocks(job, checkpoints):
    made = job(allocation="lim", target_bits=5.8)
    scores = measure_blocks(
        made.adapter,
        made.source,
        BATCHES,
        angles=None,
        runtime=RUNTIME,
        spill_dir=made.target.partial,
    )
    blocks = by_importance([-value for value in scores.similarity])
    order = [4 * block + group for block in blocks for group in range(4)]
    expected = in_order(order, made.sizes, budget_of(made))
    assert choose_bits(made).bits == made.by_block(expected)
    assert made.by_block(expected)[0] == [4] * 4  # the first block comes first
    made = job(name="zd", allocation="zd", target_bits=5.8)
    shares = []
    for block in range(BLOCKS):
        weights = checkpoints("llama").load_weights(
            [name for group in range(4) for name in made.weights((block, group))]
        )
        flat = torch.cat([weight.flatten() for weight in weights.values()]).double()
        z = (flat - flat.mean()) / flat.std(unbiased=False)
        shares.append(-float((z > 1).double().mean()))
    order = [4 * block + group for block in by_importance(shares) for group in range(4)]
    expected = in_order(order, made.sizes, budget_of(made))
    assert choose_bits(made).bits == made.by_block(expected)


def test_without_text_random_tokens_are_read(job):
    found = choose_bits(job(calibration=None))
    assert found.summary["measured_kl"] > 0
    assert found == choose_bits(job(name="again", calibration=None))


def test_what_was_measured_is_found_by_a_later_run(job, monkeypatch):
    first = choose_bits(job(name="a", method="gptq"))
    monkeypatch.setattr(Sensitivity, "_score", None)  # to measure again would fail
    again = choose_bits(job(name="b", method="gptq"))
    assert again == first
    cheaper = choose_bits(job(name="c", method="gptq", target_bits=4.6))
    assert cheaper.summary["bits_per_weight"] < first.summary["bits_per_weight"]
    assert cheaper.summary["predicted_kl"] > first.summary["predicted_kl"]


def test_search_is_no_worse_than_its_starts_and_never_gets_worse(job):
    direct = choose_bits(job(name="a", target_bits=6.5))
    same = choose_bits(job(name="b", target_bits=6.5, allocation="uniform"))
    found = choose_bits(job(name="c", target_bits=6.5, allocation="search", generations=5))
    kls = [entry["kl"] for entry in found.summary["history"]]
    assert kls[0] == min(direct.summary["measured_kl"], same.summary["measured_kl"])
    assert found.summary["history"][0]["starts"] == [
        direct.summary["measured_kl"],
        same.summary["measured_kl"],
    ]
    assert all(later <= earlier for earlier, later in pairwise(kls))
    assert found.summary["measured_kl"] == kls[-1]


def stop_after(target, count):
    remember, left = target.remember, [count]

    def some(state):
        remember(state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    target.remember = some


def test_a_killed_search_goes_on(job, tmp_path):
    expected = choose_bits(job(name="whole", allocation="search"))
    killed = job(allocation="search")
    stop_after(killed.target, 2)
    with pytest.raises(KeyboardInterrupt):
        choose_bits(killed)
    assert (tmp_path / "out.partial-levels").is_dir()
    again = job(allocation="search")
    # Nothing is quantized again.
    without = replace(again, ladder=replace(again.ladder, quantize=None))
    assert choose_bits(without) == expected
    assert not (tmp_path / "out.partial-levels").exists()
    # Nor chosen, once that was done.
    done = job(allocation="search")
    assert choose_bits(replace(done, ladder=replace(done.ladder, quantize=None))) == expected


def test_evolution_finds_the_best_of_a_model_that_does_not_add_up(tmp_path):
    """Pairs of groups that are only good together: dynamic programming would not see it."""
    sizes = [[2, 3, 4]] * 8

    def loss(levels):
        pairs = zip(levels[::2], levels[1::2], strict=True)
        return sum((2 - min(pair)) ** 2 * (place + 1) for place, pair in enumerate(pairs))

    def score(choices, tokens, random):
        assert all(total(sizes, levels) <= 24 for levels in choices)
        return [float(loss(levels)) for levels in choices]

    fitting = [c for c in product(range(3), repeat=8) if total(sizes, c) <= 24]
    settings = Settings(generations=100, offspring=40)
    with CheckpointWriter(tmp_path / "out", key="test", parts=1) as target:
        starts = [uniform(sizes, 24), [2, 0, 0, 2, 2, 0, 0, 2]]
        found = evolve(starts, sizes, 24, score, target, settings=settings)
        assert target.recall() == found
    assert found["kl"] == loss(found["parent"]) == min(map(loss, fitting))


def test_a_seed_gives_one_search(job):
    options = {"allocation": "search", "target_bits": 6.2}
    first = choose_bits(job(name="a", **options))
    assert first == choose_bits(job(name="b", **options))
    other = choose_bits(job(name="c", seed=1, **options))
    assert other.summary["history"][0] == first.summary["history"][0]


def test_allocations_that_measure_nothing_but_the_result(job, monkeypatch):
    monkeypatch.setattr(bit_choice, "_damage", None)
    assert "predicted_kl" not in choose_bits(job(allocation="uniform")).summary
