"""Every quantize method through the real command: what it stores, loads, resumes and refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from stopping import stopped_after
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from compresso.checkpoint.reader import Checkpoint
from compresso.config import build
from compresso.errors import ConfigError, NumericalError
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

METHODS = {
    "rtn": {},
    "gptq": {},
    "gptq rotated": {"rotate": True, "group_size": 32},
    "gptq head": {"rotate": True, "lm_head": True},
    "gptq matched": {"match": 0.5},
    "rsq": {"least": 0.1},
    "rsq matched": {"match": 1.0},
    "autoround": {"steps": 4},
    "autoround not matched": {"steps": 4, "match": 0.0},
    "autoround from rtn": {"steps": 4, "start": "rtn", "symmetric": False},
    "higgs": {"bits": 2},
    "higgs p4": {"bits": 2, "dimension": 4, "block": 16},
    "gptq+higgs": {"bits": 3, "dimension": 1},
    "gptq+higgs matched": {"bits": 2, "match": 0.5},
    "hqq": {"bits": 3},
    "nf4": {},
    "nf4 double": {"scale_bits": 8},
    "int8": {},
    "rtn mixed": {"target_bits": 4.0, "symmetric": False},
    "gptq mixed": {"target_bits": 4.0},
    "higgs mixed": {"target_bits": 3.2},
    "gptq+higgs mixed": {"target_bits": 3.2, "dimension": 1},
}
# Scales in 8 bits.
SCALES = {
    "gptq scales": {"bits": 2, "group_size": 16},
    "rsq scales": {"bits": 2, "group_size": 16, "symmetric": False},
    "autoround scales": {"steps": 4, "group_size": 16},
    "higgs scales": {"bits": 2, "block": 16},
    "gptq+higgs scales": {"bits": 2, "block": 16},
    "hqq scales": {"bits": 3, "group_size": 16},
    "rtn scales mixed": {"target_bits": 3.7, "group_size": 16, "symmetric": False},
}
METHODS |= {name: {**values, "scale_bits": 8} for name, values in SCALES.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    llama = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # random logits are nearly flat: spread them
    llama.to(torch.bfloat16).save_pretrained(path)
    tokens = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    np.save(path.parent / "tokens.npy", tokens.numpy())
    return path


def run(source, target, method, **values):
    """The checkpoint that a step makes of a model."""
    step = make_step("quantize", {"method": method.split()[0], **values}, where="test")
    calibration = build(
        CalibrationSettings,
        {"dataset": str(source.parent / "tokens.npy"), "samples": 16, "batch_size": 4},
        where="test",
    )
    runtime = make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
    run_step(step, Checkpoint(source), calibration, target, runtime)
    return Checkpoint(target)


def weights(checkpoint):
    return checkpoint.load_weights(checkpoint.weight_names())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_is_what_transformers_loads(model, tmp_path, name):
    """That the logits are those in memory is proved before anything is published."""
    written = run(model, tmp_path / "out", name, **METHODS[name])
    record = json.loads((written.path / "compresso.json").read_text())
    dense = run(model, tmp_path / "dense", name, **METHODS[name], pack=False)
    assert not dense.packed and written.packed
    assert written.stored_bytes < 0.6 * dense.stored_bytes
    plain = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
    assert plain.config.model_type == "llama"
    expected, found = weights(dense), weights(written)
    assert expected.keys() == found.keys()
    for tensor in expected:
        assert torch.equal(expected[tensor], found[tensor]), tensor
    rows = record["report"]["rows"]
    names = {n.removesuffix(".weight") for n in expected if "_proj" in n}
    assert {row["linear"] for row in rows} - {"lm_head"} == names
    stored = sum(row["stored_bits"] * row["parameters"] for row in rows) / 8
    packed = {row["linear"] for row in rows}
    held = sum(
        written.info(n).nbytes for n in written.names() if n.rpartition(".weight")[0] in packed
    )
    held += sum(written.info(n).nbytes for n in written.names() if n.endswith(".SCB"))
    assert stored == pytest.approx(held)


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_in_the_same_bytes(model, tmp_path, name, monkeypatch):
    whole = run(model, tmp_path / "whole", name, **METHODS[name])

    def again():
        return run(model, tmp_path / "out", name, **METHODS[name])

    stopped_after(0, monkeypatch, again)
    resumed = again()
    for part in whole.path.glob("model-*.safetensors"):
        assert part.read_bytes() == (resumed.path / part.name).read_bytes()
    assert whole.config == resumed.config


@pytest.mark.parametrize("name", ["higgs", "hqq", "nf4", "int8", "rtn scales"])
def test_gpt2_is_packed_too(model, tmp_path, name):
    torch.manual_seed(0)
    path = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    shutil.copy(model.parent / "tokens.npy", tmp_path)
    values = {"scale_bits": 8, "group_size": 16} if name == "rtn scales" else {}
    found = weights(run(path, tmp_path / "out", name, **values))
    expected = weights(run(path, tmp_path / "dense", name, **values, pack=False))
    for tensor in expected:
        assert torch.equal(expected[tensor], found[tensor]), tensor


def squares(written, source):
    """What the quantized model's logits lose on the calibration tokens, squared."""
    tokens = torch.from_numpy(np.load(source.parent / "tokens.npy"))
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (written.path, source)
        )
    return (found - expected).square().sum().item()


def test_matched_weights_lose_less(model, tmp_path):
    """Only what no change came before is as without: the first group."""
    plain, matched = (
        run(model, tmp_path / str(match), "gptq", bits=2, match=match, pack=False)
        for match in (0.0, 0.5)
    )
    assert squares(matched, model) < 0.9 * squares(plain, model)
    weights_of, others = weights(matched), weights(plain)
    first = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    for name in others:
        same = name in first or "_proj" not in name
        assert torch.equal(weights_of[name], others[name]) == same, name
    rows = json.loads((matched.path / "compresso.json").read_text())["report"]["rows"]
    assert all((row["moved"] > 0) == (f"{row['linear']}.weight" not in first) for row in rows)
    others = json.loads((plain.path / "compresso.json").read_text())["report"]["rows"]
    assert not any("moved" in row for row in others)


def test_training_starts_from_matched_weights(model, tmp_path):
    plain, matched = (
        run(model, tmp_path / str(match), "autoround", bits=2, steps=4, match=match, pack=False)
        for match in (0.0, None)
    )
    assert squares(matched, model) < 0.9 * squares(plain, model)


def test_a_gram_that_cannot_be_matched_is_named(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NumericalError("gram of 64 columns is not positive definite")

    monkeypatch.setattr("compresso.stages.quantize_work.moved", refuse)
    with pytest.raises(NumericalError, match=r"`model\.layers\.0\.self_attn\.q_proj`: gram of 64"):
        run(model, tmp_path / "out", "gptq", match=0.5)


def test_a_better_allocation_than_all_alike(model, tmp_path):
    """The groups are measured, and the sum of what they lose alone is the least."""
    found = {}
    for allocation in ("dp", "uniform"):
        values = {"target_bits": 4.2, "group_size": 32, "allocation": allocation}
        written = run(model, tmp_path / allocation, "rtn", **values)
        record = json.loads((written.path / "compresso.json").read_text())
        found[allocation] = record["report"]["summary"]["choice"]
    assert found["dp"]["bits_per_weight"] <= 4.2
    assert found["dp"]["measured_kl"] <= found["uniform"]["measured_kl"]
    assert len({row["bits"] for row in found["dp"]["groups"]}) > 1


def test_a_size_counts_everything(model, tmp_path):
    written = run(model, tmp_path / "out", "rtn", size="52KB")
    assert 48_000 < written.stored_bytes <= 52_000


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("gptq", {"group_size": 16}),
        ("gptq", {"group_size": 16, "symmetric": False}),
        ("hqq", {"group_size": 16}),
        ("gptq+higgs", {"block": 16}),
    ],
)
def test_scales_in_eight_bits_take_less_and_lose_little(model, tmp_path, method, values):
    found = {}
    for bits in (16, 8):
        target = tmp_path / str(bits)
        found[bits] = run(model, target, method, bits=2, scale_bits=bits, lm_head=False, **values)
    assert "quantization_config" not in found[8].config
    rows = {
        bits: json.loads((one.path / "compresso.json").read_text())["report"]["rows"]
        for bits, one in found.items()
    }
    for plain, row in zip(rows[16], rows[8], strict=True):
        columns = 192 if "down_proj" in row["linear"] else 64
        saved = 8 / 16 * (2 if method == "hqq" else 1) - 16 / columns
        shape = 8 * 16 / row["parameters"] if method == "gptq" else 0  # no shape is stored
        assert plain["stored_bits"] - row["stored_bits"] == pytest.approx(saved + shape)
        error = "output_error" if "output_error" in row else "weight_error"
        assert row[error] < 1.15 * plain[error]
    means = [sum(row["weight_error"] for row in rows[bits]) for bits in (16, 8)]
    assert means[1] < 1.05 * means[0]
    size = found[8].stored_bytes
    assert size == sum(found[8].info(name).nbytes for name in found[8].names())


def test_a_target_counts_the_scales_and_zeros_that_are_stored(model, tmp_path):
    """To the byte where codes are ours; else up to the shapes that only the other layout has."""
    for bits, missing in ((8, 0), (16, 14 * 16)):
        values = {"group_size": 16, "symmetric": False, "target_bits": 4.3, "allocation": "zd"}
        written = run(model, tmp_path / str(bits), "rtn", scale_bits=bits, **values)
        summary = json.loads((written.path / "compresso.json").read_text())["report"]["summary"]
        assert len({row["bits"] for row in summary["choice"]["groups"]}) > 1
        assert summary["choice"]["bytes"] - missing == written.stored_bytes
        assert written.packed and "coded" in written.config["compresso"]


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("rtn", {"size": "1KB"}, "`size`: 1KB cannot be reached"),
        ("rtn", {"target_bits": 4, "bits": 4}, "give only one of `bits`, `target_bits`, `size`"),
        ("rtn", {"target_bits": 4, "size": "1MB"}, "give only one of `target_bits`, `size`"),
        ("gptq", {"match": 1.5}, "`match`: input should be less than or equal to 1"),
        ("rtn", {"match": 0.5}, "method `rtn` has no `match`"),
        ("higgs", {"bits": 8, "dimension": 2}, "8 bits in 2 dimensions are 2**16 points"),
        ("higgs", {"block": 24}, "`block` must be a power of two, not 24"),
        ("nf4", {"group_size": 128}, "64 columns, which do not divide into groups of 128"),
        ("gptq", {"lm_head": True}, "shares its weights with the embedding"),
        ("autoround", {"size": "1MB"}, "method `autoround` has no `size`"),
        ("autoround", {"start": "rtn", "match": 0.5}, "`match` needs `start` `gptq`, not `rtn`"),
        ("int8", {"scale_bits": 8}, "method `int8` has no `scale_bits`"),
        ("nf4", {"scale_bits": 16}, "`scale_bits`: input should be 8"),
        ("rtn", {"scale_bits": 4}, "`scale_bits`: input should be 8 or 16"),
        ("hqq", {"scale_bits": 8}, "`model.layers.0.self_attn.q_proj` has one scale for each row"),
        ("gptq", {"scale_bits": 8, "group_size": -1}, "which 8 bits would only make larger"),
        ("higgs", {"scale_bits": 8}, "which 8 bits would only make larger"),
    ],
)
def test_what_is_refused(model, tmp_path, method, values, message):
    with pytest.raises(ConfigError) as raised:
        run(model, tmp_path / "out", method, **values)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()
