"""Whole packed checkpoints: exact in transformers, and dense to the reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import UNIFORM, random_packed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresso.checkpoint.layout import Scheme, pack, quantization_config
from compresso.checkpoint.proof import Fingerprint, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError

TOKENS = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))


def tiny(kind: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
        "pad_token_id": 0,
    }
    if kind not in ("gpt_neox", "opt"):
        values["num_key_value_heads"] = 2
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**values, **changes)
    config.dtype = dtype
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]


def keep_head(path: str) -> bool:
    return path == "lm_head"


def write_packed(
    model: PreTrainedModel,
    path: Path,
    scheme: Scheme | Callable[[str], Scheme],
    *,
    keep: Callable[[str], bool] = keep_head,
    embedding: bool = False,
    dequantize: bool = True,
) -> dict[str, Tensor]:
    """Give the model random packed weights and write it. Returns the decoded ones.

    scheme: of all packed linears, or what gives that of each path.
    """
    model.save_pretrained(path / "dense")
    dense = Checkpoint(path / "dense")
    stored = dense.load(dense.names())
    decoded, kept = {}, []
    used: dict[str, Scheme] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        wanted = isinstance(module, nn.Linear) and not keep(name)
        if wanted or (embedding and name.endswith("embed_tokens")):
            shape = stored.pop(f"{name}.weight").shape
            own = used[name] = scheme if isinstance(scheme, Scheme) else scheme(name)
            packed = random_packed(own, *shape, model.dtype, seed=seed)
            stored |= pack(name, packed, model.dtype, symmetric=own.symmetric)
            decoded[f"{name}.weight"] = packed.decode().to(model.dtype)
            with torch.no_grad():
                module.weight.copy_(decoded[f"{name}.weight"])  # type: ignore[operator,union-attr]
        elif isinstance(module, nn.Linear):
            kept.append(name)
    entry = quantization_config(scheme if isinstance(scheme, Scheme) else used, ignore=kept)
    if isinstance(scheme, Scheme):
        entry["dequantize"] = dequantize
    writer = CheckpointWriter(path / "packed", key="k", parts=1)
    writer.commit(0, stored, {})
    writer.finalize(
        config={**dense.config, "quantization_config": entry},
        side_files=dense.side_files(),
        expected=stored,
    )
    writer.publish()
    return decoded


def assert_reloads_exactly(model: PreTrainedModel, path: Path) -> None:
    with torch.no_grad():
        fingerprint = Fingerprint(TOKENS, model(input_ids=TOKENS).logits.float())
        expected = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    report = prove(path, fingerprint, dtype=model.dtype)
    assert report.difference == 0
    assert report.top_agreement == 1
    reloaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert reloaded.dtype == model.dtype
    assert torch.equal(reloaded.generate(TOKENS, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("scheme", UNIFORM)
def test_transformers_reads_every_scheme(tmp_path: Path, scheme: Scheme) -> None:
    model = tiny("llama")
    write_packed(model, tmp_path, scheme)
    assert_reloads_exactly(model, tmp_path / "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_reads_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    write_packed(model, tmp_path, Scheme(3, 32, False))
    assert_reloads_exactly(model, tmp_path / "packed")


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "gpt_neox", "opt", "phi3", "olmo2", "qwen3"])
@pytest.mark.parametrize("dequantize", [True, False])
def test_transformers_reads_every_family(tmp_path: Path, kind: str, dequantize: bool) -> None:
    """By its default path too, which goes by `targets` and `ignore` and so is what vLLM reads."""
    model = tiny(kind)
    scheme = Scheme(4, 32, not dequantize)
    write_packed(model, tmp_path, scheme, dequantize=dequantize)
    assert_reloads_exactly(model, tmp_path / "packed")


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(
    "keep",
    [
        lambda path: "down_proj" in path or path in ("lm_head", "model.layers.1.self_attn.q_proj"),
        lambda path: False,
    ],
    ids=["some dense", "head packed"],
)
def test_which_linears_are_packed(
    tmp_path: Path, keep: Callable[[str], bool], dequantize: bool
) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    write_packed(model, tmp_path, Scheme(4, 32, True), keep=keep, dequantize=dequantize)
    assert_reloads_exactly(model, tmp_path / "packed")


def mixed(path: str) -> Scheme:
    """2, 3, 4 and 8 bits in groups and by row; linears that are fused somewhere have the same."""
    number = re.search(r"\d+", path)
    block = int(number[0]) if number else 0
    if any(word in path for word in ("q_proj", "k_proj", "v_proj", "qkv", "query_key_value")):
        return Scheme((2, 8)[block], 32, True)
    if any(word in path for word in ("gate", "up_proj", "fc1", "h_to_4h")):
        return Scheme(3, (-1, 32)[block], True)
    return Scheme((4, 2)[block], 32, True)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "gemma2", "gpt_neox", "opt", "phi3", "olmo2", "qwen3"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_reads_a_mixture(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    decoded = write_packed(model, tmp_path, mixed)
    source = Checkpoint(tmp_path / "packed")
    entry = source.config["quantization_config"]
    assert len(entry["config_groups"]) >= 4 and "dequantize" not in entry
    weights = source.load_weights(decoded)
    assert all(torch.equal(weights[name], tensor) for name, tensor in decoded.items())
    assert_reloads_exactly(model, tmp_path / "packed")


@pytest.mark.parametrize("head", [True, False])
def test_a_mixture_with_a_dense_linear_and_a_packed_head(tmp_path: Path, head: bool) -> None:
    model = tiny("llama", tie_word_embeddings=False)

    def keep(path: str) -> bool:
        return (
            "down_proj" in path
            or path == "model.layers.1.self_attn.q_proj"
            or (path == "lm_head" and not head)
        )

    write_packed(model, tmp_path, mixed, keep=keep)
    assert_reloads_exactly(model, tmp_path / "packed")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding(tmp_path: Path, kind: str, tied: bool) -> None:
    model = tiny(kind, tie_word_embeddings=tied)
    decoded = write_packed(model, tmp_path, Scheme(4, 32, False), embedding=True)
    assert any("embed_tokens" in name for name in decoded)
    assert_reloads_exactly(model, tmp_path / "packed")


# ---------------------------------------------------------------- seen through the reader


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32, True), Scheme(3, 32, False), Scheme(8, -1, False)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_checkpoint_looks_dense(tmp_path: Path, scheme: Scheme, tied: bool) -> None:
    model = tiny("qwen2", tie_word_embeddings=tied)
    decoded = write_packed(model, tmp_path, scheme)
    dense, packed = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "packed")
    assert packed.packed and not dense.packed
    assert packed.weight_names() == dense.weight_names() == dense.names()
    assert packed.parameters == dense.parameters
    assert packed.dtype == dense.dtype == torch.bfloat16
    assert packed.stored_bytes < dense.stored_bytes
    assert packed.stored_bytes == sum(
        packed.weight_info(name).nbytes for name in packed.weight_names()
    )
    weights = packed.load_weights(reversed(packed.weight_names()))
    assert list(weights) == packed.weight_names()[::-1]
    for name, weight in weights.items():
        expected = decoded[name] if name in decoded else dense.load([name])[name]
        assert weight.dtype == expected.dtype and torch.equal(weight, expected)
        info = packed.weight_info(name)
        assert (info.shape, info.dtype) == (tuple(expected.shape), expected.dtype)
        if name not in decoded:
            assert info == packed.info(name)
    assert not set(decoded) & set(packed.names())


def test_damage_to_a_packed_checkpoint(tmp_path: Path) -> None:
    write_packed(tiny("llama"), tmp_path, Scheme(4, 32, False))
    source = Checkpoint(tmp_path / "packed")
    path = "model.layers.0.mlp.up_proj"
    stored = source.load(source.names())

    def changed(name: str, tensor: Tensor | None) -> Checkpoint:
        target = tmp_path / name
        tensors = {key: value for key, value in stored.items() if key != name}
        if tensor is not None:
            tensors[name] = tensor
        writer = CheckpointWriter(target, key="k", parts=1)
        writer.commit(0, tensors, {})
        writer.finalize(config=source.config, side_files={}, expected=tensors)
        writer.publish()
        return Checkpoint(target)

    scale = stored[f"{path}.weight_scale"].clone()
    scale[3, 1] = torch.inf
    with pytest.raises(CheckpointError, match=f"`{path}.weight` in .* holds NaN or infinity"):
        changed(f"{path}.weight_scale", scale).load_weights([f"{path}.weight"])
    with pytest.raises(CheckpointError, match=f"no tensor `{path}.weight_zero_point`"):
        changed(f"{path}.weight_zero_point", None).weight_names()


def test_weights_in_a_foreign_format_can_be_listed_but_not_read(tmp_path: Path) -> None:
    write_packed(tiny("llama"), tmp_path, Scheme(4, 32, True))
    source = tmp_path / "packed"
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (source / "config.json").write_text(json.dumps(values))
    checkpoint = Checkpoint(source)
    assert checkpoint.info(checkpoint.names()[0]).nbytes > 0
    assert checkpoint.stored_bytes > 0 and len(checkpoint.key) == 64
    for read in (
        checkpoint.weight_names,
        lambda: checkpoint.weight_info("model.norm.weight"),
        lambda: checkpoint.load_weights(["model.norm.weight"]),
        lambda: checkpoint.parameters,
    ):
        with pytest.raises(CheckpointError, match="quantized by `awq` cannot be read") as caught:
            read()
        assert "start from the original" in str(caught.value.hint)
