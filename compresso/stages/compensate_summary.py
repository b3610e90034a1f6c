"""What trained corrections came to, in numbers."""

from __future__ import annotations

from math import log
from typing import Any

from compresso.checkpoint.reader import Checkpoint
from compresso.stages.heal_output import Output
from compresso.training.model import TrainingModel
from compresso.training.options import History, TrainOptions


def told(
    history: History, model: TrainingModel, options: TrainOptions, sequences: int
) -> dict[str, Any]:
    """What training came to."""
    steps = len([row for row in history.rows if row["step"]])
    found: dict[str, Any] = {}
    if ranks := model.ranks().values():
        found |= {"linears": len(ranks), "least_rank": min(ranks), "most_rank": max(ranks)}
    return found | {
        "rate": options.rate,
        "trained_parameters": model.trained_parameters(),
        "steps": steps,
        "tokens_seen": history.tokens,
        "epochs": steps * options.sequences / sequences,
        "best_step": history.best_step,
        "ended": history.ended,
        "tokens_per_second": history.tokens_per_second,
    }


def recovered(original: float, before: float, after: float) -> dict[str, float]:
    """Perplexities of the held-out sequences, and the share of what was lost that came back."""
    found = {"ppl_original": original, "ppl_before": before, "ppl_after": after}
    if before > original:
        found["recovered"] = log(before / after) / log(before / original)
    return found


def no_gain(history: History, before: float, after: float) -> list[str]:
    """What to warn of where training gained nothing.

    before: perplexity of the source on the held-out sequences. after: of what is written.
    """
    found = []
    if not history.best_step:
        found.append("training never lowered the held-out loss: corrections are as they began")
    if after > before:
        found.append(
            f"on held-out text the result is worse than its source: perplexity {after:.4g},"
            f" and {before:.4g} before"
        )
    return found


def sizes(source: Checkpoint, output: Output) -> dict[str, int]:
    """Stored bytes of the source, and what its adapter adds to these, or to an adapter it had."""
    size = source.dtype.itemsize
    factors = (output.factors or {}).values()
    added = sum(size * (one.up.numel() + one.down.numel()) for one in factors)
    had = source.adapter.nbytes if source.adapter is not None else 0
    return {"bytes_before": source.stored_bytes, "bytes_added": added - had}
