"""Adapters on disk: PEFT reads what we write, we read what PEFT writes, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compresso.checkpoint.adapter_folder import FOLDER, write_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules

LLAMA = {f"model.layers.{i}.mlp.down_proj": 1 + i % 3 for i in range(6)} | {
    "model.layers.1.self_attn.q_proj": 4,
    "lm_head": 2,
}
GPT2 = {"h.0.attn.c_attn": 2, "h.1.attn.c_proj": 3, "h.1.mlp.c_fc": 3}


def factors(source: Checkpoint, ranks: dict[str, int]) -> dict[str, LowRank]:
    """Random corrections of about a third of the weights' size, exact in bfloat16."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for path, rank in ranks.items():
        rows, columns = source.weight_info(f"{path}.weight").shape
        if source.config["model_type"] == "gpt2":
            rows, columns = columns, rows
        up, down = (
            torch.randn(shape, generator=generator).mul_(0.1).bfloat16().float()
            for shape in ((rows, rank), (rank, columns))
        )
        found[path] = LowRank(up, down)
    return found


def modules(source: Checkpoint) -> dict[str, str]:
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    return linear_modules(adapter.model, adapter.family, source)


def corrected(source: Checkpoint, ranks: dict[str, int], path: Path) -> Checkpoint:
    """A copy of a checkpoint with an adapter."""
    shutil.copytree(source.path, path)
    write_adapter(
        path,
        factors(source, ranks),
        modules=modules(source),
        base=path,
        dtype=torch.float32,
        fan_in_fan_out=source.config["model_type"] == "gpt2",
    )
    return Checkpoint(path)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tokens(1, 12)).logits.float()


@pytest.fixture
def llama(checkpoints: Callable[[str], Checkpoint], tmp_path: Path) -> Checkpoint:
    return corrected(checkpoints("llama"), LLAMA, tmp_path / "llama")


@pytest.mark.parametrize(("family", "ranks"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_peft_and_the_reader_see_the_same_model(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path, family: str, ranks: dict[str, int]
) -> None:
    source = checkpoints(family)
    if family == "gpt2":  # with the names of the hub's, which lack the prefix
        shutil.copytree(source.path, tmp_path / "short")
        stored = load_file(source.path / "model.safetensors")
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        save_file(stored, tmp_path / "short" / "model.safetensors", {"format": "pt"})
        source = Checkpoint(tmp_path / "short")
    written = corrected(source, ranks, tmp_path / "corrected")
    assert written.adapter is not None and written.adapter.ranks == dict(sorted(ranks.items()))
    dense = AutoModelForCausalLM.from_pretrained(source.path)
    before = logits(dense)
    weights = written.load_weights(written.weight_names())
    added = factors(source, ranks)
    for name, weight in written.load(written.names()).items():
        path = name.removesuffix(".weight")
        if path in added:
            product = added[path].up @ added[path].down
            weight = weight + (product.T if family == "gpt2" else product)
        assert torch.equal(weights[name], weight), name
    info = dense.load_state_dict(
        {
            modules(source).get(n.removesuffix(".weight"), "") + ".weight": w
            for n, w in weights.items()
        },
        strict=False,
    )
    assert not set(info.missing_keys) & {f"{modules(source)[path]}.weight" for path in ranks}
    expected = logits(dense)
    assert (expected - before).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(written.path), written.path / FOLDER
    )
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)
    alone = AutoPeftModelForCausalLM.from_pretrained(written.path / FOLDER)
    torch.testing.assert_close(logits(alone), expected, atol=1e-4, rtol=1e-4)
