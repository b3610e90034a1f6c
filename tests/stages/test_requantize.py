"""Compensating by `lq-lora` and `loftq`: new codes of the stored form, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from compensating import lost, prepare, quantized, rows, run, saved, weights
from stopping import stopped_after

from compresso.calibration.fisher import measure_fisher
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, NumericalError
from compresso.kernels import grid
from compresso.kernels.decomposition import decompose
from compresso.provenance import read_record

BASES = {
    "rtn": {"bits": 2},
    "gptq": {"bits": 3},
    "rtn asymmetric": {"bits": 2, "symmetric": False},
    "rtn mixed": {"target_bits": 5.0, "allocation": "zd"},
    "rtn mixed asymmetric": {"target_bits": 5.2, "allocation": "zd", "symmetric": False},
    "rtn scales": {"bits": 2, "scale_bits": 8},
    "rtn rows": {"bits": 3, "group_size": -1},
    "hqq": {"bits": 2},
    "hqq scales": {"bits": 2, "scale_bits": 8},
    "nf4": {"group_size": 64},
    "nf4 double": {"group_size": 64, "scale_bits": 8},
    "rtn rotated": {"bits": 2, "rotate": True},
}
VECTORS = {
    "higgs": {"bits": 2, "dimension": 1},
    "higgs scales": {"bits": 3, "dimension": 1, "block": 16, "scale_bits": 8},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("requantize"))


@pytest.fixture(scope="module")
def model(home):
    return saved(home, "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)


def based(home, model, target, name):
    if name in VECTORS:
        return run(home, model, target, "quantize", name, **VECTORS[name]).path
    return quantized(home, model, target, name, **BASES[name])


@pytest.mark.parametrize("name", [*BASES, *VECTORS])
def test_new_codes_are_stored_as_the_old_ones_were(home, model, tmp_path, name):
    """That peft loads what is in memory is proved before anything is published."""
    source = based(home, model, tmp_path / "base", name)
    base = Checkpoint(source)
    found = run(home, source, tmp_path / "out", "compensate", "lq-lora", rank=6, fisher=False)
    assert found.config == base.config and found.names() == base.names()
    for tensor in base.names():
        if "quant_state" in tensor:  # text that holds a number
            continue
        assert found.info(tensor).shape == base.info(tensor).shape
        assert found.info(tensor).dtype == base.info(tensor).dtype
    assert found.adapter is not None and set(found.adapter.ranks.values()) == {6}
    report = rows(found)
    assert len(report) == 14
    for row in report.values():
        assert row["weight_error"] < 0.98 * row["weight_error_before"]
    added = sum(row["bytes"] for row in report.values())
    assert found.stored_bytes == pytest.approx(base.stored_bytes + added, abs=100)


@pytest.mark.parametrize(("method", "first"), [("lq-lora", "factors"), ("loftq", "codes")])
def test_they_are_those_of_the_kernel(home, model, tmp_path, method, first):
    source = quantized(home, model, tmp_path / "base", bits=2)
    options = {"fisher": False} if method == "lq-lora" else {}
    found = run(home, source, tmp_path / "out", "compensate", method, rank=5, turns=3, **options)
    name = "model.layers.1.mlp.down_proj"
    whole = weights(Checkpoint(model))[f"{name}.weight"].float()

    def rtn(matrix):
        return grid.quantize(
            matrix,
            bits=2,
            group_size=32,
            symmetric=True,
            grid="mse",
            scale_dtype=torch.bfloat16,
        )

    expected = decompose(whole, rtn, rank=5, turns=3, first=first, dtype=torch.bfloat16)
    assert torch.equal(weights(found)[f"{name}.weight"], expected.decode())
    assert rows(found)[name]["turns"] == len(expected.errors)


def test_gradients_decide_what_matters(home, model, tmp_path):
    """They are the original's."""
    source = quantized(home, model, tmp_path / "base", bits=2)
    plain, weighted = (
        run(home, source, tmp_path / str(fisher), "compensate", "lq-lora", rank=5, fisher=fisher)
        for fisher in (False, True)
    )
    assert all(row["fisher_error"] < row["weight_error"] for row in rows(weighted).values())
    errors = [sum(row["weight_error"] for row in rows(one).values()) for one in (plain, weighted)]
    assert errors[0] < errors[1]
    assert "fisher_error" not in next(iter(rows(plain).values()))


def test_less_is_lost_than_by_the_codes_alone(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2)
    for method in ("lq-lora", "loftq"):
        found = run(home, source, tmp_path / method, "compensate", method, rank=8)
        assert lost(found.path, model) < 0.8 * lost(source, model)


def test_pruned_blocks_have_the_gradients_of_their_own(home, model, tmp_path, monkeypatch):
    pruned = run(home, model, tmp_path / "pruned", "prune", "manual", drop=[0]).path
    source = quantized(home, pruned, tmp_path / "base", bits=2)
    asked = []

    def recorded(adapter, original, batches, **options):
        asked.append(original.path)
        return measure_fisher(adapter, original, batches, **options)

    monkeypatch.setattr("compresso.stages.kept_fisher.measure_fisher", recorded)
    found = run(home, source, tmp_path / "out", "compensate", "lq-lora", rank=64)
    assert asked == [model]
    own, theirs = weights(found), weights(Checkpoint(model))
    assert len(rows(found)) == 7
    for path in rows(found):
        expected = theirs[f"{path.replace('.0.', '.1.')}.weight"].float()
        assert (own[f"{path}.weight"] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families(home, tmp_path, family):
    path = saved(home, family, torch.float32)
    source = quantized(home, path, tmp_path / "base", "hqq", bits=2)
    found = run(home, source, tmp_path / "out", "compensate", "lq-lora", rank=4)
    for row in rows(found).values():
        assert row["fisher_error"] < row["weight_error_before"]


def test_what_was_left_dense_stays(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2, ignore=["down_proj"])
    found = run(home, source, tmp_path / "out", "compensate", "loftq", rank=4)
    assert not any("down_proj" in path for path in found.adapter.paths)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found.load([name])[name], Checkpoint(model).load([name])[name])


@pytest.mark.parametrize("name", ["rtn", "hqq", "nf4"])
def test_a_stopped_run_ends_in_the_same_bytes(home, model, tmp_path, name, monkeypatch):
    source = based(home, model, tmp_path / "base", name)
    whole = run(home, source, tmp_path / "whole", "compensate", "lq-lora", rank=4)

    def again():
        return run(home, source, tmp_path / "out", "compensate", "lq-lora", rank=4)

    stopped_after(0, monkeypatch, again)
    resumed = again()
    for part in [*whole.path.glob("*.safetensors"), *whole.path.glob("adapter/*.safetensors")]:
        assert part.read_bytes() == (resumed.path / part.relative_to(whole.path)).read_bytes()
    logs = [read_record(one.path)["fingerprint"] for one in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("stage", ["compensate", "quantize"])
def test_gradients_are_measured_once_over_stops(home, model, tmp_path, stage, monkeypatch):
    source = model
    if stage == "compensate":
        source = quantized(home, model, tmp_path / "base", bits=2)
    measured = []

    def recorded(*given, **options):
        measured.append(given)
        return measure_fisher(*given, **options)

    monkeypatch.setattr("compresso.stages.kept_fisher.measure_fisher", recorded)

    def again(name="out"):
        return run(home, source, tmp_path / name, stage, "lq-lora", rank=4)

    whole = again("whole")
    stopped_after(0, monkeypatch, again)
    resumed = again()
    assert len(measured) == 2  # for `whole`, and for both tries of the other
    assert not (resumed.path / "work").exists()
    for part in [*whole.path.glob("*.safetensors"), *whole.path.glob("adapter/*.safetensors")]:
        assert part.read_bytes() == (resumed.path / part.relative_to(whole.path)).read_bytes()


def test_a_weight_that_cannot_be_decomposed_is_named(home, model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NumericalError("a matrix to decompose is not finite")

    source = quantized(home, model, tmp_path / "base", bits=2)
    monkeypatch.setattr("compresso.stages.requantize.decompose", refuse)
    with pytest.raises(NumericalError, match=r"`model\.layers\.0\.self_attn\.q_proj`: a matrix"):
        run(home, source, tmp_path / "out", "compensate", "loftq")


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("dense", "loftq", "has no codes to choose anew"),
        ("folded", "lq-lora", "share weights, which `lq-lora` cannot choose anew"),
        ("int8", "loftq", "is stored in 8 bits by bitsandbytes"),
    ],
)
def test_what_is_refused(home, model, tmp_path, kind, method, message):
    source = model
    if kind == "int8":
        source = run(home, model, tmp_path / "base", "quantize", "int8").path
    if kind == "folded":
        folded = run(home, model, tmp_path / "folded", "fold", "foldgpt", blocks=1).path
        source = quantized(home, folded, tmp_path / "base", bits=2)
    if kind == "dense":
        source = quantized(home, model, tmp_path / "base", bits=2, pack=False)
    with pytest.raises(ConfigError, match=message):
        run(home, source, tmp_path / "out", "compensate", method)
    assert not (tmp_path / "out").exists()
