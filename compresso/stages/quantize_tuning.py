"""Train the rounding of linears that another method has quantized: `autoround`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compresso.calibration.states import States
from compresso.calibration.tuning import Rule, tune_block
from compresso.calibration.walk import LiveBlock
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.gptq import relative_error
from compresso.models.adapter import ModelAdapter
from compresso.stages.quantize_parts import Linear

# How AutoRound moves from what another method rounded.
RULE: dict[str, Rule] = {"rtn": "sign", "gptq": "gradient"}


def tuned(
    adapter: ModelAdapter,
    source: Checkpoint,
    settings: Any,
    block: LiveBlock,
    states: tuple[States, States],
    linears: list[Linear],
) -> list[Linear]:
    """The same linears with trained roundings, in place in the block.

    states: what enters the block, and what left it in the original model.
    """
    start = time.perf_counter()
    weights = {linear.path: _weight(adapter, source, linear.name) for linear in linears}
    best = tune_block(
        adapter,
        states[0],
        block.index,
        {linear.path: (weights[linear.path], linear.codes) for linear in linears},  # type: ignore[misc]
        targets=states[1],
        symmetric=settings.symmetric,
        steps=settings.steps,
        sequences=settings.sequences,
        seed=settings.seed,
        rule=RULE[settings.start],
    )
    share = (time.perf_counter() - start) / len(linears)
    found = []
    for linear in linears:
        codes = best.packed[linear.path]
        dense = codes.decode().to(source.dtype)
        adapter.set_weight(block.module, linear.path, dense)
        row = {"linear": linear.name, "bits": linear.row["bits"]}
        row["weight_error"] = relative_error(weights[linear.path], dense)
        row |= {"block_error_before": best.before, "block_error": best.after}
        row["seconds"] = linear.row["seconds"] + share
        found.append(replace(linear, codes=codes, row=row))
    block.forget()
    return found


def _weight(adapter: ModelAdapter, source: Checkpoint, name: str) -> Tensor:
    """A linear's original weight, (out, in) float32."""
    weight = source.load_weights([f"{name}.weight"])[f"{name}.weight"]
    turned = weight.T if adapter.family.transposed else weight
    return turned.to(adapter.device, torch.float32)
