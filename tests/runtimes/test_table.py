"""The table of runtimes: what it says is backed by a test, and is what is found."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path

import pytest
import torch
from coding import save_coded, uniform, vector
from correcting import PROBE, calm, corrections, put_beside, run_quantize, save_mixed
from exporting import close, loaded_logits, run_export
from peft import LoraConfig, PeftModel, get_peft_model
from restructured import save
from transformers import AutoModelForCausalLM

from compresso import registry
from compresso.calibration.replay import replay
from compresso.checkpoint.layout import Scheme, pack, quantization_config
from compresso.checkpoint.reader import Checkpoint
from compresso.models.structure import Structure
from compresso.runtimes.table import RUNTIMES, Traits, row_for, sentence, table
from compresso.runtimes.traits import runtimes_for, traits_of

ROOT = Path(__file__).parents[2]
USUAL = {"method": "rtn", "bits": 4, "group_size": 32}


def checks():
    rows = [*table()["rows"], *(row for rows in table()["fast"].values() for row in rows)]
    return sorted({row.checked for row in rows})


@pytest.mark.parametrize("checked", checks())
def test_every_row_is_backed(checked):
    """By a test that there is, or by a file of a source."""
    how, _, where = checked.partition(": ")
    assert how in ("run", "source") and where
    if how == "run":
        file, _, test = where.partition("::")
        functions = [
            node.name
            for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.FunctionDef)
        ]
        assert test in functions if test else functions


def test_there_is_a_row_for_whatever_is_written():
    kinds = {*registry.stage("export").methods} - {"decilm"} | {"coded"}
    for kind in kinds:
        for runtime in RUNTIMES:
            assert row_for(runtime, Traits(kind)) is not None, (runtime, kind)
    assert row_for("vllm", Traits("hqq")) is None


def test_what_is_to_be_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    for package, extra in table()["installed_by"].items():
        if extra in extras:
            assert any(package in asked for asked in extras[extra]), package
    assert {"gptq", "auto-round", "packed", "bitsandbytes", "peft"} <= set(extras)


def test_versions_and_date():
    found = table()
    assert set(RUNTIMES) <= set(found["versions"]) and str(found["checked_on"]) == "2026-11-21"


@pytest.mark.parametrize(
    ("traits", "loads"),
    [
        (Traits("dense"), ["dense", "dense", "no", "dense"]),
        (Traits("dense", structure="own"), ["dense", "no", "no", "dense"]),
        (
            Traits("compressed-tensors", frozenset({4, 8}), frozenset({64}), mixed=True),
            ["dense", "packed", "no", "dense"],
        ),
        (
            Traits("compressed-tensors", frozenset({4, 2}), mixed=True, symmetric=False),
            ["no", "packed", "no", "no"],
        ),
        (Traits("gptq", frozenset({4}), frozenset({128})), ["packed", "packed", "no", "packed"]),
        (
            Traits("gptq", frozenset({4}), frozenset({128}), symmetric=False),
            ["packed", "no", "no", "packed"],
        ),
        (Traits("gptq", frozenset({4}), head=True), ["no", "packed", "no", "packed"]),
        (Traits("auto-round", frozenset({3})), ["packed", "no", "no", "no"]),
        (Traits("bitsandbytes"), ["packed", "no", "no", "packed"]),
        (Traits("coded", frozenset({3})), ["packed", "no", "no", "packed"]),
    ],
)
def test_what_is_said(traits, loads):
    rows = [row_for(runtime, traits) for runtime in RUNTIMES]
    assert [row.loads for row in rows] == loads


def stock(path, **changes):
    calm("llama", **changes).save_pretrained(path)
    return Checkpoint(path)


def test_traits(tmp_path):
    dense = stock(tmp_path / "dense", dtype=torch.bfloat16)
    assert traits_of(dense) == Traits("dense")
    own = save(calm("llama"), Structure(no_mlp=(1,)), tmp_path / "own")
    assert traits_of(own) == Traits("dense", structure="own")
    packed = run_quantize(dense, tmp_path / "packed", **USUAL, lm_head=True)
    four = Traits("compressed-tensors", frozenset({4}), frozenset({32}), head=True)
    assert traits_of(packed) == four
    run_export(packed, tmp_path / "auto", "auto-round", verify=False)
    assert traits_of(Checkpoint(tmp_path / "auto")).kind == "auto-round"
    mixed = save_mixed(calm("llama"), tmp_path / "mixed")
    assert traits_of(mixed).mixed and traits_of(mixed).bits == {2, 4}
    said = {name: sentence(known) for name, known in runtimes_for(packed).items()}
    assert said["transformers"].startswith("loads, weights are dense in memory: needs compressed")
    assert "compresso-llm[packed]" in said["transformers"]
    assert "codes stay codes" in said["vllm"] and "not run" in said["vllm"]
    assert said["llama.cpp"].startswith("does not load: `compresso export --format gguf` first")
    unknown = {"loads": "unknown", "note": "nothing is known of `x`"}
    assert sentence(unknown) == "unknown: nothing is known of `x`"


def test_dense(tmp_path):
    model = calm("llama")
    model.save_pretrained(tmp_path / "x")
    with torch.no_grad():
        assert close(loaded_logits(tmp_path / "x")[1], model(input_ids=PROBE).logits)


def test_own_code(tmp_path):
    """With stock transformers: nothing of compresso is there but what comes with the files."""
    source = save(calm("llama"), Structure(no_mlp=(1,)), tmp_path / "own")
    run_quantize(source, tmp_path / "packed", **USUAL)
    for path in (tmp_path / "own", tmp_path / "packed"):
        model, _ = loaded_logits(path, trust_remote_code=True)
        assert "auto_map" in json.loads((path / "config.json").read_text())
        assert model.config.model_type == "compresso_llama"


def test_own_codes(tmp_path):
    pair = save_coded(calm("llama"), tmp_path / "x", vector())
    model, logits = loaded_logits(pair.coded.path, trust_remote_code=True)
    assert close(logits, loaded_logits(pair.dense.path)[1])
    linear = model.model.layers[0].mlp.up_proj
    assert any(tensor.dtype == torch.int32 for tensor in linear.buffers())  # codes stay codes


@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_codes(symmetric, tmp_path):
    source = run_quantize(stock(tmp_path / "x"), tmp_path / "y", **USUAL, symmetric=symmetric)
    model, _ = loaded_logits(source.path)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Parameter"  # dense at once


def test_mixed_codes(tmp_path):
    source = save_mixed(calm("llama"), tmp_path / "x")
    model = AutoModelForCausalLM.from_pretrained(source.path)
    linear = model.model.layers[0].mlp.up_proj
    assert not hasattr(linear, "weight")
    with torch.no_grad():
        model(input_ids=PROBE)
    assert linear.weight.dtype == torch.float32  # dense from the first pass on


def test_mixed_asymmetric_codes_do_not_load(tmp_path):
    """Two groups in the config, as `quantization_config` refuses to write them."""
    stock(tmp_path / "x")
    source = Checkpoint(tmp_path / "x")
    stored, groups = source.load(source.names()), {}
    for number, name in enumerate(n for n in source.names() if n.endswith("proj.weight")):
        path = name.removesuffix(".weight")
        bits = 4 if number % 2 else 8
        weight = stored.pop(name)
        codes = uniform(bits, 32)(*weight.shape, torch.float32, number)
        stored |= pack(path, codes, torch.float32, symmetric=False)
        groups.setdefault(bits, []).append(path)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    entry = quantization_config(Scheme(4, 32, False), ignore=["lm_head"])
    one = entry["config_groups"].pop("group_0")
    for bits, paths in groups.items():
        weights = one["weights"] | {"num_bits": bits}
        entry["config_groups"][f"group_{bits}"] = {**one, "targets": paths, "weights": weights}
    for dequantize in (True, False):
        config["quantization_config"] = entry | {"dequantize": dequantize}
        (tmp_path / "x" / "config.json").write_text(json.dumps(config))
        from safetensors.torch import save_file

        save_file(stored, tmp_path / "x" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((RuntimeError, ValueError, AssertionError, AttributeError)):
            loaded_logits(tmp_path / "x")


def test_bitsandbytes(tmp_path):
    source = stock(tmp_path / "x", dtype=torch.bfloat16)
    run_export(source, tmp_path / "out", "bitsandbytes", verify=False)
    model, _ = loaded_logits(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8  # codes stay codes


ADAPTED = {
    "dense": lambda path: stock(path / "x"),
    "compressed-tensors": lambda path: run_quantize(stock(path / "x"), path / "y", **USUAL),
    "bitsandbytes": lambda path: run_quantize(stock(path / "x"), path / "y", method="nf4"),
    "coded": lambda path: save_coded(calm("llama"), path / "x", vector()).coded,
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters(kind, tmp_path, monkeypatch):
    """PEFT puts one on at once, and one of new factors can be trained."""
    base = ADAPTED[kind](tmp_path)
    assert row_for("peft", traits_of(base)).loads != "no"
    source = put_beside(base, tmp_path / "beside", corrections(base), monkeypatch)

    def plain():
        return AutoModelForCausalLM.from_pretrained(
            source.path, dtype="auto", trust_remote_code=kind == "coded"
        )

    with torch.no_grad():
        bare = plain()(input_ids=PROBE).logits
        model = PeftModel.from_pretrained(plain(), source.path / "adapter")
        assert not close(model(input_ids=PROBE).logits, bare)
    trained = get_peft_model(plain(), LoraConfig(r=2, target_modules=["up_proj"]))
    trained(input_ids=PROBE).logits.sum().backward()
    grads = [p.grad for n, p in trained.named_parameters() if "lora_B" in n]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_adapters_on_mixed_codes(tmp_path, monkeypatch):
    """PEFT puts one on only after the first pass, with which the codes are decoded."""
    base = save_mixed(calm("llama"), tmp_path / "x")
    assert "run once" in row_for("peft", traits_of(base)).note
    source = put_beside(base, tmp_path / "beside", corrections(base), monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
    with pytest.raises(AttributeError):
        PeftModel.from_pretrained(model, source.path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
    with torch.no_grad():
        bare = model(input_ids=PROBE).logits
        model = PeftModel.from_pretrained(model, source.path / "adapter")
        assert not close(model(input_ids=PROBE).logits, bare)


def gguf_logits(path):
    """What transformers makes of a GGUF file."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def test_gguf(tmp_path):
    dense = stock(tmp_path / "x", dtype=torch.bfloat16)
    packed = run_quantize(dense, tmp_path / "packed", **USUAL)
    for number, source in enumerate((dense, packed)):
        run_export(source, tmp_path / str(number), "gguf", verify=False)
        expected = replay(
            source, PROBE, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
        )
        # Codes are not rounded to bfloat16 when they are decoded, as ours are.
        assert close(gguf_logits(tmp_path / str(number)), expected, 0.01 if number else 1e-4)
    own = save(calm("llama"), Structure(no_mlp=(1,)), tmp_path / "own")
    run_export(own, tmp_path / "deci", "gguf", verify=False)
    with pytest.raises(ValueError, match="deci"):
        gguf_logits(tmp_path / "deci")
