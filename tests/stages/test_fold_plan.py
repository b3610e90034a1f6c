"""What the fold methods choose: groups by brute force, ranks to the parameter."""

from __future__ import annotations

import json

import pytest
import torch
from folding import (
    CALIBRATION,
    FEW,
    LINEARS,
    SHAPES,
    copy_linears,
    run,
    save,
    scored_from_now,
    start,
)
from tiny_models import BLOCKS, build

from compresso.calibration.streams import Streams
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.lowrank import correction_parameters
from compresso.models.structure import structure_of
from compresso.recipe import make_step


@pytest.mark.parametrize(
    ("settings", "init", "rank"),
    [({}, "stepwise", 0), ({"rank": 2}, "average", 2), ({"rank": 2, "init": "lower"}, "lower", 2)],
)
def test_the_paper_pairs_averages_with_corrections(settings, init, rank, checkpoints, tmp_path):
    report = start(checkpoints("llama"), tmp_path / "out", "recursive", slots=2, **settings)
    assert report.summary["init"] == init and report.summary["rank"] == rank
    corrected = structure_of(report.config).corrected
    assert corrected == (() if not rank else (2, 3, 4, 5) if init == "lower" else tuple(range(6)))


def test_the_rank_is_the_highest_that_keeps_the_ratio(checkpoints, tmp_path):
    source = checkpoints("llama")
    report = run(source, tmp_path / "out", "recursive", slots=2, ratio=0.3)
    rank, each = report.summary["rank"], correction_parameters(SHAPES, rank=1)
    freed = 4 * LINEARS
    assert (freed - 6 * rank * each) / source.parameters >= 0.3
    assert (freed - 6 * (rank + 1) * each) / source.parameters < 0.3
    output = Checkpoint(tmp_path / "out")
    assert report.summary["parameters_after"] == source.parameters - freed + 6 * rank * each
    assert report.summary["parameters_after"] == output.parameters
    assert report.summary["bytes_after"] == output.stored_bytes
    assert report.summary["bytes_before"] == source.stored_bytes
    assert report.summary["saved_share"] == 1 - output.parameters / source.parameters
    assert report.summary["compute"].startswith("unchanged: all 6 blocks run, 6 of them with")


@pytest.mark.parametrize("family", FEW)
def test_groups_of_blocks_that_are_alike_are_found(family, tmp_path):
    model = copy_linears(build(family), family, {2: 1, 5: 4})
    report = run(save(model, tmp_path / "model"), tmp_path / "out", "foldgpt", blocks=2)
    assert [row["uses"] for row in report.rows] == [0, 1, 1, 3, 4, 4]
    assert [row["group"] for row in report.rows] == [0, 1, 1, 2, 3, 3]
    assert report.summary["groups"] == ["1-2", "4-5"]
    assert abs(report.summary["measured_kl"]) < 1e-6
    logits = model(report.fingerprint.tokens).logits
    torch.testing.assert_close(report.fingerprint.logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_the_first_of_a_group_stores_the_weights_of_any(family, tmp_path):
    model = copy_linears(build(family), family, {4: 3})
    source, settings = save(model, tmp_path / "model"), {"blocks": 2, "keep": [0, 1, 5]}
    report = run(source, tmp_path / "out", "foldgpt", **settings)
    assert [row["uses"] for row in report.rows] == [0, 1, 2, 2, 2, 5]
    logits = copy_linears(model, family, {2: 3})(report.fingerprint.tokens).logits
    torch.testing.assert_close(report.fingerprint.logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_group_uses_the_member_by_which_it_loses_least(checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path / "out", "foldgpt", blocks=1, max_group=2)
    group = [row["block"] for row in report.rows if row["damage"]]
    assert len(group) == 2 and report.rows[group[0]]["damage"] == report.rows[group[1]]["damage"]

    def kl(pairs):
        """Of the whole model in which these blocks have those linears."""
        total, count = 0.0, 0
        model, other = build("llama"), copy_linears(build("llama"), "llama", pairs)
        for batch in CALIBRATION.batches:
            logs, others = (
                m(batch).logits[:, :-1].double().log_softmax(-1) for m in (model, other)
            )
            total += (logs.exp() * (logs - others)).sum().item()
            count += logs.shape[0] * logs.shape[1]
        return total / count

    every = {(b, o): kl({b: o}) for b in range(BLOCKS) for o in (b - 1, b + 1) if 0 <= o < BLOCKS}
    (replaced, member), least = min(every.items(), key=lambda item: item[1])
    assert {replaced, member} == set(group)
    assert report.summary["predicted_kl"] == pytest.approx(least, rel=1e-4)
    assert report.summary["measured_kl"] == pytest.approx(least, rel=1e-4)


def test_protected_blocks_share_nothing(checkpoints, tmp_path):
    settings = {"blocks": 2, "protect": ["first", "last"], "keep": [2], "max_group": 3}
    with pytest.raises(ConfigError, match="cannot free 2 of 6 blocks") as raised:
        start(checkpoints("llama"), tmp_path / "out", "foldgpt", **settings)
    assert "they can free 1 at most" in raised.value.hint
    report = start(checkpoints("llama"), tmp_path / "b", "foldgpt", **{**settings, "blocks": 1})
    assert [row["uses"] for row in report.rows] == [0, 1, 2, 3, 3, 5]


def test_the_ratio_counts_what_corrections_take(checkpoints, tmp_path):
    source = checkpoints("llama")
    for rank in (0, 4):
        each = LINEARS - correction_parameters(SHAPES, rank=rank)
        report = start(source, tmp_path / str(rank), "foldgpt", ratio=0.4, rank=rank)
        count = min(range(6), key=lambda n: abs(n * each / source.parameters - 0.4))
        assert BLOCKS - report.summary["unique_blocks"] == count
        assert report.summary["saved_share"] == pytest.approx(count * each / source.parameters)


@pytest.mark.parametrize(
    ("method", "settings", "message", "hint"),
    [
        ("recursive", {"slots": 6}, "6 sets of weights cannot be shared by 6", "use 1 to 5"),
        ("recursive", {"slots": 5, "ratio": 0.2}, "0.2 leaves no room", "possible ratio is 0.1"),
        ("recursive", {"slots": 3, "rank": 40}, "rank 40 take all", "far below 17"),
        ("foldgpt", {"blocks": 5}, "cannot free 5 of 6 blocks", "can free 4 at most"),
        ("foldgpt", {"blocks": 1, "rank": 64}, "rank 64 take all", "far below 34"),
        ("foldgpt", {"ratio": 0.01}, "0.01 is less than half", "smallest possible ratio is 0.1"),
        ("foldgpt", {"blocks": 1, "keep": [9]}, "there is no block `9`", "0 to 5"),
    ],
)
def test_amounts_that_cannot_be(
    method, settings, message, hint, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(Streams, "__init__", None)  # refused before anything is measured
    with pytest.raises(ConfigError, match=message) as raised:
        start(checkpoints("llama"), tmp_path / "out", method, **settings)
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("recursive", {}, "give one of `slots`, `loops`"),
        ("recursive", {"slots": 2, "loops": 2}, "give only one of `slots`, `loops`"),
        ("recursive", {"slots": 2, "ratio": 0.2, "rank": 3}, "the ratio decides the rank"),
        ("foldgpt", {}, "give one of `ratio`, `blocks`"),
        ("foldgpt", {"blocks": 2, "protect": ["middle"]}, "`middle` is neither"),
    ],
)
def test_settings_that_contradict_each_other(method, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_step("fold", {"method": method, **settings}, where="test")


def test_a_killed_search_goes_on_where_it_was(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("compresso.stages.fold_plan.AT_ONCE", 4)
    source, settings = checkpoints("llama"), {"blocks": 2, "max_group": 2}
    whole = run(source, tmp_path / "whole", "foldgpt", **settings)
    remember = CheckpointWriter.remember

    def killed(self, state):
        remember(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "remember", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(source, tmp_path / "out", "foldgpt", **settings)
    state = json.loads((tmp_path / "out.partial" / "state.json").read_text())
    assert len(state["damage"]) == 8  # of ten, four from each run
    scored = scored_from_now(monkeypatch)
    report = run(source, tmp_path / "out", "foldgpt", **settings)
    assert len(scored) == 3  # the last two, and the choice
    assert report.rows == whole.rows and report.summary == whole.summary
