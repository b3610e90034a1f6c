"""How training went, as a table, and as a picture, for which it needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresso.errors import ResourceError
from compresso.report import TRAINING_PICTURE, TRAINING_TABLE, rows_to_csv
from compresso.training.options import History


def write_training(
    history: History, directory: Path, *, original: float | None, title: str, draws: bool
) -> dict[str, str]:
    """Write the table of all steps, and the picture if asked; what was written -> file name.

    original: as for `draw_training`. Raises ResourceError if the disk is full or read-only.
    """
    files = {"training": TRAINING_TABLE}
    try:
        (directory / TRAINING_TABLE).write_text(rows_to_csv(history.rows), encoding="utf-8")
        if draws:
            draw_training(history, directory / TRAINING_PICTURE, original=original, title=title)
            files["plot"] = TRAINING_PICTURE
    except OSError as error:
        raise ResourceError(
            f"cannot write `{directory / TRAINING_TABLE}`: {error.strerror}",
            hint="make room, or give access, and run the same command again",
        ) from error
    return files


def draw_training(history: History, path: Path, *, original: float | None, title: str) -> None:
    """Write loss and held-out perplexity against the tokens seen as a .png.

    original: perplexity of the original on the held-out text, if it is known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels: Any = figure.subplots(2, 1, sharex=True)
    loss, perplexity = panels
    steps = [row for row in history.rows if "loss" in row]
    held = [row for row in history.rows if "heldout_loss" in row]
    loss.plot([row["tokens"] for row in steps], [row["loss"] for row in steps], lw=1, alpha=0.6)
    loss.plot(
        [row["tokens"] for row in held],
        [row["heldout_loss"] for row in held],
        "o-",
        label="held out",
    )
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    shown = [row for row in held if "heldout_ppl" in row]
    perplexity.plot([row["tokens"] for row in shown], [row["heldout_ppl"] for row in shown], "o-")
    perplexity.set_yscale("log")
    perplexity.set_ylabel("held-out perplexity")
    perplexity.set_xlabel("tokens seen")
    best = next((row for row in shown if row["step"] == history.best_step), None)
    if best is not None:
        perplexity.axvline(best["tokens"], color="0.7", lw=1)
        perplexity.annotate(
            f" {best['heldout_ppl']:.4g}", (best["tokens"], best["heldout_ppl"]), va="bottom"
        )
    if original is not None:
        perplexity.axhline(original, color="0.4", ls="--", lw=1)
        perplexity.annotate(f"original {original:.4g}", (0, original), va="bottom")
    figure.savefig(path, dpi=150)
