"""Quantizing by `lq-lora`: packed codes with an adapter, and bits by what is left."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from compensating import lost, prepare, quantized, rows, run, saved, weights
from stopping import stopped_after

from compresso.calibration.fisher import measure_fisher
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.decomposition import Fisher, quantize
from compresso.models.adapter import ModelAdapter
from compresso.provenance import read_record
from compresso.quantize_settings import DecompositionSettings
from compresso.runtime import Runtime
from compresso.stages.bit_job import BitJob
from compresso.stages.error_choice import choose_by_error
from compresso.stages.ladder import make_ladder
from compresso.stages.quantize_plan import make_plan

WAYS = {
    "plain": {"bits": 2, "fisher": False},
    "by fisher": {"bits": 2},
    "asymmetric": {"bits": 3, "symmetric": False},
    "scales": {"bits": 2, "scale_bits": 8},
    "mixed": {"target_bits": 6.0},
    "mixed asymmetric": {"target_bits": 6.2, "symmetric": False, "fisher": False},
    "rotated": {"bits": 2, "rotate": True},
    "head": {"bits": 4, "lm_head": True},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("decomposed"))


@pytest.fixture(scope="module")
def model(home):
    return saved(home, "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.mark.parametrize("name", WAYS)
def test_codes_are_packed_and_an_adapter_lies_beside_them(home, model, tmp_path, name):
    """That peft loads what is in memory is proved before anything is published."""
    options = {"rank": 4, "group_size": 32, **WAYS[name]}
    found = run(home, model, tmp_path / "out", "quantize", "lq-lora", **options)
    assert found.packed and found.adapter is not None
    linears = 14 + (name == "head")
    assert len(found.adapter.paths) == linears == len(rows(found))
    assert set(found.adapter.ranks.values()) == {4}
    held = {path: 0 for path in rows(found)}
    for tensor in found.names():
        for path in held:
            if tensor.startswith(f"{path}.weight"):
                held[path] += found.info(tensor).nbytes
    for path, row in rows(found).items():
        stored = held[path] + found.adapter.sizes[path]
        assert row["stored_bits"] == pytest.approx(8 * stored / row["parameters"])
        assert ("fisher_error" in row) == (options.get("fisher", True) and "head" not in path)
    if options.get("target_bits"):
        count = sum(row["parameters"] for row in rows(found).values())
        stored = sum(held.values()) + found.adapter.nbytes
        assert options["target_bits"] - 0.5 < 8 * stored / count <= options["target_bits"] + 0.006
        assert len({row["bits"] for row in rows(found).values()}) > 1


def test_it_is_the_kernel_on_every_linear_alone(home, model, tmp_path):
    options = {"bits": 2, "group_size": 32, "symmetric": True, "grid": "mse"}
    found = run(
        home, model, tmp_path / "out", "quantize", "lq-lora", rank=4, fisher=False, **options
    )
    source = Checkpoint(model)
    for path in rows(found):
        weight = source.load_weights([f"{path}.weight"])[f"{path}.weight"].float()
        expected = quantize(weight, scale_dtype=torch.bfloat16, rank=4, turns=20, **options)
        assert torch.equal(weights(found)[f"{path}.weight"], expected.decode())


def test_less_is_lost_than_without_a_correction(home, model, tmp_path):
    plain = quantized(home, model, tmp_path / "rtn", "rtn", bits=2)
    errors = [lost(plain, model)]
    for fisher in (False, True):
        target = tmp_path / f"fisher-{fisher}"
        options = {"bits": 2, "rank": 6, "fisher": fisher}
        errors.append(lost(quantized(home, model, target, "lq-lora", **options), model))
    assert max(errors[1:]) < 0.9 * errors[0]


def test_dense_weights_hold_the_correction(home, model, tmp_path):
    options = {"bits": 2, "rank": 4, "fisher": False}
    dense = Checkpoint(quantized(home, model, tmp_path / "a", "lq-lora", pack=False, **options))
    packed = Checkpoint(quantized(home, model, tmp_path / "b", "lq-lora", **options))
    assert dense.adapter is None and not dense.packed
    found, expected = weights(dense), weights(packed)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name


def test_it_is_what_compensating_the_rounded_model_comes_to(home, model, tmp_path):
    base = quantized(home, model, tmp_path / "base", "rtn", bits=2)
    found = run(home, base, tmp_path / "out", "compensate", "lq-lora", rank=4)
    direct = Checkpoint(quantized(home, model, tmp_path / "direct", "lq-lora", bits=2, rank=4))
    assert found.config == direct.config
    expected = direct.load(direct.names())
    assert all(torch.equal(expected[n], tensor) for n, tensor in found.load(found.names()).items())
    assert found.adapter.key == direct.adapter.key


@pytest.mark.parametrize("name", ["by fisher", "mixed asymmetric"])
def test_a_stopped_run_ends_in_the_same_bytes(home, model, tmp_path, name, monkeypatch):
    options = {"rank": 4, "group_size": 32, **WAYS[name]}
    whole = run(home, model, tmp_path / "whole", "quantize", "lq-lora", **options)

    def again():
        return run(home, model, tmp_path / "out", "quantize", "lq-lora", **options)

    stopped_after(0, monkeypatch, again)
    resumed = again()
    for part in [*whole.path.glob("*.safetensors"), *whole.path.glob("adapter/*.safetensors")]:
        assert part.read_bytes() == (resumed.path / part.relative_to(whole.path)).read_bytes()
    prints = [read_record(one.path)["fingerprint"] for one in (whole, resumed)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_bits_leave_less(home, tmp_path, weighted):
    """All choices of a model of one block."""
    path = saved(home, "llama", torch.float32, num_hidden_layers=1)
    source = Checkpoint(path)
    runtime = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    settings = DecompositionSettings(target_bits=8.0, group_size=32, rank=3, turns=3)
    tokens = [torch.arange(2, 66).view(2, 32)]
    fisher: dict[str, Fisher] = {}
    if weighted:
        fisher = measure_fisher(adapter, source, tokens, runtime=runtime, spill_dir=tmp_path)
    with CheckpointWriter(tmp_path / "out", key="test", parts=2) as target:
        job = BitJob(
            settings,
            adapter,
            source,
            None,
            make_plan(adapter, settings, packed_as="compressed-tensors").groups,
            make_ladder("lq-lora", settings, source.dtype),
            target,
            runtime,
        )
        found = choose_by_error(job, fisher)
        again = choose_by_error(replace(job, settings=settings), {})  # remembered
    assert again.bits == found.bits
    table = []
    for place in job.places:
        table.append([])
        for bits in (2, 3, 4, 8):
            loss = 0.0
            for name in job.weights(place):
                weight = source.load_weights([name])[name]
                importance = fisher.get(name.removesuffix(".weight"))
                options = {"group_size": 32, "symmetric": True, "grid": "mse", "rank": 3}
                rest = (
                    weight
                    - quantize(
                        weight,
                        bits=bits,
                        scale_dtype=torch.float32,
                        turns=3,
                        importance=importance,
                        **options,
                    ).decode()
                )
                loss += rest.square().sum().item() if not weighted else importance.loss(rest)
            table[-1].append(loss)
    budget = 8.005 * job.count / 8
    least = min(
        sum(own[level] for own, level in zip(table, levels, strict=True))
        for levels in product(range(4), repeat=4)
        if sum(own[level] for own, level in zip(job.sizes, levels, strict=True)) <= budget
    )
    assert found.summary["predicted_loss"] == pytest.approx(least, rel=1e-5)
    chosen = [bits for own in found.bits for bits in own]
    assert [row["bits"] for row in found.rows] == chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 2, "target_bits": 5.0}, "give only one of `bits`, `target_bits`, `size`"),
        ({"target_bits": 5.0, "size": "1MB"}, "give only one of `target_bits`, `size`"),
        ({"target_bits": 2.5}, "`target_bits`: 2.5 bits per weight cannot be reached"),
        ({"bits": 2, "allocation": "dp"}, "method `lq-lora` has no `allocation`"),
        ({"bits": 2, "rank": 0}, "`rank`: input should be greater than or equal to 1"),
    ],
)
def test_what_is_refused(home, model, tmp_path, values, message):
    with pytest.raises(ConfigError) as raised:
        run(home, model, tmp_path / "out", "quantize", "lq-lora", group_size=32, **values)
    assert message in str(raised.value)
