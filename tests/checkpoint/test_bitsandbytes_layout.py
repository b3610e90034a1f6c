"""Whole checkpoints in bitsandbytes layouts: ours in transformers, and its own read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresso.checkpoint.bitsandbytes_layout import (
    TRANSPOSED,
    BitsAndBytes,
    pack,
    packed_names,
    quantization_config,
)
from compresso.checkpoint.directory import TensorInfo
from compresso.errors import CheckpointError
from compresso.families import FAMILIES, RESTRUCTURED
from compresso.kernels.normal_float import quantize, quantize_rows

TOKENS = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "qwen2": {
        **{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 64, "n_inner": 192, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
# Largest difference of logits, over the largest logit. While training, bitsandbytes multiplies by
# the decoded weights, and only the order of sums differs. Otherwise its CPU kernels use bfloat16 in
# 4 bits, whatever the type of the model; in 8 bits it also rounds what enters each linear.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 0.02}
FAST = {"nf4": 0.04, "fp4": 0.04, "int8": 0.08}


def tiny(family: str, dtype: torch.dtype) -> PreTrainedModel:
    heads = {} if family == "gpt2" else {"num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    config = CONFIG_MAPPING[family](**fields, **heads, **SIZES[family])
    config.dtype = dtype
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()  # type: ignore[no-any-return]


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Those inside blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
        and name != "lm_head"
    }


def write(model: PreTrainedModel, path: Path, kind: str, *, double: bool) -> None:
    """Quantize a dense model, write it, and leave the decoded weights in it."""
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    transposed = model.config.model_type in TRANSPOSED
    for name, module in linears(model).items():
        stored = next(
            t for t in tensors if f"transformer.{t}" == f"{name}.weight" or t == f"{name}.weight"
        )
        del tensors[stored]
        weight = module.weight.detach().float()
        weight = weight.T.contiguous() if transposed else weight
        options: dict[str, Any] = {"scale_dtype": model.dtype}
        if kind == "int8":
            codes: Any = quantize_rows(weight, **options)
        else:
            options["scale_bits"] = 8 if double else None
            codes = quantize(weight, group_size=64, kind=kind, **options)  # type: ignore[arg-type]
        parts = pack(stored.removesuffix(".weight"), codes)
        assert list(parts) == packed_names(stored.removesuffix(".weight"), kind, double=double)  # type: ignore[arg-type]
        tensors |= parts
        decoded = codes.decode()
        module.weight.data = (decoded.T if transposed else decoded).to(model.dtype).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization_config(
        kind,  # type: ignore[arg-type]
        double=double,
        dtype=model.dtype,
        ignore=["lm_head"],
    )
    (path / "config.json").write_text(json.dumps(config))


def packing(path: Path) -> tuple[BitsAndBytes, dict[str, Tensor]]:
    tensors = load_file(path / "model.safetensors")
    return packing_of(json.loads((path / "config.json").read_text()), tensors), tensors


def packing_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> BitsAndBytes:
    infos = {
        name: TensorInfo(tuple(t.shape), t.dtype, t.nbytes, "model.safetensors")
        for name, t in tensors.items()
    }
    return BitsAndBytes(config, infos, lambda names: {name: tensors[name] for name in names})


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def load(path: Path, **options: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, double", [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]
)
def test_transformers_reads_what_is_written(tmp_path, family, dtype, kind, double):
    model = tiny(family, dtype)
    before = logits(model)
    write(model, tmp_path, kind, double=double)
    expected = logits(model)
    assert not torch.allclose(expected, before)
    found = load(tmp_path)
    for name, module in linears(found).items():
        assert type(module) is (bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit)
        theirs = dequantized(module).to(dtype)
        ours = model.get_submodule(name).weight
        assert torch.equal(theirs, ours.T if family in TRANSPOSED else ours), name
    assert type(found.get_output_embeddings()) is torch.nn.Linear
    most = expected.abs().max()
    for module in linears(found).values():
        module.train()
    assert (logits(found) - expected).abs().max() < EXACT[dtype] * most
    assert (logits(load(tmp_path)) - expected).abs().max() < FAST[kind] * most


@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("kind, double", [("nf4", False), ("nf4", True), ("int8", False)])
def test_what_is_written_is_read(tmp_path, family, kind, double):
    model = tiny(family, torch.bfloat16)
    write(model, tmp_path, kind, double=double)
    check_read(tmp_path, {name: one.weight for name, one in linears(model).items()})
    found, _ = packing(tmp_path)
    block = {} if kind == "int8" else {"block": 64, "double": double}
    assert {tuple(found.kind(path).items()) for path in found.shapes} == {
        tuple({"kind": kind, **block}.items())
    }


def check_read(path: Path, expected: dict[str, Tensor]) -> None:
    """expected: the dense weight of every packed linear, by module."""
    found, tensors = packing(path)
    by_path = {name.removeprefix("transformer."): weight for name, weight in expected.items()}
    assert {p.removeprefix("transformer.") for p in found.shapes} == set(by_path)
    covered: set[str] = set()
    for path_, shape in found.shapes.items():
        weight = by_path[path_.removeprefix("transformer.")]
        dtype = weight.dtype
        parts = {name: tensors[name] for name in found.names(path_)}
        copies = {name: part.clone() for name, part in parts.items()}
        decoded = found.decode(path_, parts)
        assert decoded.dtype == torch.float32
        assert tuple(decoded.shape) == shape
        assert torch.equal(decoded.to(dtype), weight), path_
        assert all(torch.equal(as_bytes(parts[name]), as_bytes(copies[name])) for name in parts)
        covered |= set(parts)
    assert all(tensors[name].is_floating_point() for name in tensors.keys() - covered)


def as_bytes(tensor: Tensor) -> Tensor:
    """Codes can be stored as floats, where some are not equal to themselves."""
    return tensor.view(torch.uint8)


def dequantized(module: Any) -> Tensor:
    """The weight that bitsandbytes itself reads from a linear, (out, in)."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


@pytest.mark.parametrize("family", sorted(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "bfloat16",
        },
        {"load_in_4bit": True},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "nf4-double", "fp4", "int8"],
)
def test_what_transformers_saves_is_read(tmp_path, family, dtype, options):
    tiny(family, dtype).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(**options)
    quantized = load(tmp_path / "dense", quantization_config=config)
    expected = {name: dequantized(module).to(dtype) for name, module in linears(quantized).items()}
    if family in TRANSPOSED:
        expected = {name: weight.T for name, weight in expected.items()}
    quantized.save_pretrained(tmp_path / "packed")
    check_read(tmp_path / "packed", expected)


def test_transposed_families_are_known():
    found = {name for name, family in FAMILIES.items() if family.transposed}
    assert found | {f"{RESTRUCTURED}{name}" for name in found} == set(TRANSPOSED)


def codes(rows: int = 64, columns: int = 128) -> Any:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return quantize(weight, group_size=64, scale_bits=8, scale_dtype=torch.float32)


def test_a_missing_part_is_named():
    for tensors in (
        pack("a", codes()),
        pack("a", quantize_rows(torch.eye(8), scale_dtype=torch.float32)),
    ):
        for lost in ("a.weight", "a.weight.absmax", "a.weight.nested_absmax"):
            if lost in tensors:
                left = {name: tensor for name, tensor in tensors.items() if name != lost}
                with pytest.raises(
                    CheckpointError, match=f"`a` is packed, but there is no `{lost}`"
                ):
                    packing_of({"model_type": "llama"}, left)


def test_older_checkpoints_have_no_weight_format():
    tensors = pack("a", quantize_rows(torch.eye(8), scale_dtype=torch.float32))
    del tensors["a.weight_format"]
    found = packing_of({"model_type": "llama"}, tensors)
    assert found.names("a") == ["a.weight", "a.SCB"]
    assert torch.equal(found.decode("a", tensors), torch.eye(8))


def test_weights_reordered_for_a_cpu_are_refused():
    """As bitsandbytes reorders them at the first forward, and has saved them."""
    tensors = pack("a", codes())
    state = bnb.functional.QuantState.from_dict(
        {name.removeprefix("a.weight."): t for name, t in tensors.items() if name != "a.weight"},
        torch.device("cpu"),
    )
    reordered, _ = bnb.functional._convert_weight_packed_for_cpu(tensors["a.weight"], state)
    with pytest.raises(CheckpointError, match=r"`a\.weight` holds its codes in the order of a CPU"):
        packing_of({"model_type": "llama"}, {**tensors, "a.weight": reordered})


def test_blocks_across_rows_are_not_written():
    with pytest.raises(ValueError, match="blocks of 64 do not divide the columns of `a`"):
        pack("a", codes(columns=96))
