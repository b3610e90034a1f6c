"""The fold stage: shared weights are stored once, and the output is the model that shares them."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from folding import (
    CALIBRATION,
    FEW,
    LINEARS,
    SHAPES,
    copy_linears,
    load,
    run,
    save,
    scored_from_now,
    sharing,
    start,
)
from tiny_models import BLOCKS, build, tokens

from compresso.__main__ import main
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.stages.fold_plan import Sizes


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(
    ("settings", "made_from"),
    [
        ({"slots": 3}, [[0], [3], [5]] * 2),
        ({"slots": 3, "init": "stepwise-start"}, [[0], [2], [4]] * 2),
        ({"loops": 2, "init": "lower"}, [[0], [1], [2]] * 2),
        ({"loops": 3, "init": "average"}, [[0, 2, 4], [1, 3, 5]] * 3),
        ({"slots": 4, "init": "average"}, [[0, 4], [1, 5], [2], [3], [0, 4], [1, 5]]),
        ({"slots": 1}, [[0]] * 6),
    ],
)
def test_a_looped_model_is_the_stock_model_with_these_weights(
    family, settings, made_from, checkpoints, tmp_path
):
    report = run(checkpoints(family), tmp_path / "out", "recursive", **settings)
    slots = report.summary["slots"]
    assert [row["uses"] for row in report.rows] == [block % slots for block in range(BLOCKS)]
    assert report.summary["unique_blocks"] == slots and report.summary["rank"] == 0
    expected = sharing(build(family), family, made_from)
    ids = report.fingerprint.tokens[:, :40]
    logits = expected(ids, use_cache=False).logits
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert "has to be healed" in report.warnings[0]


@torch.no_grad()
@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", FEW)
def test_corrections_of_full_rank_give_the_model_back(
    family, init, weighted, models, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(Sizes, "check_rank", lambda *_, **__: None)  # it saves nothing
    settings = {"slots": 3, "rank": 64, "init": init, "weighted": weighted}
    report = run(checkpoints(family), tmp_path / "out", "recursive", **settings)
    logits = models(family)(report.fingerprint.tokens).logits
    torch.testing.assert_close(report.fingerprint.logits, logits, rtol=1e-4, atol=1e-4)
    assert all(row["captured"] > 1 - 1e-6 for row in report.rows)


def test_blocks_that_are_alike_need_no_correction(tmp_path):
    model = copy_linears(build("llama"), "llama", {3: 0, 4: 1, 5: 2})
    source = save(model, tmp_path / "model")
    report = run(source, tmp_path / "out", "recursive", slots=3, rank=4)
    stored = Checkpoint(tmp_path / "out").load(
        name for name in report.expected if "correction" in name
    )
    assert len(stored) == 2 * 6 * len(SHAPES) and not any(t.any() for t in stored.values())
    assert all(row["captured"] == 1 for row in report.rows)
    torch.testing.assert_close(
        report.fingerprint.logits, model(report.fingerprint.tokens).logits, rtol=1e-4, atol=1e-4
    )


def test_corrections_by_outputs_are_nearer_the_original(checkpoints, models, tmp_path):
    source, model = checkpoints("llama"), models("llama")
    ids = CALIBRATION.batches[0]
    errors = []
    for weighted in (False, True):
        path = tmp_path / str(weighted)
        report = run(source, path, "recursive", slots=3, rank=16, weighted=weighted)
        with torch.no_grad():
            errors.append((load(path)(ids).logits - model(ids).logits).square().mean())
        assert all(0 < row["captured"] < 1 for row in report.rows)
    assert errors[1] < errors[0]


def test_sharing_is_real_on_disk_and_in_memory(checkpoints, tmp_path):
    source = checkpoints("llama")
    report = run(source, tmp_path / "out", "foldgpt", blocks=3, rank=2)
    output, model = Checkpoint(tmp_path / "out"), load(tmp_path / "out")
    uses = [row["uses"] for row in report.rows]
    owners = set(uses)
    assert len(owners) == 3
    corrections = 3 * 2 * sum(rows + columns for rows, columns in SHAPES)
    expected = len(owners) * LINEARS + BLOCKS * 2 * 64 + 2 * 128 * 64 + 64 + corrections
    assert output.parameters == expected == report.summary["parameters_after"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(row["parameters"] for row in report.rows) == expected - 2 * 128 * 64 - 64
    with_linears = {int(n.split(".")[2]) for n in output.names() if n.endswith("up_proj.weight")}
    assert with_linears == owners
    for block, owner in enumerate(uses):
        mine, its = (model.model.layers[b].mlp.up_proj for b in (block, owner))
        assert mine.weight is its.weight
    counts = Counter(id(parameter) for parameter in model.parameters())
    assert set(counts.values()) == {1}
    # What is not shared is the source's to the bit, norms of blocks without linears as well.
    alone = [block for block in range(BLOCKS) if uses.count(uses[block]) == 1]
    for name, stored in output.load(output.names()).items():
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if "correction" in name or ("proj" in name and block not in alone):
            continue
        assert torch.equal(stored, source.load([name])[name]), name


def test_only_dense_whole_blocks_of_one_shape_can_share(checkpoints, tmp_path):
    source = Checkpoint(checkpoints("llama").path)
    source.packed = True
    with pytest.raises(ConfigError, match="are quantized") as raised:
        start(source, tmp_path / "a", "recursive", slots=2)
    assert raised.value.hint == "fold first, then quantize"
    run(checkpoints("llama"), tmp_path / "folded", "recursive", slots=2)
    with pytest.raises(ConfigError, match="or shares some already"):
        start(Checkpoint(tmp_path / "folded"), tmp_path / "b", "recursive", slots=1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("foldgpt", {"blocks": 2, "rank": 2}), ("recursive", {"slots": 2, "rank": 3})],
)
def test_a_killed_run_ends_in_the_same_bytes(method, settings, checkpoints, tmp_path, monkeypatch):
    source = checkpoints("qwen2")
    whole = run(source, tmp_path / "whole", method, **settings)
    commit = CheckpointWriter.commit
    for last in (0, 3):

        def killed(self, part, *rest, last=last):
            commit(self, part, *rest)
            if part == last:
                raise KeyboardInterrupt

        target = tmp_path / str(last)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "commit", killed)
            with pytest.raises(KeyboardInterrupt):
                run(source, target, method, **settings)
        scored = scored_from_now(monkeypatch)
        report = run(source, target, method, **settings)
        assert not scored
        assert report.rows == whole.rows and report.config == whole.config
        assert torch.equal(report.fingerprint.logits, whole.fingerprint.logits)
        for path in (tmp_path / "whole").glob("*.safetensors"):
            assert path.read_bytes() == (target / path.name).read_bytes()


def test_tensors_nobody_uses_are_carried(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoints("llama").path, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    extra = {"model.layers.6.head.weight": torch.arange(4.0)}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    source = Checkpoint(tmp_path / "model")
    report = start(source, tmp_path / "out", "recursive", slots=2)
    assert report.carried == list(extra) and set(extra) <= set(report.expected)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(
    "options", [("--blocks", "2", "--rank", "2"), ("--slots", "2", "--ratio", "0.3")]
)
def test_the_command_writes_what_stock_loading_reads(
    family, options, checkpoints, tmp_path, monkeypatch, capsys
):
    np.save(tmp_path / "tokens.npy", tokens(4, 20).numpy())
    model, output = checkpoints(family).path, tmp_path / "out"
    text = ("--dataset", str(tmp_path / "tokens.npy"), "--nsamples", "4")
    command = ["compresso", "fold", str(model), "-o", str(output), *options, *text]
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float32"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code and capsys.readouterr().out.strip() == str(output)
    record = json.loads((output / "compresso.json").read_text())
    found = load(output)
    summary = record["report"]["summary"]
    assert sum(p.numel() for p in found.parameters()) == summary["parameters_after"]
    assert summary["saved_share"] > 0.1
    fingerprint = Fingerprint.from_json(record["fingerprint"])
    logits, recorded = found(fingerprint.tokens).logits, fingerprint.logits > -torch.inf
    torch.testing.assert_close(logits[recorded], fingerprint.logits[recorded], rtol=1e-4, atol=1e-4)
