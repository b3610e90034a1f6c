"""Which units of a model can go together, learned by gates: the weights stay as they are.

After FoldGPT (arXiv:2407.00928), whose abstract says no more than that gates on blocks are trained
with frozen weights, towards 0 or 1, within a budget. The design is ours:

- A gate scales what a unit adds to the residual stream. It is drawn anew for every sequence, often
  exactly 0 or 1, and the chance to be open is learned (hard concrete gates).
- What is lost is log(1 + KL(original || gated)) of a sequence, so that draws which close a unit
  that nothing works without do not drown what the others say.
- The expected share of parameters that gates close is exactly the budget in every step: all
  logits move together, so no penalty has to be weighed against the loss. It grows from nothing
  to all of `remove_share` during the first half of the steps.
- No term pulls a gate to 0 or 1: with independent draws the loss is least where no gate is
  undecided, as far as the budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compresso.calibration.backward import head_gradient
from compresso.calibration.states import States
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import NumericalError, ResourceError
from compresso.kernels.divergence import divergence
from compresso.kernels.gates import blend, open_probability, sample_gates, scale, within_budget
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, format_bytes, free_memory, track

ROWS = 8  # sequences per step: pairs of opposite noise
RECORDS = 20  # in the history
BETAS = (0.9, 0.99)  # of Adam: gradients of random gates are noisy and small steps are many
# float32 numbers that a block keeps for the way back, per token, in widths of the residual stream
# and of what is inside the MLP: the most that any family was seen to keep (gemma2).
KEPT_WIDTHS = 12
KEPT_INNER = 4
FLOAT32_BYTES = 4

Unit = Literal["block", "attention", "mlp", "sub-block"]


@dataclass(frozen=True)
class GateRecord:
    """Where training was.

    step:  steps done. removed: the share of the gated parameters that gates closed, expected.
    loss:  mean KL(original || gated) of the step's sequences, in nats per token.
    gates: the chance of each to be open.
    """

    step: int
    removed: float
    loss: float
    gates: list[float]


@dataclass(frozen=True)
class GateResult:
    """What training found.

    gates:   the chance of each unit to be kept, in execution order; remove the lowest first.
    costs:   parameters in the linears of each unit, which the budget counts.
    history: from the first step to the last.
    """

    gates: list[float]
    costs: list[int]
    history: list[GateRecord]


def train_gates(
    source: Checkpoint,
    batches: list[Tensor],
    *,
    unit: Unit,
    remove_share: float,
    steps: int,
    rate: float,
    seed: int,
    runtime: Runtime,
) -> GateResult:
    """Learn which units are least needed when `remove_share` of them is gone.

    batches:      token ids, (B, T) int64 each; every step takes 8 sequences at random.
    unit:         what one gate scales: a block, or attention, or MLP, or each of the two.
    remove_share: of the parameters in the linears of all gated units, strictly between 0 and 1.
    rate:         learning rate of Adam on the gates' logits.

    Holds the whole model, and what one sequence leaves behind in all blocks. The same seed gives
    the same gates on the same machine. Takes minutes, and starts over when interrupted.

    Raises ResourceError if memory is too small, NumericalError if the loss is not finite.
    """
    adapter = ModelAdapter.open(
        source,
        dtype=runtime.compute_dtype(source.dtype),
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    spare = _spare_memory(adapter, source, max(batch.shape[1] for batch in batches))
    memory = min(spare, runtime.max_memory)
    rows = [row for batch in batches for row in batch.split(1)]
    with GatedModel(adapter, source, unit=unit) as model:
        training = _Training(model, rows, rate=rate, seed=seed, memory=memory)
        every = max(1, steps // RECORDS)
        history = []
        for step in track(range(1, steps + 1), steps, "train gates"):
            removed = remove_share * min(1.0, 2 * step / steps)
            loss = training.step(removed)
            if step % every == 0 or step == steps:
                history.append(GateRecord(step, removed, loss, training.gates(removed)))
        return GateResult(history[-1].gates, model.costs, history)


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

    def _linears(self) -> Iterator[list[str]]:
        """The linears of every gated unit of a block."""
        groups = self._adapter.family.linears
        attention, mlp = (
            [path for group in half for path in group] for half in (groups[:2], groups[2:])
        )
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

    def _gate(self, number: int) -> Any:
        """A hook that scales the output of a module, or its first, by a gate."""

        def hook(_: nn.Module, __: object, output: Any) -> Any:
            if self._gates is None:
                return None
            if isinstance(output, tuple):
                return (scale(output[0], self._gates[number]), *output[1:])
            return scale(output, self._gates[number])

        return hook


class _Training:
    """The logits of all gates, and how they are moved."""

    def __init__(
        self, model: GatedModel, rows: list[Tensor], *, rate: float, seed: int, memory: int
    ) -> None:
        self._model = model
        self._rows = rows
        self._logits = torch.zeros(len(model.costs), requires_grad=True)
        self._optimizer = torch.optim.Adam([self._logits], lr=rate, betas=BETAS)
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        self._memory = memory
        self._originals: dict[int, Tensor] = {}

    def gates(self, removed: float) -> list[float]:
        """The chance of each to be open when that share is removed."""
        logits = self._logits.detach().double()
        kept: list[float] = open_probability(self._moved(logits, removed)).tolist()
        return kept

    def step(self, removed: float) -> float:
        """Draw gates for some sequences and move the logits; the loss."""
        noise = torch.rand(ROWS // 2, len(self._logits), generator=self._generator)
        noise = noise.clamp(1e-6, 1 - 1e-6)
        with torch.enable_grad():
            logits = self._moved(self._logits, removed)
            gates = sample_gates(logits, torch.cat([noise, 1 - noise]))
        found = [self._lost(self._next_row(), row) for row in gates.detach()]
        slopes = [gradient / (1 + lost) for lost, gradient in found]  # of log(1 + lost)
        self._optimizer.zero_grad()
        gates.backward(torch.stack(slopes) / ROWS)
        self._optimizer.step()
        return sum(lost for lost, _ in found) / ROWS

    def _moved(self, logits: Tensor, removed: float) -> Tensor:
        return within_budget(logits, self._model.costs, kept=1 - removed)

    def _lost(self, number: int, gates: Tensor) -> tuple[float, Tensor]:
        tokens = self._rows[number]
        lost, gradient = self._model.gradient(tokens, gates, self._original(number))
        if not bool(torch.isfinite(gradient).all()):
            raise NumericalError(
                "the gradient of the gates is not finite",
                hint="the model overflows here: run it in `--dtype float32`",
            )
        return lost, gradient

    @torch.no_grad()
    def _original(self, number: int) -> Tensor:
        """What the last block makes of a sequence without gates; kept while there is room."""
        found = self._originals.get(number)
        if found is None:
            found = self._model.forward(self._rows[number], None)
            if found.nbytes <= self._memory:
                self._memory -= found.nbytes
                self._originals[number] = found
        return found

    def _next_row(self) -> int:
        if not self._order:
            self._order = torch.randperm(len(self._rows), generator=self._generator).tolist()
        return self._order.pop()


def _spare_memory(adapter: ModelAdapter, source: Checkpoint, length: int) -> int:
    """Bytes left beside the model and what one sequence of `length` tokens leaves in it.

    Raises ResourceError if there are none.
    """
    last = adapter.family.linears[3][0]
    inner = adapter.weight(adapter.blocks[0], last).shape[1]
    per_token = KEPT_WIDTHS * int(adapter.config.hidden_size) + KEPT_INNER * inner
    weights = source.parameters * adapter.dtype.itemsize
    needed = weights + FLOAT32_BYTES * per_token * adapter.count * length
    if adapter.device.type == "cuda":
        free = torch.cuda.mem_get_info(adapter.device)[0]
    else:
        free = free_memory()
    if needed > free:
        raise ResourceError(
            f"training gates takes the whole model in memory, about {format_bytes(needed)}, but"
            f" {format_bytes(free)} are free",
            hint="use a method that goes block by block, such as `blockpruner`",
        )
    return free - needed
