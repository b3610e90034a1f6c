"""Small checkpoints and packed weights that several of these tests use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.grid import Grid, Packed

CONFIG = {"model_type": "llama", "dtype": "bfloat16"}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8).bfloat16(),
        "model.layers.1.mlp.up_proj.weight": torch.randn(12, 8).bfloat16(),
        "model.norm.weight": torch.randn(8),
    }


def write(
    path: Path,
    shards: dict[str, dict[str, Tensor]],
    *,
    config: dict[str, Any] = CONFIG,
    index: dict[str, str] | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for shard, tensors in shards.items():
        save_file(tensors, path / shard, metadata={"format": "pt"})
    if index is None and set(shards) != {"model.safetensors"}:
        index = {name: shard for shard, tensors in shards.items() for name in tensors}
    if index is not None:
        written = {"metadata": {}, "weight_map": index}
        (path / "model.safetensors.index.json").write_text(json.dumps(written))
    return path


def single(path: Path, **extra: Tensor) -> Path:
    return write(path, {"model.safetensors": {**weights(), **extra}})


def sharded(path: Path) -> Path:
    first, second = dict(list(weights().items())[:2]), dict(list(weights().items())[2:])
    return write(path, {"model-00001-of-00002.safetensors": first, "b.safetensors": second})


UNIFORM = [
    Scheme(bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (32, -1)
    for symmetric in (True, False)
]


def random_packed(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, *, seed: int = 0, size: float = 0.2
) -> Packed:
    """Any codes, and scales of both signs that make weights of about `size`."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    levels = 2**scheme.bits
    codes = torch.randint(0, levels, (rows, columns), generator=generator).to(torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    scale *= (
        torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1 if scheme.symmetric else 1
    )
    scale = (scale * size / levels).to(dtype).float()
    zero = torch.full((rows, groups), float(levels // 2))
    if not scheme.symmetric:
        zero = torch.randint(0, levels, (rows, groups), generator=generator).float()
    return Packed(codes, Grid(scale, zero, scheme.bits))


def part(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        f"layers.{index}.weight": torch.randn(6, 4, generator=generator),
        f"layers.{index}.codes": torch.arange(5, dtype=torch.uint8),
    }


NAMES = [name for index in range(3) for name in part(index)]


def finished(target: Path, side_files: dict[str, Path] | None = None) -> CheckpointWriter:
    writer = CheckpointWriter(target, key="k", parts=3)
    for index in range(3):
        writer.commit(index, part(index), {"index": index})
    writer.finalize(config=CONFIG, side_files=side_files or {}, expected=NAMES)
    return writer


TOKENS = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(path: Path, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model whose logits are far apart, saved to `path`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.config.dtype = dtype
    model.save_pretrained(path)
    return model  # type: ignore[no-any-return]


def fingerprint(model: nn.Module, tokens: Tensor = TOKENS) -> Fingerprint:
    with torch.no_grad():
        return Fingerprint(tokens, model(input_ids=tokens).logits.float())


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
