"""Quantize the linears of every block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.calibration.gram import GramSum
from compresso.calibration.opening import open_adapter
from compresso.calibration.probe import probe_tokens
from compresso.calibration.states import States
from compresso.calibration.walk import LiveBlock, enter_blocks, walk_blocks
from compresso.checkpoint import layout
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import NumericalError
from compresso.kernels.gptq import relative_error
from compresso.kernels.grid import Packed
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import empty_parameter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track, warn
from compresso.stages.quantize_plan import Plan, make_plan

RETRIES = 3
STEPS_OF_DAMPING = 10

Quantizer = Callable[..., Packed]


@torch.no_grad()
def quantize(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Replace each block's linear weights by codes.

    Blocks are quantized in order, and within a block the input groups, each calibrated on the
    outputs of what was quantized before it. A block is committed as soon as it is done; a
    restarted run takes the committed blocks from `target` and continues after them.

    Reports a row per linear: bits, squared error relative to the weight's, and for calibrated
    methods the relative output error on the calibration tokens and the damping used.

    Peak memory: one block's weights, one gram and its factor, and the hidden states of the
    calibration tokens up to the memory budget.
    """
    adapter = open_adapter(source, runtime)
    plan = make_plan(adapter, step.settings)
    work = _Work(adapter, source, step, plan)
    probe = probe_tokens(adapter.config.get_text_config().vocab_size)
    states = enter_blocks(
        adapter,
        source,
        calibration.batches if calibration else [],
        probe=probe,
        budget=runtime.max_memory,
        spill_dir=target.partial,
    )
    report = Report()

    def restore(index: int) -> dict[str, Tensor] | None:
        part = target.restore(index)
        return None if part is None else layout.to_dense(part[0], plan.scheme)

    blocks = walk_blocks(adapter, source, states, restore=restore)
    for block in track(blocks, adapter.count, f"quantize {step.method}"):
        if not block.restored:
            tensors, rows = work.quantize_block(block)
            target.commit(block.index, tensors, {"rows": rows})
            del tensors  # some of them keep a map of the source's shard
    outside, rows = work.quantize_outside(states)
    target.commit(adapter.count, outside, {"rows": rows})
    report.rows = [row for part in range(adapter.count + 1) for row in _measured(target, part)]
    report.config = work.config()
    report.expected = work.expected()
    report.carried = adapter.unmapped_tensors()
    report.fingerprint = Fingerprint(probe, work.logits(states))
    report.summary = _summary(report.rows, plan)
    return report


class _Work:
    """One quantize run: the things its steps share."""

    def __init__(self, adapter: ModelAdapter, source: Checkpoint, step: Step, plan: Plan) -> None:
        self.adapter = adapter
        self.source = source
        self.plan = plan
        self.quantizer: Quantizer = registry.load(registry.method("quantize", step.method).code)
        self.calibrated = registry.method("quantize", step.method).calibrated
        chosen = asdict(step.settings)
        self.pack = chosen.pop("pack")
        self.options = {k: v for k, v in chosen.items() if k not in ("ignore", "lm_head")}

    def quantize_block(self, block: LiveBlock) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The block's tensors to store, and a row per linear. Changes the block's weights."""
        prefix = self.adapter.block_prefix(block.index)
        tensors = self.source.load_weights(self.adapter.block_tensors(block.index))
        rows: list[dict[str, Any]] = []
        for paths in self.plan.groups[block.index]:
            gram = block.gram(paths) if self.calibrated else None
            for path in paths:  # their place is taken by the decoded ones
                empty_parameter(block.module, f"{path}.weight")
            stored, measured = self._quantize_group(
                [f"{prefix}{path}" for path in paths],
                [self._matrix(tensors.pop(f"{prefix}{path}.weight")) for path in paths],
                gram,
                [partial(self.adapter.set_weight, block.module, path) for path in paths],
            )
            del gram  # not to be there beside the next one
            tensors |= stored
            rows += [{"block": block.index, **row} for row in measured]
        return tensors, rows

    def _quantize_group(
        self,
        names: list[str],
        weights: list[Tensor],
        gram: Tensor | None,
        put: list[Callable[[Tensor], None]],
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Quantize linears that read the same input as one matrix of stacked rows.

        put: what takes each linear's decoded weight, (out, in). Empties `weights`.
        """
        start = time.perf_counter()
        sizes = [len(weight) for weight in weights]
        stacked = torch.empty(sum(sizes), weights[0].shape[1], device=self.adapter.device)
        for part in reversed(stacked.split(sizes)):
            part.copy_(weights.pop())
        packed, damping = self._round(stacked, gram, names)
        seconds = (time.perf_counter() - start) / len(stacked)
        tensors: dict[str, Tensor] = {}
        rows = []
        parts = zip(names, put, stacked.split(sizes), packed.split(sizes), strict=True)
        for name, put_decoded, weight, part in parts:
            # What later blocks see is what a reader of the checkpoint gets: the decoded weights
            # in the checkpoint's own type.
            decoded = part.decode().to(self.source.dtype)
            put_decoded(decoded)
            if self.pack:
                tensors |= layout.pack(
                    name, part, self.source.dtype, symmetric=self.plan.scheme.symmetric
                )
            else:
                tensors[f"{name}.weight"] = self._matrix(decoded).contiguous().cpu()
            row: dict[str, Any] = {"linear": name, "bits": self.plan.scheme.bits}
            row["weight_error"] = relative_error(weight, decoded)
            if gram is not None:
                row["output_error"] = relative_error(weight, decoded, gram)
                row["damping"] = damping
            row["seconds"] = seconds * len(weight)
            rows.append(row)
        return tensors, rows

    def _round(self, weight: Tensor, gram: Tensor | None, names: list[str]) -> tuple[Packed, float]:
        """Run the method, with ten times the damping where the gram needs it."""
        options = {**self.options, "scale_dtype": self.source.dtype}
        damping = options.get("damping", 0.0)
        for attempt in range(RETRIES + 1):
            if damping:
                options["damping"] = damping
            try:
                return self.quantizer(weight, gram, **options), damping
            except NumericalError as error:
                if attempt == RETRIES:
                    raise NumericalError(f"`{names[0]}`: {error}", hint=error.hint) from error
                damping *= STEPS_OF_DAMPING
                warn(f"`{names[0]}`: {error}; trying {damping:g}")
        raise AssertionError("the last attempt returns or raises")

    def _matrix(self, weight: Tensor) -> Tensor:
        """(out, in) from the stored orientation, or back."""
        return weight.T if self.adapter.family.transposed else weight

    def quantize_outside(self, states: States) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Everything that is in no block, unchanged but for the head where that was asked for."""
        adapter = self.adapter
        tensors = self.source.load(adapter.outside_tensors() + adapter.unmapped_tensors())
        if not self.plan.head:
            return tensors, []
        weight = self._matrix(tensors.pop(adapter.head_tensor))
        name = adapter.head_tensor.removesuffix(".weight")
        gram = self._head_gram(states) if self.calibrated else None
        stored, rows = self._quantize_group([name], [weight], gram, [adapter.set_head])
        return tensors | stored, rows

    def _head_gram(self, states: States) -> Tensor:
        total = GramSum(states.width, self.adapter.device)
        for batch in range(states.batches):
            total.add(self.adapter.head_input(self.source, states[batch]))
            states.release(batch)
        return total.mean()

    def logits(self, states: States) -> Tensor:
        """What the quantized model in memory says on the probe tokens."""
        assert states.probe is not None
        return self.adapter.logits(self.source, states.probe)

    def config(self) -> dict[str, Any]:
        """The source's config.json, saying how to read the packed weights."""
        if not self.pack:
            return self.source.config
        entry = layout.quantization_config(self.plan.scheme, ignore=self.plan.kept)
        return {**self.source.config, "quantization_config": entry}

    def expected(self) -> list[str]:
        """Names of all tensors the output holds: the source's, the quantized ones packed."""
        if not self.pack:
            return self.source.names()
        adapter, scheme = self.adapter, self.plan.scheme
        quantized = {
            f"{adapter.block_prefix(index)}{path}"
            for index, groups in enumerate(self.plan.groups)
            for paths in groups
            for path in paths
        }
        if self.plan.head:
            quantized.add(adapter.head_tensor.removesuffix(".weight"))
        names: list[str] = []
        for name in self.source.names():
            path = name.removesuffix(".weight")
            packed = path != name and path in quantized
            names += layout.packed_names(path, scheme) if packed else [name]
        return names


def _measured(target: CheckpointWriter, part: int) -> list[dict[str, Any]]:
    """The rows of a committed part."""
    committed = target.restore(part)
    assert committed is not None
    rows: list[dict[str, Any]] = committed[1]["rows"]
    return rows


def _summary(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """Means over linears, and what was left alone."""
    summary: dict[str, Any] = {"linears": len(rows), "kept_dense": plan.kept}
    for key in ("weight_error", "output_error"):
        if values := [row[key] for row in rows if key in row]:
            summary[f"mean_{key}"] = sum(values) / len(values)
    summary["most_damping"] = max((row.get("damping", 0.0) for row in rows), default=0.0)
    return summary
