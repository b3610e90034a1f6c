"""What `analyze` measured, as a picture. Needs matplotlib, which only this module imports."""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresso.errors import ResourceError
from compresso.kernels.selection import Triangle, closest_run
from compresso.report import Report
from compresso.stages.heatmap import bar_limit, triangle_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BLOCKS_WITH_NUMBERS = 18
MOST_TICKS = 16
NAME = "analysis"


def wants_plot(plot: bool | None) -> bool:
    """Whether to draw: None draws where matplotlib is installed.

    Raises ResourceError if a picture is demanded and matplotlib is missing.
    """
    installed = find_spec("matplotlib") is not None
    if plot and not installed:
        raise ResourceError(
            "the picture needs `matplotlib`", hint="pip install 'compresso-llm[plot]'"
        )
    return installed if plot is None else plot


def draw_analysis(report: Report, target: Path, *, title: str) -> list[Path]:
    """Write the report of `analyze` as analysis.png and analysis.svg into `target`.

    title: says what was analyzed, and on what.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left, right = panels
    _draw_triangle(left, triangle_of(report.rows))
    upper, lower = right.subplots(2, 1, sharex=True)
    _draw_influence(upper, report.rows)
    _draw_halves(lower, report.rows)
    paths = [target / f"{NAME}.png", target / f"{NAME}.svg"]
    # Neither dates nor random ids: the same analysis gives the same files.
    with rc_context({"svg.hashsalt": NAME}):
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw_pairs(pairs: dict[str, list[list[float]]], target: Path, *, title: str) -> Path:
    """Write how alike every two blocks are as pairs.png into `target`.

    pairs: `alignment` and `distance`, as `calibration.pairs.Pairs` has them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    panels = (
        ("alignment", "CKA of what two blocks add to the residual stream", "viridis"),
        ("distance", "Distance of their weights: 0 equal, 1 unrelated", "viridis_r"),
    )
    for axes, (key, words, colours) in zip(figure.subplots(1, 2), panels, strict=True):
        table = pairs[key]
        others = [v for a, row in enumerate(table) for b, v in enumerate(row) if a != b] or [0.0]
        # A block is like itself: its cell would stretch the colours.
        image = axes.imshow(table, cmap=colours, vmin=min(others), vmax=max(others))
        figure.colorbar(image, ax=axes, shrink=0.7)
        axes.set_title(words, loc="left")
        axes.set_xlabel("block")
        _count_up(axes, len(table))
        if len(table) <= MOST_BLOCKS_WITH_NUMBERS:
            _write_numbers(axes, image, table, first=0)
    path = target / "pairs.png"
    figure.savefig(path, dpi=150)
    return path


def _draw_triangle(figure: Any, triangle: Triangle) -> None:
    import numpy as np

    blocks = len(triangle)
    # The run of all blocks cannot be dropped, and would stretch the colours.
    rows = triangle[:-1] if blocks > 1 else triangle
    cells = np.full((len(rows), blocks), np.nan)
    for row, distances in enumerate(rows):
        cells[row, : len(distances)] = distances
    axes = figure.subplots()
    edges = (-0.5, blocks - 0.5, len(rows) + 0.5, 0.5)
    image = axes.imshow(cells, cmap="viridis_r", extent=edges, aspect="auto")
    figure.colorbar(image, ax=axes, label="angular distance (half turns)", shrink=0.6, pad=0.02)
    best = [closest_run(triangle, count) for count in range(1, blocks)]
    if blocks <= MOST_BLOCKS_WITH_NUMBERS:
        mark = "framed"
        _write_numbers(axes, image, rows)
        for count, run in enumerate(best, start=1):
            axes.add_patch(_frame(run[0], count))
    else:
        mark = "dots"
        starts = [run[0] for run in best]
        axes.plot(starts, range(1, blocks), "o", color="white", mec="black", ms=4.5)
    axes.set_title(
        f"How far a run of blocks turns its input\n{mark}: the nearest run of each length",
        loc="left",
    )
    axes.set_xlabel("first block of the run")
    axes.set_ylabel("blocks in the run")
    _count_up(axes, blocks)
    axes.set_yticks(range(1, len(rows) + 1, ceil(len(rows) / MOST_TICKS)))
    axes.spines[["top", "right"]].set_visible(False)


def _write_numbers(axes: Axes, image: Any, rows: Triangle, *, first: int = 1) -> None:
    for row, distances in enumerate(rows, start=first):
        for start, distance in enumerate(distances):
            red, green, blue, _ = image.cmap(image.norm(distance))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            label = f"{distance:.2f}".removeprefix("0")
            color = "white" if dark else "black"
            axes.text(start, row, label, ha="center", va="center", fontsize=9, color=color)


def _frame(start: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start - 0.46, row - 0.46), 0.92, 0.92, fill=False, lw=2.2, ec="#d1495b")


def _draw_influence(axes: Axes, rows: list[dict[str, Any]]) -> None:
    values = [row["influence"] for row in rows]
    bars = axes.bar([row["block"] for row in rows], values, color="#3b528b")
    axes.set_title("How much each block changes its input", loc="left")
    axes.set_ylabel("Block Influence")
    _finish_bars(axes, list(bars), numbers=len(rows) <= MOST_BLOCKS_WITH_NUMBERS)


def _draw_halves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    bars: list[Any] = []
    for half, label, shift, color in (
        ("attention", "attention", -0.2, "#21918c"),
        ("mlp", "MLP", 0.2, "#e08e45"),
    ):
        places = [row["block"] + shift for row in rows]
        changes = [1 - row[half] for row in rows]
        bars += axes.bar(places, changes, 0.4, color=color, label=label)
    axes.set_title("How much each half changes", loc="left")
    axes.set_xlabel("block")
    axes.set_ylabel("1 - mean cosine")
    axes.legend(frameon=False, ncols=2)
    _count_up(axes, len(rows))
    _finish_bars(axes, bars, numbers=len(rows) <= MOST_BLOCKS_WITH_NUMBERS)


def _count_up(axes: Axes, blocks: int) -> None:
    axes.set_xticks(range(0, blocks, ceil(blocks / MOST_TICKS)))


def _finish_bars(axes: Axes, bars: list[Any], *, numbers: bool) -> None:
    """Cut the bars that would dwarf all others; write out what they stand for, if that fits."""
    values = [bar.get_height() for bar in bars]
    limit = bar_limit(values)
    if limit > 0:
        axes.set_ylim(min(0.0, *values), 1.15 * limit)
    for bar, value in zip(bars, values, strict=True):
        if numbers and value > limit:
            middle = bar.get_x() + bar.get_width() / 2
            text = axes.text(middle, 1.13 * limit, f"{value:.2f} ↑", color="white", fontsize=8)
            text.set(rotation=90, ha="center", va="top")
    if max(values) > limit:
        axes.set_title("tall bars are cut", loc="right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
