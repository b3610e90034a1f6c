"""The evaluate stage against direct computation with plain transformers."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

import compresso
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, GateError
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

REFERENCE = Path(compresso.__file__).parent / "reference"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """An original with the bundled tokenizer, a pruned and a quantized descendant, and tokens."""
    root = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "original")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, root / "original")
    tokens = torch.randint(0, 4096, (6, 24), generator=torch.Generator().manual_seed(1))
    np.save(root / "tokens.npy", tokens.numpy())
    run(root / "original", root / "pruned", "prune", method="manual", drop=[1])
    run(root / "pruned", root / "quantized", "quantize", method="rtn", bits=3, group_size=16)
    return root


def run(source, target, stage, gates=None, **values):
    if gates:
        values["assert"] = gates
    step = make_step(stage, values, where="test")
    runtime = make_runtime(RuntimeSettings(device="cpu", dtype="float32"))
    return run_step(step, Checkpoint(source), CalibrationSettings(), target, runtime)


def evaluate(chain, source, tmp_path, **values):
    values = {"dataset": str(chain / "tokens.npy"), "speed": False} | values
    return run(chain / source, tmp_path / "eval", "eval", **values).report


def logits(path, tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def test_numbers_equal_a_direct_computation(chain, tmp_path):
    report = evaluate(chain, "quantized", tmp_path, each=True)
    assert [row["checkpoint"] for row in report.rows] == [
        "original",
        "prune-manual",
        "quantize-rtn",
    ]
    tokens = torch.from_numpy(np.load(chain / "tokens.npy"))
    want = logits(chain / "original", tokens)[:, :-1].double().log_softmax(-1)
    for row, name in zip(report.rows, ("original", "pruned", "quantized"), strict=True):
        got = logits(chain / name, tokens)[:, :-1].double().log_softmax(-1)
        loss = F.nll_loss(got.flatten(0, 1), tokens[:, 1:].flatten())
        assert row["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
        if name == "original":
            assert "kl" not in row
            continue
        divergence = F.kl_div(got, want, reduction="none", log_target=True).sum(-1)
        assert row["kl"] == pytest.approx(divergence.mean().item(), rel=1e-4, abs=1e-7)
        windows = divergence.mean(1)
        assert row["kl_se"] == pytest.approx((windows.std() / math.sqrt(6)).item(), rel=1e-3)
        agree = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
        assert row["top1_agreement"] == pytest.approx(agree)
        error = math.sqrt(agree * (1 - agree) / tokens[:, 1:].numel())
        assert row["top1_agreement_se"] == pytest.approx(error)


def test_size_counts_everything_stored(chain, tmp_path):
    row = evaluate(chain, "quantized", tmp_path).rows[-1]
    source = Checkpoint(chain / "quantized")
    stored = sum(source.info(name).nbytes for name in source.names())
    dense = AutoModelForCausalLM.from_pretrained(chain / "pruned")
    assert row["size"] == stored
    assert row["parameters"] == sum(p.numel() for p in dense.parameters())
    assert row["bits_per_weight"] == pytest.approx(stored * 8 / row["parameters"])


def test_summary_has_ratios_and_gates_judge_them(chain, tmp_path):
    report = evaluate(chain, "quantized", tmp_path)
    first, last = report.rows
    assert report.summary["ppl_ratio"] == pytest.approx(last["ppl"] / first["ppl"])
    assert report.summary["size_ratio"] == pytest.approx(last["size"] / first["size"])
    with pytest.raises(GateError, match=r"size_ratio"):
        evaluate(chain, "quantized", tmp_path / "b", gates={"size_ratio": "< 0.01"})
    evaluate(chain, "quantized", tmp_path / "c", gates={"size_ratio": "< 1", "kl": ">= 0"})


def test_original_alone_and_against(chain, tmp_path):
    alone = evaluate(chain, "original", tmp_path / "a")
    assert [row["checkpoint"] for row in alone.rows] == ["original"]
    against = evaluate(chain, "quantized", tmp_path / "b", against=str(chain / "pruned"))
    assert len(against.rows) == 2
    assert against.rows[0]["path"] == str(chain / "pruned")


def test_original_that_is_gone_or_changed(chain, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(chain / "original", copy)
    run(copy, tmp_path / "pruned", "prune", method="manual", drop=[0])
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config + "\n")
    values = {"dataset": str(chain / "tokens.npy"), "speed": False}
    with pytest.raises(CheckpointError, match="has changed since"):
        run(tmp_path / "pruned", tmp_path / "eval", "eval", **values)
    shutil.rmtree(copy)
    report = run(tmp_path / "pruned", tmp_path / "eval", "eval", **values).report
    assert "is gone" in report.warnings[0] and "kl" not in report.rows[-1]


def test_speed_and_sample(chain, tmp_path):
    report = evaluate(chain, "pruned", tmp_path, speed=True, prompt="import os")
    for row in report.rows:
        assert row["prefill"] > 0 and row["decode"] > 0 and row["peak_memory"] > 10**8
        assert isinstance(row["continuation"], str) and row["continuation"]
    assert report.summary["prompt"] == "import os"


def test_long_vocabularies_are_scored_in_pieces(chain, tmp_path, monkeypatch):
    whole = evaluate(chain, "pruned", tmp_path / "a").rows[-1]
    monkeypatch.setattr("compresso.stages.evaluate.LOGITS_BYTES", 4096 * 4 * 7)
    pieces = evaluate(chain, "pruned", tmp_path / "b").rows[-1]
    assert pieces["ppl"] == pytest.approx(whole["ppl"], rel=1e-6)
    assert pieces["kl"] == pytest.approx(whole["kl"], rel=1e-4)
