"""Move parameters of a whole model against the gradient of an objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import exp, inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from compresso.checkpoint.kept import KeptState
from compresso.errors import NumericalError, ResourceError
from compresso.runtime import log, track
from compresso.training.model import TrainingModel
from compresso.training.optimizer import Optimizer
from compresso.training.options import NEXT_TOKEN, History, Objective, Store, TrainOptions
from compresso.training.order import rows_of_step
from compresso.training.processes import ALONE, Processes, gathered, like
from compresso.training.share import Share

__all__ = ["History", "Objective", "Store", "TrainOptions", "train"]

STATE = "training"
SECONDS_BETWEEN_SAVES = 60.0
SECONDS_OF_A_SAVE = 3.0  # that it may take then: a twentieth
DISK_BYTES_PER_SECOND = 500e6  # of a slow disk, until a save was measured

Choose = Callable[[int], Sequence[int]]


def steps_kept(store: KeptState) -> int:
    """The steps after which the state of a run was kept last; 0 if none was."""
    values = store.values(STATE)
    return 0 if values is None else sum(1 for row in values["history"]["rows"] if row["step"])


def train(
    model: TrainingModel,
    parameters: Sequence[nn.Parameter],
    objective: Objective,
    data: Tensor,
    heldout: Tensor,
    options: TrainOptions,
    *,
    store: Store | None = None,
    choose: Choose | None = None,
    processes: Processes = ALONE,
    title: str = "train",
) -> History:
    """Train, and leave the model in the state in which its held-out loss was least.

    parameters: those to move, float32. data: sequences to learn from, (N, T) int64. heldout: others
                to judge by, (M, T) int64.
    store:      where the state is kept, to go on from after a kill; on a CPU the result is the same
                to the bit.
    choose:     which of the parameters, by number, a step moves, from 0; all of them if None. Those
                that the step before did not move begin without what the optimizer remembers.
    processes:  that train together, all of which call this with the same arguments. However many
                they are, the loss is the same to rounding; not with dropout, which each draws.
    title:      what progress is shown under.

    Raises NumericalError if the loss or a gradient is not finite. The best state is kept then; the
    next run with the same store ends with it, if it is not the one at the start.
    """
    share = Share(model, parameters, objective, options, processes)
    training = _Training(share, data, heldout, options)
    training.choose = choose
    with torch.random.fork_rng(), torch.enable_grad():
        return training.run(store, title)


class _Training:
    """One training run."""

    def __init__(self, share: Share, data: Tensor, heldout: Tensor, options: TrainOptions) -> None:
        self._share = share
        self._sequences = torch.cat((data, heldout))
        self._available = len(data)
        self._options = options
        self._optimizer = Optimizer(share.parameters, options)
        self._history = History()
        self._best = self._copy()
        self._stale = 0  # measurements since the best one
        self._whole = True  # what is kept would be of the end of a step
        self._begun = time.monotonic()
        self._saved, self._took = time.monotonic(), 0.0  # when, and the seconds that it took
        self.choose: Choose | None = None

    def run(self, store: Store | None, title: str) -> History:
        """Train from where the store says, or from the start."""
        history = self._history
        kept = store.kept(STATE) if store is not None else None
        if kept is not None:
            self._restore(*kept)
        begun = len(self._steps())
        if not begun or self._was_stopped_measuring(begun):
            self._evaluate(begun, title)
        ahead = range(begun, self._options.steps) if history.ended == "all steps" else range(0)
        try:
            self._go_on(ahead, store, title)
        except KeyboardInterrupt:
            self._keep_at_once(store)
            raise
        if history.ended == "diverged" and (kept is None or len(ahead) or not history.best_step):
            raise _diverged(history, len(self._steps()))
        self._put(self._best)
        return history

    def _go_on(self, ahead: range, store: Store | None, title: str) -> None:
        """Make these steps, or as many as it takes."""
        history = self._history
        for step in track(ahead, len(ahead), title):
            self._step(step)
            if self._due(step + 1) and history.ended == "all steps":
                self._evaluate(step + 1, title)
            last, stop = step + 1 == self._options.steps, history.ended != "all steps"
            late = self._share.processes.agree(self._late())
            if store is not None and (last or stop or late):
                self._keep(store)
            if stop:
                break

    def _late(self) -> bool:
        """Whether it is time for a save."""
        return time.monotonic() - self._saved > pause_after(self._took)

    def _due(self, step: int) -> bool:
        """Whether held-out text is measured after so many steps."""
        return step == self._options.steps or step % self._options.evaluate_every == 0

    def _was_stopped_measuring(self, step: int) -> bool:
        """Whether the state was kept when held-out text should have been measured, and was not."""
        going = self._history.ended == "all steps"
        return going and self._due(step) and "heldout_loss" not in self._history.rows[-1]

    def _keep_at_once(self, store: Store | None) -> None:
        """Store the state of a run that is told to stop, if that is quick and the state is whole.

        Nothing is put together then: the other processes may be anywhere.
        """
        alone = not self._share.processes.sharded
        size = sum(tensor.nbytes for _, tensor in self._tensors())
        quick = (self._took or size / DISK_BYTES_PER_SECOND) <= SECONDS_OF_A_SAVE
        if store is not None and alone and quick and self._whole and self._steps():
            with suppress(ResourceError):  # what was kept before stays
                self._keep(store)

    def _steps(self) -> list[dict[str, float]]:
        """The rows of all steps so far."""
        return [row for row in self._history.rows if row["step"]]

    def _step(self, step: int) -> None:
        """Move the parameters once, unless a number is not finite."""
        options, history, started = self._options, self._history, time.perf_counter()
        moved = self._choose(step)
        rows = rows_of_step(
            step, sequences=options.sequences, available=self._available, seed=options.seed
        )
        self._share.model.training(True)
        found = self._share.measure(self._sequences, rows, step, backward=True)
        self._share.model.training(False)
        self._share.add_gradients(moved)
        gradient = self._optimizer.clip(moved)
        self._whole = False
        if isfinite(found["loss"]) and isfinite(gradient):
            self._optimizer.move(moved, options.rate_at(step))
        else:
            history.ended = "diverged"
        history.seconds += time.perf_counter() - started
        history.tokens += options.sequences * self._sequences.shape[1]
        row = {"step": step + 1, "tokens": history.tokens, **found}
        history.rows.append(row | {"rate": options.rate_at(step), "gradient": gradient})
        self._whole = True

    def _choose(self, step: int) -> list[int]:
        """The parameters that a step moves; the optimizer forgets about the others."""
        everything = list(range(len(self._share.parameters)))
        if self.choose is None:
            return everything
        moved = list(self.choose(step))
        resting = sorted({*everything} - {*moved})
        self._optimizer.forget(resting)
        self._share.only(moved)
        return moved

    def _evaluate(self, step: int, title: str) -> None:
        """Measure the held-out loss, and keep the state if it is the best."""
        rows = list(range(self._available, len(self._sequences)))
        with torch.no_grad():
            found = self._share.measure(self._sequences, rows, step, backward=False)
        history, self._whole = self._history, False
        measured = {f"heldout_{name}": value for name, value in found.items()}
        if NEXT_TOKEN in found:
            measured["heldout_ppl"] = exp(min(found[NEXT_TOKEN], 700.0))
        if not history.rows or history.rows[-1]["step"] != step:
            history.rows.append({"step": step, "tokens": history.tokens})
        history.rows[-1] |= measured
        best = history.heldout(history.best_step)["heldout_loss"] if step else inf
        if not isfinite(found["loss"]):
            history.ended = "diverged"
        elif found["loss"] < best:
            history.best_step, self._stale = step, 0
            self._best = self._copy()
        else:
            self._stale += 1
            if self._options.patience and self._stale >= self._options.patience:
                history.ended = "no further gain"
        self._whole = True
        log(_line(title, history))

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._share.parameters]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._share.parameters, values, strict=True):
            parameter.copy_(value)

    def _keep(self, store: Store) -> None:
        """Store all that changes from step to step. All processes have to ask, if it is split."""
        started = time.monotonic()
        self._history.elapsed = self._history.earlier + started - self._begun
        history = {name: getattr(self._history, name) for name in vars(self._history)}
        values = {"moves": self._optimizer.moves(), "stale": self._stale, "history": history}
        tensors = gathered(self._tensors(), first=self._share.processes.first)
        store.keep(STATE, tensors, values)
        self._saved = time.monotonic()
        self._took = self._saved - started

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, parameter in enumerate(self._share.parameters):
            yield f"value.{number}", parameter.detach()
            yield f"best.{number}", self._best[number]
        yield from self._optimizer.moments()

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        for number, parameter in enumerate(self._share.parameters):
            with torch.no_grad():
                parameter.copy_(like(parameter, tensors[f"value.{number}"]))
            self._best[number] = like(parameter, tensors[f"best.{number}"])
        self._optimizer.restore(tensors, values["moves"])
        self._stale = values["stale"]
        for name, value in values["history"].items():
            setattr(self._history, name, value)
        self._history.earlier = self._history.elapsed


def pause_after(seconds: float) -> float:
    """Seconds until the next save, where one takes so many: at most a twentieth goes into saves."""
    return SECONDS_BETWEEN_SAVES * max(1.0, seconds / SECONDS_OF_A_SAVE)


def _line(title: str, history: History) -> str:
    """What is said of the last measurement."""
    row, first = history.rows[-1], history.rows[0]
    said = [f"loss {row['loss']:.4f}"] if "loss" in row else []
    said.append(f"held out {row['heldout_loss']:.4f}")
    if "heldout_ppl" in row:
        before = "" if row is first else f" (at first {first['heldout_ppl']:.4g})"
        said.append(f"perplexity {row['heldout_ppl']:.4g}{before}")
    if history.seconds:
        said.append(f"{history.tokens_per_second:,.0f} tokens/s")
    return f"{title}: after step {row['step']}: {', '.join(said)}"


def _diverged(history: History, steps: int) -> NumericalError:
    if not steps:
        return NumericalError(
            "the loss is not finite before the first step: the model itself, or its original,"
            " gives no numbers for this text",
            hint="measure it with `compresso eval`; `--dtype float32` helps where numbers overflow",
        )
    lower = "a lower `--rate` and `--fresh`"  # which lets go of the state that is kept
    if not history.best_step:
        return NumericalError(f"the loss is not finite at step {steps}", hint=f"use {lower}")
    return NumericalError(
        f"the loss is not finite at step {steps}; the state after step {history.best_step}, the"
        " best, is kept",
        hint=f"run the same command again to write that, or use {lower}",
    )
