"""What `analyze` measured, for a terminal.

Everything is readable without colour and in 80 columns: numbers where they fit, else shades.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import Any

from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from compresso.kernels.selection import Triangle, closest_run
from compresso.report import Report

# Widths of a cell that show it as .123 or .12 with a space, or as shades of two or one character.
NUMBERS = {5: 3, 4: 2}
CELL_WIDTHS = (5, 4, 2, 1)
SHADES = " ░▒▓█"
BEST = "◆"
BAR_WIDTH = 24
EIGHTHS = " ▏▎▍▌▋▊▉"
# From near to far: the stops of matplotlib's `viridis_r`, which survives colour blindness.
STOPS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))


def analysis_view(report: Report, *, width: int) -> RenderableType:
    """The report of `analyze` as tables and a heat map.

    width: columns of the terminal; 80 or more.
    """
    parts: list[RenderableType] = [block_table(report.rows), Text()]
    if triangle := report.summary["triangle"][:-1]:
        parts += [triangle_map(triangle, width=width), Text()]
    return Group(*parts, advice_table(report.summary["advice"]))


def block_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per block: its Block Influence as a number and a bar, and its halves' similarity."""
    table = Table(title="What every block changes", title_justify="left", box=None, pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("influence", justify="right")
    table.add_column("", width=BAR_WIDTH)
    table.add_column("to drop", justify="right")
    table.add_column("attention", justify="right")
    table.add_column("MLP", justify="right")
    most = max(row["influence"] for row in rows)
    order = sorted(range(len(rows)), key=lambda place: rows[place]["influence"])
    for place, row in enumerate(rows):
        table.add_row(
            str(row["block"]),
            f"{row['influence']:.4f}",
            Text(_bar(row["influence"] / most if most > 0 else 0.0), style="cyan"),
            _ordinal(order.index(place) + 1),
            *(f"{row[half]:.4f}" if half in row else "" for half in ("attention", "mlp")),
        )
    table.caption = (
        "influence: 1 - mean cosine of input and output; attention, MLP: mean cosine\n"
        "of the residual stream before and after; to drop: the order of `shortgpt`"
    )
    table.caption_justify = "left"
    return table


def triangle_map(triangle: Triangle, *, width: int) -> Text:
    """The distances of all runs of blocks: a line per run length, a column per first block.

    triangle: as `kernels.selection` takes it, without the run of all blocks.
    width:    columns to fill.

    The nearest run of every length is marked, and written out at the end of its line. Where there
    are more blocks than columns, a cell is the nearest of several starts, and lengths are skipped.
    """
    blocks = len(triangle) + 1
    label = len(str(blocks)) + 1
    ending = f" {'from-to':>7}  angle"
    space = width - label - len(ending)
    stride = ceil(blocks / space)
    columns = ceil(blocks / stride)
    cell = next(size for size in CELL_WIDTHS if size * columns <= space)
    low = min(map(min, triangle))
    span = max(map(max, triangle)) - low
    text = Text(no_wrap=True)
    text.append("Angle between what enters and what leaves a run of blocks, in half turns\n", "bold")
    text.append(f"rows: blocks in the run, columns: its first block, {BEST} the nearest run\n")
    text.append(" " * label + _column_labels(columns, stride, cell) + ending + "\n", "dim")
    for count in range(1, blocks, stride):
        distances = triangle[count - 1]
        run = closest_run(triangle, count)
        text.append(f"{count:>{label - 1}} ", "dim")
        starts = range(0, len(distances), stride)
        for start in starts:
            nearest = min(distances[start : start + stride])
            share = (nearest - low) / span if span > 0 else 0.0
            best = start <= run[0] < start + stride
            text.append(_cell(nearest, share, cell, best=best), _cell_style(share))
        text.append(" " * (cell * (columns - len(starts))))
        text.append(f" {f'{run[0]}-{run[-1]}':>7}  {_decimal(distances[run[0]], 3)}\n")
    if cell not in NUMBERS:
        text.append(f"{_decimal(low, 3)} ")
        for level in range(4 * len(SHADES)):
            share = level / (4 * len(SHADES) - 1)
            text.append(_shade(share), _cell_style(share))
        text.append(f" {_decimal(low + span, 3)}")
    text.rstrip()
    return text


def advice_table(advice: Sequence[dict[str, Any]]) -> Table:
    """What every method would drop, and what that is predicted to change."""
    table = Table(title="What `prune` would drop", title_justify="left", box=None, pad_edge=False)
    table.add_column("ratio", justify="right")
    table.add_column("method")
    table.add_column("blocks", overflow="fold")
    table.add_column("removed", justify="right")
    table.add_column("influence", justify="right")
    table.add_column("angle", justify="right")
    for place, choice in enumerate(advice):
        first = place == 0 or advice[place - 1]["ratio"] != choice["ratio"]
        if "drop" in choice:
            damage = [f"{choice['influence']:.3f}", _decimal(choice["angle"], 3)]
            cells = [format_blocks(choice["drop"]), f"{choice['removed']:.1%}", *damage]
        else:
            cells = [choice["impossible"]]
        table.add_row(f"{choice['ratio']:.0%}" if first else "", choice["method"], *cells)
    table.caption = (
        "influence: sum over the blocks; angle: sum over the runs they form; less is better.\n"
        "They rank choices of one model: `eval` measures the damage itself"
    )
    table.caption_justify = "left"
    return table


def format_blocks(blocks: Sequence[int]) -> str:
    """Sorted block numbers, with runs shortened: `3, 21-24`."""
    breaks = [place + 1 for place, (a, b) in enumerate(pairwise(blocks)) if b != a + 1]
    edges = [0, *breaks, len(blocks)]
    runs = [blocks[start:end] for start, end in pairwise(edges)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def _bar(share: float) -> str:
    """A horizontal bar in eighths of a character."""
    length = round(share * BAR_WIDTH * 8)
    return "█" * (length // 8) + EIGHTHS[length % 8].rstrip()


def _decimal(value: float, digits: int) -> str:
    """Without the zero before the point, which a table of shares does not need."""
    return f"{value:.{digits}f}".removeprefix("0")


def _column_labels(columns: int, stride: int, cell: int) -> str:
    """The first block of every column that has room for its number, right-aligned in its cell."""
    line = ""
    for column in range(columns):
        number = str(column * stride)
        end = (column + 1) * cell
        if column % (1 if cell in NUMBERS else 5) == 0 and end - len(line) >= len(number):
            line = f"{line}{number:>{end - len(line)}}"
    return line.ljust(columns * cell)


def _cell(value: float, share: float, width: int, *, best: bool) -> str:
    if width in NUMBERS:
        return f"{BEST if best else ''}{_decimal(value, NUMBERS[width])}".rjust(width)
    return (BEST if best else _shade(share)) * width


def _shade(share: float) -> str:
    return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]


def _cell_style(share: float) -> Style:
    """Text that contrasts with a background between the stops."""
    place = share * (len(STOPS) - 1)
    stop = min(int(place), len(STOPS) - 2)
    part = place - stop
    pairs = zip(STOPS[stop], STOPS[stop + 1], strict=True)
    red, green, blue = (round(a + part * (b - a)) for a, b in pairs)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    return Style(
        color="bright_white" if dark else "black", bgcolor=Color.from_rgb(red, green, blue)
    )
