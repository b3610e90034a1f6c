"""Searches over what to remove: the same sets as the naive searches, kept through a kill."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from tiny_models import BLOCKS, TINY_MODELS, build, tokens

from compresso.calibration.candidates import Candidate
from compresso.calibration.data import Calibration
from compresso.calibration.streams import Streams
from compresso.checkpoint.proof import prove
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError, ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import structure_of
from compresso.recipe import make_step
from compresso.runtime import Runtime
from compresso.stages import prune_choice
from compresso.stages.prune import prune
from compresso.stages.prune_units import unit_of

BATCHES = [tokens(3, 16, seed=1), tokens(3, 16, seed=2)]
CALIBRATION = Calibration(BATCHES, {"dataset": "test"})
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


def run(source, target, method, *, stop_after=None, fresh=False, **settings):
    """The report of a finished step; a run that is stopped raises KeyboardInterrupt."""
    step = make_step("prune", {"method": method, **settings}, where="test")
    with CheckpointWriter(target, key="test", parts=BLOCKS + 1, fresh=fresh) as writer:
        if stop_after is not None:
            _stop(writer, stop_after)
        report = prune(source, step, CALIBRATION, writer, RUNTIME)
        writer.finalize(
            config=report.config, side_files=source.side_files(), expected=report.expected
        )
        writer.publish()
    return report


def _stop(writer, after):
    remember = writer.remember
    left = [after]

    def remember_some(state):
        remember(state)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    writer.remember = remember_some


def streams_of(source, tmp_path):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    return Streams(adapter, source, BATCHES, budget=10**9, spill_dir=tmp_path)


def naive_order(source, tmp_path, count, metric="loss", units=None):
    """Greedy removal, with a run of its own for every candidate."""
    streams = streams_of(source, tmp_path)
    units = units or [(half,) for half in range(2 * BLOCKS)]
    order = []
    for _ in range(count):
        gone = {half for unit in order for half in unit}
        left = [unit for unit in units if unit not in order]
        scores = [
            streams.score([Candidate(frozenset(gone.union(unit)))], metric=metric)[0]
            for unit in left
        ]
        order.append(left[scores.index(min(scores))])
    return order


def removed(report):
    halves = report.summary.get("removed_halves", [])
    whole = [half for block in report.summary["removed_blocks"] for half in unit_of(block)]
    return sorted([*whole, *(unit_of(name)[0] for name in halves)])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_blockpruner_removes_what_the_naive_search_does(family, metric, checkpoints, tmp_path):
    source = checkpoints(family)
    report = run(source, tmp_path / "out", "blockpruner", drop_count=5, metric=metric)
    naive = naive_order(source, tmp_path, 5, "kl" if metric == "kl" else "loss")
    assert [unit_of(name) for name in report.summary["order"]] == naive
    assert removed(report) == sorted(half for (half,) in naive)
    prove(tmp_path / "out", report.fingerprint, dtype=torch.float32)


@pytest.mark.parametrize("family", sorted(TINY_MODELS))
def test_every_family_loads_without_what_was_removed(family, checkpoints, tmp_path):
    """The fingerprint is of the model in memory; the proof loads the checkpoint and generates."""
    source = checkpoints(family)
    report = run(source, tmp_path / "out", "manual", drop=["a0", 2, "m3", f"m{BLOCKS - 1}"])
    assert removed(report) == [0, 4, 5, 7, 2 * BLOCKS - 1]
    prove(tmp_path / "out", report.fingerprint, dtype=torch.float32)
    structure = structure_of(report.config)
    assert structure.no_attention == (0,) and structure.no_mlp == (2, BLOCKS - 2)
    alone = streams_of(source, tmp_path)
    together = [Candidate(frozenset(removed(report)))]
    written = streams_of(Checkpoint(tmp_path / "out"), tmp_path)
    assert written.score([Candidate()], metric="loss") == pytest.approx(
        alone.score(together, metric="loss"), rel=1e-5
    )


def test_a_smaller_amount_is_a_prefix(checkpoints, tmp_path):
    source = checkpoints("llama")
    many = run(source, tmp_path / "many", "blockpruner", drop_count=6)
    few = run(source, tmp_path / "few", "blockpruner", drop_count=3)
    assert many.summary["order"][:3] == few.summary["order"]


def test_a_recorded_order_gives_any_smaller_amount_for_nothing(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    report = run(source, tmp_path / "many", "blockpruner", drop_count=6)
    records = {tmp_path / "many": {"report": report.to_json()}}
    monkeypatch.setattr(prune_choice, "read_record", lambda path: records.get(path, {}))
    order = str(tmp_path / "many")
    again = run(source, tmp_path / "few", "manual", order=order, drop_count=3)
    assert removed(again) == sorted(unit_of(name)[0] for name in report.summary["order"][:3])
    with pytest.raises(ConfigError, match="lost only 6 units"):
        run(source, tmp_path / "more", "manual", order=order, drop_count=7)
    with pytest.raises(CheckpointError, match="does not say in which order"):
        run(source, tmp_path / "none", "manual", order=str(source.path), drop_count=1)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_the_ratio_is_as_near_as_the_order_allows(ratio, checkpoints, tmp_path):
    source = checkpoints("llama")
    report = run(source, tmp_path / "out", "blockpruner", ratio=ratio)
    rows = {f"{row['half'][0]}{row['block']}": row["parameters"] for row in report.rows}
    sizes = [rows[name] for name in report.summary["order"]]
    shares = [sum(sizes[:n]) / source.parameters for n in range(len(sizes) + 1)]
    nearest = min(shares, key=lambda share: abs(share - ratio))
    assert report.summary["removed_share"] == pytest.approx(nearest)
    assert Checkpoint(tmp_path / "out").parameters == report.summary["parameters_after"]


@pytest.mark.parametrize(("unit", "halves"), [("attention", {0}), ("mlp", {1})])
def test_units_of_one_kind(unit, halves, checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path / "out", "blockpruner", drop_count=3, unit=unit)
    assert {half % 2 for half in removed(report)} == halves


def test_whole_blocks_make_a_plain_checkpoint(checkpoints, tmp_path):
    source = checkpoints("llama")
    report = run(source, tmp_path / "out", "blockpruner", drop_count=2, unit="block")
    whole = [(2 * block, 2 * block + 1) for block in range(BLOCKS)]
    naive = naive_order(source, tmp_path, 2, units=whole)
    assert [unit_of(name) for name in report.summary["order"]] == naive
    assert report.config["model_type"] == "llama" and "compresso" not in report.config
    assert report.config["num_hidden_layers"] == BLOCKS - 2


@pytest.mark.parametrize("method", ["blockpruner", "evopress", "llm-drop", "random"])
def test_protected_blocks_stay(method, checkpoints, tmp_path):
    settings = {"protect": ["first", "last"], "keep": [2], "drop_count": 4, "unit": "sub-block"}
    if method == "evopress":
        settings |= {"generations": 2, "offspring": 4, "initial": 4}
    report = run(checkpoints("llama"), tmp_path / "out", method, **settings)
    assert len(removed(report)) == 4
    assert not {half // 2 for half in removed(report)} & {0, 2, BLOCKS - 1}


def test_useless_parts_go_first(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    whole = streams_of(source, tmp_path).score([Candidate()], metric="loss")
    for method, more in (("blockpruner", {"metric": "kl"}), ("llm-drop", {})):
        report = run(source, tmp_path / method, method, drop_count=2, **more)
        assert removed(report) == [4, 9]
        after = streams_of(Checkpoint(tmp_path / method), tmp_path)
        assert after.score([Candidate()], metric="loss") == whole  # to the bit


def test_evopress_finds_the_best_of_all_sets(checkpoints, tmp_path):
    source = checkpoints("llama")
    settings = {"drop_count": 4, "generations": 12, "offspring": 24, "seed": 1}
    report = run(source, tmp_path / "out", "evopress", **settings)
    attention, mlp = range(0, 2 * BLOCKS, 2), range(1, 2 * BLOCKS, 2)
    sets = [frozenset((*a, *m)) for a in combinations(attention, 2) for m in combinations(mlp, 2)]
    scores = streams_of(source, tmp_path).score(list(map(Candidate, sets)), metric="kl")
    assert frozenset(removed(report)) == sets[scores.index(min(scores))]
    assert report.summary["kl"] == pytest.approx(min(scores))


def test_evolution_never_gets_worse_and_keeps_the_budget(checkpoints, tmp_path):
    settings = {"ratio": 0.3, "generations": 6, "offspring": 6, "initial": 6}
    report = run(checkpoints("llama"), tmp_path / "out", "evopress", **settings)
    history = report.summary["history"][1:]  # the start is scored on fewer tokens
    assert all(b["kl"] <= a["kl"] for a, b in pairwise(history))
    assert [entry["generation"] for entry in history] == list(range(1, 7))
    smallest = min(row["parameters"] for row in report.rows)
    wanted = 0.3 * report.summary["parameters_before"]
    assert abs(report.summary["removed_parameters"] - wanted) <= smallest / 2


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("blockpruner", {"drop_count": 4}),
        ("evopress", {"drop_count": 4, "generations": 5, "offspring": 6, "initial": 6}),
        ("llm-drop", {"drop_count": 4, "iterative": True}),
    ],
)
def test_a_stopped_search_goes_on_where_it_was(method, settings, checkpoints, tmp_path):
    source = checkpoints("llama")
    whole = run(source, tmp_path / "whole", method, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", method, stop_after=2, **settings)
    assert (tmp_path / "out.partial" / "state.json").exists()
    resumed = run(source, tmp_path / "out", method, **settings)
    assert resumed.rows == whole.rows
    assert resumed.config == whole.config
    assert not (tmp_path / "out" / "state.json").exists()
    for name in ("history", "order"):
        assert resumed.summary.get(name) == whole.summary.get(name)


def test_measuring_again_after_each_removal(checkpoints, tmp_path):
    """The same as to prune one unit, and to prune what is left of that, and so on."""
    again = run(checkpoints("llama"), tmp_path / "again", "llm-drop", drop_count=3, iterative=True)
    source = checkpoints("llama")
    for number in range(3):
        run(source, tmp_path / str(number), "llm-drop", drop_count=1)
        source = Checkpoint(tmp_path / str(number))
    assert source.config == again.config


@pytest.mark.parametrize("method", ["random", "evopress"])
def test_a_seed_gives_one_result(method, checkpoints, tmp_path):
    settings = {"drop_count": 4, "unit": "sub-block"}
    if method == "evopress":
        settings |= {"generations": 1, "offspring": 2, "survivors": 1, "initial": 1}
    found = [
        removed(run(checkpoints("llama"), tmp_path / str(n), method, seed=seed, **settings))
        for n, seed in enumerate((3, 3, 4))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "blockpruner", "drop_count": 12}, "cannot remove 12 of 12 units"),
        ({"method": "blockpruner", "ratio": 0.001}, "less than half a unit"),
        ({"method": "random", "drop_count": 1, "keep": [6]}, "there is no block `6`"),
        ({"method": "random", "drop_count": 1, "keep": [0, 1, 2, 3, 4]}, "too much is protected"),
        ({"method": "manual", "drop": [f"a{n}" for n in range(6)]}, "every attention"),
        ({"method": "manual", "drop": ["a7"]}, "there is no block `7`"),
    ],
)
def test_what_cannot_be_removed(settings, message, checkpoints, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(checkpoints("llama"), tmp_path / "out", **settings)


def test_what_is_gone_cannot_go_again(checkpoints, tmp_path):
    run(checkpoints("llama"), tmp_path / "once", "manual", drop=["a1", "m4"])
    source = Checkpoint(tmp_path / "once")
    with pytest.raises(ConfigError, match="`a1` is not in the model any more"):
        run(source, tmp_path / "out", "manual", drop=["a1"])
    report = run(source, tmp_path / "twice", "blockpruner", drop_count=2)
    assert not {2, 9}.intersection(map(int, removed(report)))
    prove(tmp_path / "twice", report.fingerprint, dtype=torch.float32)
    assert {1} <= set(structure_of(report.config).no_attention) or 1 in report.summary[
        "removed_blocks"
    ]
