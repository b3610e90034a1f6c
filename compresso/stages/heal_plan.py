"""How a heal run trains, decided and checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from compresso.calibration.opening import open_adapter
from compresso.checkpoint.changed import ChangedCheckpoint
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.recipe import Step
from compresso.runtime import Runtime
from compresso.stages.heal_choice import Trained, trained
from compresso.stages.heal_memory import Load, decide_checkpointing, needed
from compresso.stages.heal_text import Text
from compresso.stages.whole_model import training_dtype
from compresso.training.options import TrainOptions
from compresso.training.processes import Processes

# Largest learning rates at a width of 256, where the user names none: those with which a pruned
# model healed best in a few hundred steps. They fall as the width grows, so that they come to those
# that are usual: at 4096, 2e-4 for corrections (arXiv:2305.14314) and 3e-5 for weights.
RATES = {"lora": 3e-3, "qlora": 3e-3, "norms": 1e-2}
RATE_OF_WEIGHTS = 5e-4
RATES_ARE_FOR = 256
WORTH_COMPILING = 200  # steps


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    source:  what is trained: the source without the corrections beside it, which are trained on.
    adapter: its model, without weights. packed: codes stay codes in memory.
    memory:  bytes that it holds at once, about, in every process.
    """

    source: Checkpoint
    adapter: ModelAdapter
    moved: Trained
    options: TrainOptions
    packed: bool
    memory: int


def make_plan(
    source: Checkpoint, step: Step, text: Text, runtime: Runtime, processes: Processes
) -> Plan:
    """How a step trains.

    Raises ConfigError if its method cannot train this model, or cannot store what comes of it;
    ResourceError if memory is too small.
    """
    settings: Any = step.settings
    _check(source, step)
    base = ChangedCheckpoint(source) if source.adapter is not None else source
    adapter = open_adapter(base, runtime, dtype=training_dtype(source, runtime))
    moved = trained(adapter, source, step)
    length = text.data.shape[1]
    steps = settings.steps_of(length)
    load = Load(
        sequences=min(text.micro, settings.sequences),
        length=length,
        rank=getattr(settings, "rank", 0),
        packed=step.method == "qlora",
        processes=processes.count,
        sharded=processes.sharded,
        instead="" if step.method == "qlora" else "`--method qlora` on quantized weights",
    )
    options = TrainOptions(
        steps=steps,
        sequences=settings.sequences,
        micro=load.sequences,
        rate=settings.rate or _rate(step.method, adapter),
        warmup=ceil(settings.warmup * steps),
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        evaluate_every=settings.evaluate_every,
        patience=settings.patience,
        seed=settings.seed,
        checkpointing=decide_checkpointing(adapter, source, moved, load, settings.checkpointing),
        compile=_compiles(settings.compile, adapter, steps, packed=load.packed),
    )
    memory = needed(adapter, source, moved, load, again=options.checkpointing)
    return Plan(base, adapter, moved, options, load.packed, memory)


def _check(source: Checkpoint, step: Step) -> None:
    settings: Any = step.settings
    if step.method == "qlora" and not source.packed:
        raise ConfigError(
            f"`qlora` trains beside codes, but the weights of `{source.path}` are dense",
            hint="quantize first, or use `--method lora`",
        )
    if getattr(settings, "merge", None) and source.packed:
        raise ConfigError(
            f"corrections cannot be merged into the codes of `{source.path}`",
            hint="leave out `--merge`: they become an adapter",
        )


def _rate(method: str, adapter: ModelAdapter) -> float:
    """The largest learning rate that suits what a method trains."""
    return RATES.get(method, RATE_OF_WEIGHTS) * RATES_ARE_FOR / int(adapter.config.hidden_size)


def _compiles(asked: str, adapter: ModelAdapter, steps: int, *, packed: bool) -> bool:
    """Whether blocks are compiled.

    "auto" does so on a GPU, for as many steps as make up for the minutes it takes. On a CPU it was
    measured to gain 5 % for corrections and nothing for weights. Codes are decoded by code that
    the compiler cannot follow.
    """
    if asked != "auto":
        return asked == "on"
    return adapter.device.type == "cuda" and steps >= WORTH_COMPILING and not packed
