"""Corrections trained on the whole model: what they gain, what is written, and what is refused."""

from __future__ import annotations

import csv
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from restructured import STRUCTURES, save
from tiny_models import build, tokens

from compresso import config
from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    NumericalError,
    ResourceError,
)
from compresso.models.structure import structure_of
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.stages.compensate_summary import no_gain
from compresso.stages.compensate_trained import mean_rank
from compresso.stages.whole_model import own_linears
from compresso.training import loop, processes
from compresso.training.options import History

RUNTIME = make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
FAST = {
    "steps": 20,
    "sequences": 4,
    "rate": 1e-2,
    "evaluate_every": 10,
    "rank": 4,
    "start": "gaussian",
}
SPREAD = {"rank": None, "size": "+6KB", "start": "auto"}


def run(source, target, stage="compensate", runtime=RUNTIME, samples=16, length=24, **values):
    step = make_step(stage, values, where="test")
    text = target.parent / "tokens.npy"
    np.save(text, tokens(16, length, seed=5).numpy())
    data = {"dataset": str(text), "samples": samples, "batch_size": 4}
    calibration = config.build(CalibrationSettings, data, where="test")
    return run_step(step, source, calibration, target, runtime)


def trained(source, target, method="rilq", **values):
    return run(source, target, method=method, **FAST | values)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A tiny model of a family in 2 bits, made once."""
    made = {}

    def quantized_of(family):
        if family not in made:
            path = tmp_path_factory.mktemp("quantized") / family
            build(family).save_pretrained(path / "original")
            source = Checkpoint(path / "original")
            method = "hqq" if family == "gpt2" else "rtn"  # which its linears can be packed as
            values = {"method": method, "bits": 2, "group_size": 16}
            run(source, path / "packed", stage="quantize", **values)
            made[family] = Checkpoint(path / "packed")
        return made[family]

    return quantized_of


def stored(checkpoint):
    return {name: checkpoint.load([name])[name] for name in checkpoint.names()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("method", "family"), [("rilq", "llama"), ("lrec", "gpt2"), ("rilq", "gemma2")]
)
def test_an_adapter_comes_beside_packed_weights(quantized, method, family, tmp_path):
    source = quantized(family)
    report = trained(source, tmp_path / "out", method).report
    written = Checkpoint(tmp_path / "out")
    assert same(stored(written), stored(source))
    assert written.adapter.paths == sorted(own_linears(open_adapter(source, RUNTIME)))
    assert set(written.adapter.ranks.values()) == {4}
    rows = report.rows
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert rows[-1]["heldout_loss"] < 0.98 * rows[0]["heldout_loss"]
    parts = {"heldout_divergence", *(["heldout_hidden"] if method == "rilq" else [])}
    assert {"heldout_hidden", "heldout_divergence"} & rows[0].keys() == parts
    assert all(rows[-1][part] < rows[0][part] for part in parts)
    assert report.summary["bytes_added"] == written.stored_bytes - source.stored_bytes
    assert (tmp_path / "out" / "training.csv").read_text().count("\n") == 22
    assert not (tmp_path / "out" / "work").exists()


def test_it_begins_as_the_source_and_ends_as_what_is_written(quantized, tmp_path):
    """Held-out numbers against whole stock models that have the written weights."""
    source = quantized("llama")
    report = trained(source, tmp_path / "out").report
    heldout = tokens(16, 24, seed=5)[-3:]

    def perplexity(checkpoint):
        model = build("llama")
        model.load_state_dict(checkpoint.load_weights(checkpoint.weight_names()), strict=False)
        return model(heldout, labels=heldout).loss.exp().item()

    original = Checkpoint(source.path.parent / "original")
    summary = report.summary
    assert summary["ppl_before"] == pytest.approx(perplexity(source), rel=1e-4)
    assert summary["ppl_after"] == pytest.approx(perplexity(Checkpoint(tmp_path / "out")), rel=1e-4)
    assert summary["ppl_original"] == pytest.approx(perplexity(original), rel=1e-4)
    found = [np.log(summary[f"ppl_{name}"]) for name in ("before", "after", "original")]
    assert summary["recovered"] == pytest.approx((found[0] - found[1]) / (found[0] - found[2]))
    assert summary["tokens_seen"] == 20 * 4 * 24 and summary["epochs"] == pytest.approx(80 / 13)


@pytest.mark.parametrize("kind", ["both kinds", "shared", "corrected"])
def test_dense_models_take_corrections_in_their_weights(kind, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "original")
    source = save(model, STRUCTURES[kind], tmp_path / "source")
    given = {"original": str(tmp_path / "original")}
    report = trained(source, tmp_path / "out", "lrec", **given).report
    written = Checkpoint(tmp_path / "out")
    assert written.adapter is None and structure_of(written.config) == STRUCTURES[kind]
    paths = own_linears(open_adapter(source, RUNTIME))
    before, after = stored(source), stored(written)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {f"{path}.weight" for path in paths}
    for name in changed:
        difference = after[name] - before[name]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 4
    rows = report.rows
    assert rows[-1]["heldout_loss"] < 0.98 * rows[0]["heldout_loss"]
    assert report.summary["bytes_added"] == 0


def test_dense_models_can_keep_an_adapter(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "original")
    source = save(model, STRUCTURES["both kinds"], tmp_path / "source")
    given = {"original": str(tmp_path / "original"), "merge": False}
    trained(source, tmp_path / "out", "lrec", **given)
    written = Checkpoint(tmp_path / "out")
    assert same(stored(written), stored(source)) and written.adapter is not None


def test_it_can_begin_with_what_eora_finds(quantized, tmp_path):
    source = quantized("llama")
    still = {"steps": 1, "rate": 1e-6}
    plain = trained(source, tmp_path / "plain", **still).report
    begun = trained(source, tmp_path / "begun", start="auto", **still).report
    eora = run(source, tmp_path / "eora", samples=13, method="eora", rank=4)
    losses = [report.rows[0]["heldout_loss"] for report in (plain, begun)]
    assert losses[1] != losses[0]  # so few tokens of random text do not say which is lower
    assert begun.summary["ppl_before"] == plain.summary["ppl_before"]  # of the source as it is
    assert begun.rows[0]["heldout_ppl"] != begun.summary["ppl_before"]
    written = [Checkpoint(tmp_path / name) for name in ("begun", "eora")]
    factors = [one.adapter.load(one.adapter.paths) for one in written]
    for path, expected in factors[1].items():
        found = factors[0][path].product()
        assert (found - expected.product()).norm() < 1e-3 * expected.product().norm(), path
    assert eora.report.rows[0]["rank"] == 4


@pytest.mark.parametrize("kind", ["packed", "dense", "merged"])
def test_it_goes_on_from_an_adapter_whose_ranks_differ(quantized, kind, tmp_path):
    source, beside, given = quantized("llama"), {"size": "+6KB", "weighted": False}, {}
    if kind != "packed":
        model = build("llama")
        model.save_pretrained(tmp_path / "original")
        source = save(model, STRUCTURES["both kinds"], tmp_path / "source")
        beside = {"size": "+12KB", "merge": False}
        given = {"original": str(tmp_path / "original")}
    run(source, tmp_path / "eora", method="eora", **beside, **given)
    begun = Checkpoint(tmp_path / "eora")
    assert len(set(begun.adapter.ranks.values())) > 1
    given |= {"merge": False} if kind == "dense" else {}
    given |= {"rank": None, "start": "auto"}
    report = trained(begun, tmp_path / "out", rate=3e-3, **given).report
    written, summary = Checkpoint(tmp_path / "out"), report.summary
    first = report.rows[0]["heldout_ppl"]  # with the adapter, and so is the source's
    assert first == pytest.approx(summary["ppl_before"], rel=1e-3)
    if kind == "merged":
        assert written.adapter is None and not same(stored(written), stored(begun))
        assert summary["bytes_added"] == -begun.adapter.nbytes
        return
    assert written.adapter.ranks == begun.adapter.ranks and summary["bytes_added"] == 0
    assert same(stored(written), stored(begun))
    assert report.rows[-1]["heldout_loss"] != report.rows[0]["heldout_loss"]  # all moved
    before, after = (one.adapter.load(one.adapter.paths) for one in (begun, written))
    kept = [torch.equal(before[path].up, after[path].up) for path in before]
    assert all(kept) if summary["best_step"] == 0 else not any(kept)


def test_the_rate_falls_with_the_rank(quantized, tmp_path):
    rates = {}
    for name, given in {
        "2": {"rank": 2},
        "8": {"rank": 8},
        "own": {"rank": 8, "rate": 1e-2},
    }.items():
        trained(quantized("llama"), tmp_path / name, steps=4, **{"rate": None} | given)
        with (tmp_path / name / "training.csv").open() as file:
            rates[name] = max(float(row["rate"] or 0) for row in csv.DictReader(file))
    assert rates["2"] == pytest.approx(2 * rates["8"])
    assert rates["8"] == pytest.approx(2**0.5 * 1e-3)
    assert rates["own"] == pytest.approx(1e-2)


def test_ranks_that_differ_count_by_what_they_take():
    shapes = [(2, 6), (4, 2), (8, 10), (2, 8)]  # `down` and `up` of ranks 2 and 8
    factors = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    assert mean_rank(factors[:2]) == 2
    assert mean_rank(factors) == (2 * 10 + 8 * 12) / 22


def test_ranks_are_spread_within_a_size(quantized, tmp_path):
    source = quantized("llama")
    report = trained(source, tmp_path / "out", **SPREAD).report
    run(source, tmp_path / "eora", samples=13, method="eora", size="+6KB")
    written, eora = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "eora")
    assert written.adapter.ranks == eora.adapter.ranks
    ranks = written.adapter.ranks.values()
    assert 1 < len(set(ranks)) <= len(ranks) < len(own_linears(open_adapter(source, RUNTIME)))
    told = [report.summary[key] for key in ("linears", "least_rank", "most_rank")]
    assert told == [len(ranks), min(ranks), max(ranks)]
    assert report.summary["bytes_added"] == written.adapter.nbytes <= 6000
    assert same(stored(written), stored(source))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": "+5%"}, "give only one of `rank`, `size`"),
        ({"size": "5%", "rank": None}, "`size` is what to add"),
        ({"size": "+1B", "rank": None}, r"`size`: 1 B is too little to correct any linear"),
        ({"size": "+1B", "rank": None, "start": "gaussian"}, r"too little for corrections of \d"),
        ({"size": "+5%", "rank": None, "pooled": True}, "`--size` does not go with `--pooled`"),
    ],
)
def test_a_size_that_cannot_be_is_refused(quantized, given, said, tmp_path, monkeypatch):
    """Before anything is computed."""
    for late in ("open_teacher", "start_factors"):
        monkeypatch.setattr(f"compresso.stages.compensate_trained.{late}", pytest.fail)
    with pytest.raises(ConfigError, match=said):
        trained(quantized("llama"), tmp_path / "out", **{"start": "auto"} | given)


@pytest.mark.parametrize("structure", ["shared", "both kinds"])
def test_a_size_from_nothing_is_of_one_rank(structure, tmp_path):
    """So it is where blocks share linears, too, of which `eora` is to say nothing."""
    model = build("llama")
    model.save_pretrained(tmp_path / "original")
    source = save(model, STRUCTURES[structure], tmp_path / "source")
    given = {"original": str(tmp_path / "original"), "rank": None, "size": "+60KB"}
    start = "auto" if structure == "shared" else "gaussian"
    trained(source, tmp_path / "out", **given, start=start, merge=False)
    adapter = Checkpoint(tmp_path / "out").adapter
    assert len(set(adapter.ranks.values())) == 1
    one = adapter.nbytes // adapter.ranks[adapter.paths[0]]
    assert 60_000 - one < adapter.nbytes <= 60_000
    with pytest.raises(ConfigError, match="so `size` says nothing") as refused:
        trained(source, tmp_path / "merged", **given)
    assert "--rank" in refused.value.hint


def test_corrections_within_blocks_are_not_made_up_for_again(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "original")
    source = save(model, STRUCTURES["corrected"], tmp_path / "source")
    still = {"steps": 1, "rate": 1e-6, "rank": 64, "original": str(tmp_path / "original")}
    first, as_it_is = (
        trained(source, tmp_path / start, start=start, **still).report.rows[0]
        for start in ("auto", "gaussian")
    )
    assert first["heldout_divergence"] <= 1.001 * as_it_is["heldout_divergence"]
    with pytest.raises(ConfigError, match="have corrections of their own"):
        trained(source, tmp_path / "out", start="eora", **still)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pooled_corrections_end_up_in_the_zeros(quantized, family, tmp_path):
    """Codes and scales stay, no adapter is left, and training gained what is written."""
    source = quantized(family)
    report = trained(source, tmp_path / "out", pooled=True, rate=2e-3).report
    written = Checkpoint(tmp_path / "out")
    assert written.adapter is None
    assert report.summary["bytes_before"] == source.stored_bytes
    assert report.summary["bytes_added"] == written.stored_bytes - source.stored_bytes
    moved = [words for words in report.warnings if "in place of `compressed-tensors`" in words]
    assert len(moved) == (family == "llama") and all("trust_remote_code" in w for w in moved)
    assert bool(report.summary["bytes_added"]) == bool(moved)  # zeros that symmetric codes lacked
    paths = own_linears(open_adapter(source, RUNTIME))
    assert set(written.packing.shapes) == set(paths)
    for path in paths:
        before, after = (
            one.packing.uniform(path, one.load(one.packing.names(path)))
            for one in (source, written)
        )
        assert torch.equal(before.codes, after.codes)
        before, after = getattr(before, "grid", before), getattr(after, "grid", after)
        assert torch.equal(before.scale, after.scale)
        assert not torch.equal(before.zero, after.zero)
        change = (before.zero - after.zero) * after.scale
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4
    rows = report.rows
    assert rows[-1]["heldout_loss"] < 0.99 * rows[0]["heldout_loss"]
    # Merged is as unmerged: the best state was measured before, this after.
    best = next(row for row in rows if row["step"] == report.summary["best_step"])
    assert report.summary["ppl_after"] == pytest.approx(best["heldout_ppl"], rel=1e-4)


def test_what_gained_nothing_is_said(quantized, tmp_path):
    source = quantized("llama")
    bad = {"steps": 1, "rate": 3.0, "warmup": 0.0, "evaluate_every": 1}
    report = trained(source, tmp_path / "out", **bad).report
    assert report.summary["best_step"] == 0
    assert report.summary["ppl_after"] == report.summary["ppl_before"]
    assert report.warnings == [
        "training never lowered the held-out loss: corrections are as they began"
    ]


def test_what_is_worse_than_its_source_is_said():
    history = History(best_step=3)
    assert no_gain(history, before=10.5, after=10.5) == []
    assert no_gain(history, before=10.5, after=10.625) == [
        "on held-out text the result is worse than its source: perplexity 10.62, and 10.5 before"
    ]


def test_the_teacher_s_place_changes_nothing_but_rounding(quantized, tmp_path):
    source = quantized("llama")
    places = ("disk", "resident")
    found = [trained(source, tmp_path / place, teacher=place).report for place in places]
    for one, other in zip(*(report.rows for report in found), strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-2), name


@pytest.mark.parametrize("start", [{}, SPREAD])
def test_a_run_that_was_stopped_goes_on_from_its_last_state(
    quantized, start, tmp_path, monkeypatch
):
    source = quantized("llama")
    trained(source, tmp_path / "whole", **start)
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    steps = []
    step = loop._Training._step

    def stopped(self, number):
        steps.append(number)
        if steps == list(range(14)):
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(loop._Training, "_step", stopped)
    with pytest.raises(Interrupted):
        trained(source, tmp_path / "out", **start)
    trained(source, tmp_path / "out", **start)
    assert steps == [*range(14), *range(13, 20)]
    found, expected = (Checkpoint(tmp_path / name).adapter for name in ("out", "whole"))
    assert found.key == expected.key


@pytest.mark.parametrize("where", ["choose_ranks", "Work.correct"])
def test_a_run_that_was_stopped_before_training_ends_the_same(
    quantized, where, tmp_path, monkeypatch
):
    source = quantized("llama")
    trained(source, tmp_path / "whole", **SPREAD)
    with monkeypatch.context() as patch:
        stop = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(f"compresso.stages.compensate_run.{where}", stop)
        with pytest.raises(Interrupted):
            trained(source, tmp_path / "out", **SPREAD)
    trained(source, tmp_path / "out", **SPREAD)
    found, expected = (Checkpoint(tmp_path / name).adapter for name in ("out", "whole"))
    assert found.key == expected.key


def test_a_loss_that_is_no_number_ends_with_the_best_state(quantized, tmp_path):
    source = quantized("llama")
    wild = {"rate": 1e30, "steps": 20, "evaluate_every": 1, "schedule": "constant"}
    with pytest.raises(NumericalError, match="the loss is not finite"):
        trained(source, tmp_path / "out", **wild)
    assert not (tmp_path / "out").exists()


def test_sequences_without_a_next_token_are_refused(quantized, tmp_path, monkeypatch):
    """Before anything is computed."""
    monkeypatch.setattr("compresso.stages.compensate_trained.start_factors", pytest.fail)
    with pytest.raises(CheckpointError, match="sequences of 1 token have no next one") as short:
        trained(quantized("llama"), tmp_path / "out", start="eora", length=1)
    assert "--seqlen" in short.value.hint


def test_too_little_memory_is_refused(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "free_memory", lambda: 10**5)
    with pytest.raises(ResourceError, match="are free") as refused:
        trained(quantized("llama"), tmp_path / "out")
    assert refused.value.hint == "pass `--batch-size 1`, or a smaller `--seqlen`"


def test_what_cannot_be_is_refused(quantized, tmp_path):
    source = quantized("llama")
    with pytest.raises(ConfigError, match="`hidden` or `divergence` must count something"):
        trained(source, tmp_path / "out", hidden=0.0, divergence=0.0, next_token=1.0)
    with pytest.raises(CheckpointError, match=r"gives 2 sequences to learn from, beside 1") as few:
        trained(source, tmp_path / "out", samples=3)
    assert "--nsamples" in few.value.hint
    with pytest.raises(ConfigError, match="cannot be added to the packed weights"):
        trained(source, tmp_path / "out", merge=True)
    with pytest.raises(ConfigError, match="`--start eora` does not go with `--pooled`"):
        trained(source, tmp_path / "out", start="eora", pooled=True)
    with pytest.raises(ConfigError, match="`--no-merge` does not go with `--pooled`"):
        trained(source, tmp_path / "out", merge=False, pooled=True)
    half = make_runtime(RuntimeSettings(dtype="float16", device="cpu"))
    with pytest.raises(ConfigError, match="gradients do not fit float16"):
        trained(source, tmp_path / "out", runtime=half)
    original = {"original": str(source.path.parent / "original")}
    dense = save(build("llama"), STRUCTURES["shared"], tmp_path / "dense")
    with pytest.raises(ConfigError, match="has no zeros that could take a correction"):
        trained(dense, tmp_path / "pooled", pooled=True, **original)
    with pytest.raises(ConfigError, match="share linears"):
        trained(dense, tmp_path / "begun", start="eora", **original)
    with pytest.raises(ConfigError, match="has no adapter to begin with"):
        trained(source, tmp_path / "out", start="adapter")
    trained(source, tmp_path / "first", steps=1)
    for start in ("gaussian", "eora"):
        with pytest.raises(ConfigError, match="has an adapter, which would be lost"):
            trained(Checkpoint(tmp_path / "first"), tmp_path / "out", start=start)
    with pytest.raises(ConfigError, match="do not fit into zero points"):
        trained(Checkpoint(tmp_path / "first"), tmp_path / "out", start="auto", pooled=True)
    for amount in ({"rank": 4}, {"rank": None, "size": "+5%"}):
        with pytest.raises(ConfigError, match="has its ranks, and keeps them"):
            trained(Checkpoint(tmp_path / "first"), tmp_path / "out", start="auto", **amount)
    assert not (tmp_path / "out").exists()
