"""Random corrections of any checkpoint, and a stage that puts them beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import build, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso import registry
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.layout import Scheme, pack, quantization_config
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.grid import quantize
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules
from compresso.recipe import make_step
from compresso.report import Report
from compresso.run import run_step
from compresso.runtime import Runtime
from compresso.settings import CalibrationSettings

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32, 10**9, trust_remote_code=False)
PROBE = tokens(1, 12)


def open_model(source: Checkpoint) -> ModelAdapter:
    return ModelAdapter.open(source, dtype=torch.float32, device=CPU)


def modules(source: Checkpoint) -> dict[str, str]:
    """Path in the checkpoint -> path in transformers, of all linears."""
    adapter = open_model(source)
    return linear_modules(adapter.model, adapter.family, source)


def corrections(
    source: Checkpoint, *, leave_out: str = "k_proj", size: float = 0.1
) -> dict[str, LowRank]:
    """Of all linears but one kind, of ranks from 1 to 3, with numbers that bfloat16 holds."""
    adapter = open_model(source)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, path in enumerate(linear_modules(adapter.model, adapter.family, source)):
        if not path.endswith(leave_out):
            shape = source.weight_info(f"{path}.weight").shape
            rows, columns = reversed(shape) if adapter.family.transposed else shape
            rank = 1 + number % 3
            up, down = (
                torch.randn(sizes, generator=generator).mul_(size).bfloat16().float()
                for sizes in ((rows, rank), (rank, columns))
            )
            found[path] = LowRank(up, down)
    return found


def sums(source: Checkpoint, factors: dict[str, LowRank]) -> dict[str, Tensor]:
    """The corrected weights, float32, by name in the checkpoint. source: without an adapter."""
    transposed = open_model(source).family.transposed
    found = {}
    for path, factor in factors.items():
        weight = source.load_weights([f"{path}.weight"])[f"{path}.weight"].float()
        product = factor.up @ factor.down
        found[f"{path}.weight"] = weight + (product.T if transposed else product)
    return found


@torch.no_grad()
def logits_in_memory(source: Checkpoint, factors: dict[str, LowRank]) -> Tensor:
    """What the corrected model says of `PROBE`, with all that is corrected given as tensors."""
    adapter, dense = open_model(source), sums(source, factors)
    states = enter_blocks(adapter, source, [], probe=PROBE, budget=0, spill_dir=None)

    def restore(index: int) -> dict[str, Tensor]:
        return {n: dense[n] for n in adapter.block_tensors(index) if n in dense}

    for _ in walk_blocks(adapter, source, states, restore=restore):
        pass
    assert states.probe is not None
    if adapter.head_tensor in dense:
        adapter.logits(source, states.probe)  # loads it
        adapter.set_head(dense[adapter.head_tensor])
    return adapter.logits(source, states.probe)


def put_beside(source: Checkpoint, target: Path, factors: dict[str, LowRank], patch) -> Checkpoint:
    """Run a step that leaves `source` as it is with corrections beside it."""

    def stage(source, step, calibration, writer, runtime):
        writer.resize(1)
        writer.commit(0, source.load(source.names()), {})
        return Report(
            config=source.config,
            expected=source.names(),
            carried=open_model(source).unmapped_tensors(),
            fingerprint=Fingerprint(PROBE, logits_in_memory(source, factors)),
            adapter=factors,
        )

    step = make_step("compensate", {"method": "loftq"}, where="test")
    with patch.context() as patched:
        patched.setattr(registry, "load", lambda code: stage)
        runtime = replace(RUNTIME, dtype=source.dtype)
        run_step(step, source, CalibrationSettings(), target, runtime)
    return Checkpoint(target)


def run_quantize(source: Checkpoint, target: Path, **settings) -> Checkpoint:
    step = make_step("quantize", settings, where="test")
    run_step(step, source, CalibrationSettings(), target, RUNTIME)
    return Checkpoint(target)


def calm(family: str, **changes) -> PreTrainedModel:
    """A model of two blocks in which rounding errors do not grow; widths are multiples of 64."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2}
    if family == "gpt2":
        sizes = {"n_inner": 128, "n_layer": 2}
    model = build(family, **sizes, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5)
    return model


def stock(family: str, path: Path, **changes) -> Checkpoint:
    """The calm model of a family, saved."""
    calm(family, **changes).save_pretrained(path)
    return Checkpoint(path)


def packed(family: str, **settings) -> Callable[[Path], Checkpoint]:
    """What saves it in a directory, quantized."""

    def make(path: Path) -> Checkpoint:
        return run_quantize(stock(family, path / "source"), path / "packed", **settings)

    return make


def save_mixed(model: PreTrainedModel, path: Path) -> Checkpoint:
    """A checkpoint whose linears are symmetric codes of 2 and 4 bits, in turns."""
    linears = {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    schemes = {}
    for number, (name, weight) in enumerate(linears.items()):
        schemes[name] = Scheme(4 if number % 3 else 2, 32, True)
        options = {"bits": schemes[name].bits, "group_size": 32, "symmetric": True}
        codes = quantize(weight, None, grid="minmax", scale_dtype=model.dtype, **options)
        stored |= pack(name, codes, model.dtype, symmetric=True)
        del stored[f"{name}.weight"]
    entry = quantization_config(schemes, ignore=["lm_head"])
    path.mkdir()
    config = model.config.to_diff_dict() | {"quantization_config": entry}
    (path / "config.json").write_text(json.dumps(config, default=str))
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)
