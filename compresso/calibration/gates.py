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
- No term pulls a gate to 0 or 1: the mean over independent draws is linear in each chance, so
  within the budget it is least where no gate, or a single one, is undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compresso.calibration.gated_model import GatedModel, Unit
from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import NumericalError, ResourceError
from compresso.kernels.gates import draw_noise, open_probability, sample_gates, within_budget
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, format_bytes, free_memory, track

ROWS = 8  # sequences per step, each with its own draw of all gates, in pairs
RECORDS = 20  # in the history
BETAS = (0.9, 0.99)  # of Adam: gradients of random gates are noisy and small steps are many
# float32 numbers that a block keeps for the way back, per token, in widths of the residual stream
# and of what is inside the MLP: the most that any family was seen to keep (gemma2).
KEPT_WIDTHS = 12
KEPT_INNER = 4
FLOAT32_BYTES = 4


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
    recall: Callable[[], dict[str, Any] | None] = lambda: None,
    remember: Callable[[dict[str, Any]], None] = lambda _: None,
) -> GateResult:
    """Learn which units are least needed when `remove_share` of them is gone.

    batches:      token ids, (B, T) int64 each; every step takes 8 sequences at random.
    unit:         what one gate scales: a block, or attention, or MLP, or each of the two.
    remove_share: of the parameters in the linears of all gated units, strictly between 0 and 1.
    rate:         learning rate of Adam on the gates' logits.
    recall:       the state that an earlier run of these settings remembered last, if any.
    remember:     told the state after every step: plain values, to go on from.

    Holds the whole model, and what one sequence leaves behind in all blocks. The same seed gives
    the same gates on the same machine, also when training was interrupted. Takes minutes.

    The model must have all its sub-blocks. Raises ResourceError if memory is too small,
    NumericalError if the loss is not finite.
    """
    adapter = open_adapter(source, runtime)
    spare = _spare_memory(adapter, source, max(batch.shape[1] for batch in batches))
    memory = min(spare, runtime.max_memory)
    rows = [row for batch in batches for row in batch.split(1)]
    with GatedModel(adapter, source, unit=unit) as model:
        training = _Training(model, rows, rate=rate, seed=seed, memory=memory)
        state = recall() or {"step": 0, "history": []}
        history = [GateRecord(**record) for record in state["history"]]
        if state["step"]:
            training.restore(state["training"])
        every = max(1, steps // RECORDS)
        ahead = range(state["step"] + 1, steps + 1)
        for step in track(ahead, len(ahead), "train gates"):
            removed = remove_share * min(1.0, 2 * step / steps)
            loss = training.step(removed)
            if step % every == 0 or step == steps:
                history.append(GateRecord(step, removed, loss, training.gates(removed)))
            records = [asdict(record) for record in history]
            remember({"step": step, "history": records, "training": training.state()})
        return GateResult(history[-1].gates, model.costs, history)


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

    def state(self) -> dict[str, Any]:
        """All that changes from step to step, in plain values."""
        adam = self._optimizer.state[self._logits]
        return {
            "logits": self._logits.tolist(),
            "adam": {name: value.tolist() for name, value in adam.items()},
            "random": self._generator.get_state().numpy().tobytes().hex(),
            "order": self._order,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._logits.data.copy_(torch.tensor(state["logits"]))
        self._optimizer.state[self._logits] = {
            name: torch.tensor(value) for name, value in state["adam"].items()
        }
        drawn = torch.frombuffer(bytearray.fromhex(state["random"]), dtype=torch.uint8)
        self._generator.set_state(drawn)
        self._order = list(state["order"])

    def step(self, removed: float) -> float:
        """Draw gates for some sequences and move the logits; the loss."""
        noise = draw_noise(ROWS // 2, len(self._logits), self._generator)
        with torch.enable_grad():
            gates = sample_gates(self._moved(self._logits, removed), noise)
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
