"""What training a whole model takes in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ResourceError
from compresso.models.adapter import ModelAdapter
from compresso.runtime import format_bytes
from compresso.stages.heal_choice import Trained
from compresso.training.objectives import LOGITS_BYTES
from compresso.training.processes import free_for_each

# Numbers that a block keeps for the way back, per token, in widths of the residual stream and of
# what is inside the MLP: the most that any family was seen to keep (gemma2).
KEPT_WIDTHS = 12
KEPT_INNER = 4
# Bytes per trained weight: itself, its gradient, two moments and the best state, in float32; and
# of one that does not move for now: itself and the best state.
TRAINED_BYTES = 20
RESTING_BYTES = 8
LOGITS_COPIES = 6


@dataclass(frozen=True)
class Load:
    """What is run at once.

    rank: of corrections. packed: codes stay codes. processes: that train; on a CPU they share its
    memory. sharded: they split what is trained. instead: what takes less memory, if anything does.
    """

    sequences: int
    length: int
    rank: int
    packed: bool
    processes: int = 1
    sharded: bool = False
    instead: str = ""


def decide_checkpointing(
    adapter: ModelAdapter, source: Checkpoint, trained: Trained, load: Load, asked: str
) -> bool:
    """Whether blocks are to be run again on the way back.

    asked: "on", "off", or "auto" for where memory is short without.

    Raises ResourceError, naming what is needed, if memory is too small.
    """
    free = free_for_each(adapter.device, load.processes)
    whole, less = (needed(adapter, source, trained, load, again=again) for again in (False, True))
    again = asked == "on" or (asked == "auto" and whole > free)
    least = less if again else whole
    if least > free:
        raise ResourceError(
            f"training takes the whole model in memory, about {format_bytes(least)}, but"
            f" {format_bytes(free)} are free",
            hint=_hint(again, load),
        )
    return again


def needed(
    adapter: ModelAdapter, source: Checkpoint, trained: Trained, load: Load, *, again: bool
) -> int:
    """Bytes that training holds at once, about. again: blocks are run again on the way back."""
    itemsize = adapter.dtype.itemsize
    packed = set(source.packing.shapes) if load.packed else set()
    weights = 0
    for name in dict.fromkeys(adapter.stored.values()):
        info = source.weight_info(name)
        if name.removesuffix(".weight") in packed:
            weights += info.nbytes
        else:
            weights += prod(info.shape) * itemsize
    # Of what is split, gradients of all of it are taken, whatever moves.
    rest = 0 if load.sharded else trained.parameters(source) - trained.at_once(source)
    moving = trained.parameters(source) - rest + corrections(source, trained, load.rank)
    moving //= load.processes if load.sharded else 1
    tokens = load.sequences * load.length
    width, inner = int(adapter.config.hidden_size), _inner(adapter)
    kept = itemsize * (KEPT_WIDTHS * width + KEPT_INNER * inner) * tokens
    activations = kept * adapter.count
    if again:
        activations = kept + itemsize * width * tokens * adapter.count
    logits = 4 * tokens * int(adapter.config.get_text_config().vocab_size)
    trains = TRAINED_BYTES * moving + RESTING_BYTES * rest
    return weights + trains + activations + LOGITS_COPIES * min(logits, LOGITS_BYTES)


def corrections(source: Checkpoint, trained: Trained, rank: int) -> int:
    """How many weights corrections of a rank have."""
    shapes = [source.weight_info(f"{path}.weight").shape for path in trained.linears]
    return rank * sum(map(sum, shapes))


def _inner(adapter: ModelAdapter) -> int:
    path = f".{adapter.family.linears[3][0]}.weight"
    name = next((name for name in adapter.stored if name.endswith(path)), None)
    if name is None:
        return int(adapter.config.hidden_size)
    return max(adapter.model.get_parameter(name).shape)


def _hint(again: bool, load: Load) -> str:
    if not again:
        return "pass `--checkpointing auto`, or `--batch-size 1`"
    ways = ["`--batch-size 1`"] if load.sequences > 1 else []
    return "pass " + ", or ".join([*ways, "a smaller `--seqlen`", *filter(None, [load.instead])])
