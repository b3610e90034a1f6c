"""A whole model in memory whose units can be scaled, and what the scaling costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compresso.calibration.backward import head_gradient
from compresso.calibration.states import States
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.divergence import divergence
from compresso.kernels.gates import blend, scale
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import halves

Unit = Literal["block", "attention", "mlp", "sub-block"]


class GatedModel:
    """A whole model in memory whose units can be scaled. A context: leaving it frees the weights.

    costs: parameters in the linears of each gated unit, in execution order.
    """

    def __init__(self, adapter: ModelAdapter, source: Checkpoint, *, unit: Unit) -> None:
        """unit: what one gate scales."""
        self._adapter = adapter
        self._source = source
        self._unit = unit
        self._arguments = States(adapter, [], budget=0, spill_dir=None)  # holds no states itself
        self._gates: Tensor | None = None
        self.costs = [
            sum(adapter.weight(block, path).numel() for path in paths)
            for block in adapter.blocks
            for paths in self._linears()
        ]
        self._handles: list[Any] = []

    def __enter__(self) -> GatedModel:
        for index in range(self._adapter.count):
            self._adapter.load_block(index, self._source)
        if self._unit != "block":
            self._hook_halves()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for index in range(self._adapter.count):
            self._adapter.unload_block(index)
        self._adapter.unload_outside()

    def forward(self, tokens: Tensor, gates: Tensor | None) -> Tensor:
        """What the last block returns, (B, T, d).

        tokens: ids, (B, T) int64.
        gates:  (gates,) float32; None for the model as it is, exactly what gates of 1 give.
        """
        self._gates = gates
        hidden = self._arguments.enter(self._source, tokens)
        for index, block in enumerate(self._adapter.blocks):
            arguments = self._arguments.arguments(index, hidden)
            output = block(hidden, *arguments.positional, **arguments.named)
            if gates is not None and self._unit == "block":
                output = blend(hidden, output, gates[index])
            hidden = output
        self._gates = None
        return hidden

    def gradient(self, tokens: Tensor, gates: Tensor, original: Tensor) -> tuple[float, Tensor]:
        """Mean KL(original || gated) over all positions, in nats, and its gradient at the gates.

        tokens:   ids, (B, T) int64.
        gates:    (gates,) float32. Not modified; the gradient has its shape.
        original: what the last block returns without gates, (B, T, d).
        """
        adapter, source = self._adapter, self._source

        def score(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                expected = adapter.logits(source, original[:, part])
            return divergence(expected, logits).sum() / tokens.numel()

        with torch.enable_grad():
            leaf = gates.detach().to(adapter.device).requires_grad_()
            hidden = self.forward(tokens, leaf)
            lost, slope = head_gradient(adapter, source, hidden.detach(), score)
            (gradient,) = torch.autograd.grad(hidden, leaf, slope.to(hidden.dtype))
        return lost, gradient.to(gates.device)

    def _linears(self) -> Iterator[tuple[str, ...]]:
        """The linears of every gated unit of a block."""
        attention, mlp = (half.linears for half in halves(self._adapter.family))
        if self._unit == "block":
            yield attention + mlp
            return
        if self._unit != "mlp":
            yield attention
        if self._unit != "attention":
            yield mlp

    def _hook_halves(self) -> None:
        family = self._adapter.family
        outputs = {"attention": family.attention_output, "mlp": family.mlp_output}
        chosen = outputs.values() if self._unit == "sub-block" else [outputs[self._unit]]
        places = [block.get_submodule(path) for block in self._adapter.blocks for path in chosen]
        for number, module in enumerate(places):
            self._handles.append(module.register_forward_hook(self._gate(number)))

    def _gate(self, number: int) -> Callable[..., Any]:
        """A hook that scales the output of a module, or its first, by a gate."""

        def hook(_: nn.Module, __: object, output: Any) -> Any:
            if self._gates is None:
                return None
            if isinstance(output, tuple):
                return (scale(output[0], self._gates[number]), *output[1:])
            return scale(output, self._gates[number])

        return hook
