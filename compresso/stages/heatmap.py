"""What `analyze` measured, for a terminal.

Everything is readable without colour and in 80 columns: numbers where they fit, else shades.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from compresso.kernels.selection import Triangle, closest_run
from compresso.report import Report
from compresso.stages.sensitivity_view import sensitivity_table

# Cells of 5 and 4 columns show three and two decimals; narrower ones a shade.
DECIMALS = {5: 3, 4: 2}
CELL_WIDTHS = (5, 4, 2, 1)
SHADES = " ░▒▓█"
BEST = "◆"
BAR_WIDTH = 24
BAR_LIMIT = 4  # times the median
CUT = "▶"
EIGHTHS = " ▏▎▍▌▋▊▉"
# From near to far: the stops of matplotlib's `viridis_r`, which survives colour blindness.
STOPS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))


def analysis_view(report: Report, *, width: int) -> RenderableType:
    """The report of `analyze` as tables and a heat map.

    width: columns of the terminal; 80 or more.
    """
    parts: list[RenderableType] = [
        *(_heading("What every block changes"), block_table(report.rows)),
        Text(
            f"influence: 1 - mean cosine of a block's input and output ({CUT} too long to draw);\n"
            "order: what `shortgpt` drops first, second, ...; attention, MLP: mean cosine of\n"
            "the residual stream before and after each half\n"
        ),
    ]
    if "kl_without_block" in report.rows[0]:
        parts += [*(_heading("What the model loses without it"), damage_table(report.rows)), Text()]
    if "pairs" in report.summary:
        parts += [pair_view(report.summary["pairs"]), Text()]
    if "sensitivity" in report.summary:
        heading = _heading("KL of each group alone at 3 bits, and bits of groups for a target")
        parts += [heading, sensitivity_table(report.summary), Text()]
    if len(report.rows) > 1:
        parts += [triangle_map(triangle_of(report.rows), width=width), Text()]
    return Group(
        *parts,
        *(_heading("What `prune` would drop"), advice_table(report.summary["advice"])),
        Text(
            "influence: sum over these blocks; angle: sum over the runs they form; KL: sum of\n"
            "what was measured of each alone. Less is better among choices of one model;\n"
            "`eval` measures the damage itself"
        ),
    )


def block_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per block: its Block Influence as a number and a bar, and its halves' similarity."""
    table = Table(box=None, pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("influence", justify="right")
    table.add_column("", width=BAR_WIDTH)
    table.add_column("order", justify="right")
    table.add_column("attention", justify="right")
    table.add_column("MLP", justify="right")
    limit = bar_limit([row["influence"] for row in rows])
    order = sorted(range(len(rows)), key=lambda place: rows[place]["influence"])
    for place, row in enumerate(rows):
        table.add_row(
            str(row["block"]),
            f"{row['influence']:.4f}",
            Text(_bar(row["influence"] / limit if limit > 0 else 0.0), style="cyan"),
            str(order.index(place) + 1),
            *(f"{row[half]:.4f}" if half in row else "" for half in ("attention", "mlp")),
        )
    return table


def triangle_map(triangle: Triangle, *, width: int) -> Text:
    """The distances of all runs of blocks: a line per run length, a column per first block.

    triangle: as `kernels.selection` takes it, of two blocks or more.
    width:    columns to fill.

    The nearest run of every length is marked, and written out at the end of its line. Where there
    are more blocks than columns, a cell is the nearest of several starts, and lengths are skipped.
    """
    blocks = len(triangle)
    label = len(str(blocks)) + 1
    ending = "  best angle"
    space = width - label - len(ending)
    stride = ceil(blocks / space)
    columns = ceil(blocks / stride)
    cell = next(size for size in CELL_WIDTHS if size * columns <= space)
    # The run of all blocks cannot be dropped, and would stretch the scale.
    scale = sorted(value for distances in triangle[:-1] for value in distances)
    text = Text(no_wrap=True)
    text.append_text(_heading("Angle between the input and output of a run of blocks, half turns"))
    text.append(f"\nrows: blocks in the run, columns: its first block, {BEST} the nearest run\n")
    text.append(" " * label + _column_labels(columns, stride, cell) + ending + "\n", "bold")
    for count in range(1, blocks, stride):
        distances = triangle[count - 1]
        run = closest_run(triangle, count)
        text.append(f"{count:>{label - 1}} ", "bold")
        starts = range(0, len(distances), stride)
        for start in starts:
            nearest = min(distances[start : start + stride])
            best = start <= run[0] < start + stride
            style = _style(nearest, scale, legible=best or cell in DECIMALS)
            text.append(_cell(nearest, scale, cell, best=best), style)
        text.append(" " * (cell * (columns - len(starts))))
        text.append(f" {f'{run[0]}-{run[-1]}':>5}  {_decimal(distances[run[0]], 3)}\n")
    if cell not in DECIMALS:
        text.append_text(_shade_legend(scale))
    text.rstrip()
    return text


def advice_table(advice: dict[str, Any]) -> Table:
    """What every method would drop, and what that is predicted to change.

    advice: as in the summary of `analyze`.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("ratio", justify="right")
    table.add_column("method")
    table.add_column("blocks", overflow="fold")
    table.add_column("removed", justify="right")
    table.add_column("influence", justify="right")
    table.add_column("angle", justify="right")
    measured = any("kl" in choice for choices in advice.values() for choice in choices.values())
    if measured:
        table.add_column("KL", justify="right")
    for ratio, choices in advice.items():
        for place, (method, choice) in enumerate(choices.items()):
            cells = [choice.get("impossible", "")]
            if "drop" in choice:
                damage = [
                    f"{choice['influence']:.3f}" if "influence" in choice else "",
                    _decimal(choice["angle"], 3) if "angle" in choice else "",
                    *([f"{choice['kl']:.3f}"] if "kl" in choice else []),
                ]
                cells = [format_units(choice["drop"]), f"{choice['share']:.1%}", *damage]
            table.add_row("" if place else ratio, method, *cells)
    return table


def damage_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per block: perplexity and KL without its attention, without its MLP, without it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("block", justify="right")
    for words in ("attention", "MLP", "block"):
        table.add_column(f"no {words}:\nperplexity", justify="right")
        table.add_column("\nKL", justify="right")
    for row in rows:
        cells = [str(row["block"])]
        for half in ("attention", "mlp", "block"):
            cells += [f"{row[f'ppl_without_{half}']:.4g}", f"{row[f'kl_without_{half}']:.4f}"]
        table.add_row(*cells)
    return table


def pair_view(pairs: dict[str, list[list[float]]]) -> RenderableType:
    """For every block, the other block most like it, by what they add and by their weights."""
    table = Table(box=None, pad_edge=False)
    for words in (
        "block",
        "adds most alike",
        "CKA",
        "weights most alike",
        "distance",
        "next block",
    ):
        table.add_column(words, justify="right")
    alignment, distance = pairs["alignment"], pairs["distance"]
    for block in range(len(alignment)):
        others = [other for other in range(len(alignment)) if other != block]
        if not others:
            break
        like = max(others, key=lambda other: alignment[block][other])
        near = min(others, key=lambda other: distance[block][other])
        following = f"{alignment[block][block + 1]:.3f}" if block + 1 in others else ""
        cells = (like, f"{alignment[block][like]:.3f}", near, f"{distance[block][near]:.3f}")
        table.add_row(str(block), *map(str, cells), following)
    return Group(_heading("How alike blocks are, for folding"), table)


def format_units(units: Sequence[int | str]) -> str:
    """What a method drops: runs of blocks, or halves as `a3` and `m5`."""
    blocks = [unit for unit in units if isinstance(unit, int)]
    return format_blocks(blocks) if len(blocks) == len(units) else ", ".join(map(str, units))


def triangle_of(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The distances of all runs, by their length, from the rows of `analyze`."""
    return [
        [row["angles"][place] for row in rows[: len(rows) - place]] for place in range(len(rows))
    ]


def bar_limit(values: Sequence[float]) -> float:
    """Where to cut bars: the first and the last block would dwarf all others."""
    return min(max(values), BAR_LIMIT * median(values))


def format_blocks(blocks: Sequence[int]) -> str:
    """One or more ascending block numbers, with runs shortened: `3, 21-24`."""
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(blocks)
    )


def runs(blocks: Sequence[int]) -> list[Sequence[int]]:
    """One or more ascending block numbers, split where one is missing."""
    breaks = [place for place in range(1, len(blocks)) if blocks[place] != blocks[place - 1] + 1]
    return [blocks[start:end] for start, end in pairwise([0, *breaks, len(blocks)])]


def _heading(text: str) -> Text:
    return Text(text, style="bold underline")


def _bar(share: float) -> str:
    """A horizontal bar in eighths of a character; an arrow where it is cut."""
    if share > 1:
        return "█" * (BAR_WIDTH - 1) + CUT
    length = round(max(share, 0.0) * BAR_WIDTH * 8)
    return "█" * (length // 8) + EIGHTHS[length % 8].rstrip()


def _decimal(value: float, digits: int) -> str:
    """Without the zero before the point, which a table of shares does not need."""
    return f"{value:.{digits}f}".removeprefix("0")


def _column_labels(columns: int, stride: int, cell: int) -> str:
    """The first block of every column that has room for its number, right-aligned in its cell."""
    line = ""
    for column in range(0, columns, 1 if cell in DECIMALS else 5):
        number = str(column * stride)
        end = (column + 1) * cell
        if end - len(line) >= len(number):
            line += number.rjust(end - len(line))
    return line.ljust(columns * cell)


def _cell(value: float, scale: Sequence[float], width: int, *, best: bool) -> str:
    if width in DECIMALS:
        return f"{BEST if best else ''}{_decimal(value, DECIMALS[width])}".rjust(width)
    return (BEST if best else SHADES[_level(value, scale)]) * width


def _level(value: float, scale: Sequence[float]) -> int:
    """Which shade: every one covers as many of the distances, as most are alike."""
    return min(bisect_left(scale, value) * len(SHADES) // len(scale), len(SHADES) - 1)


def _shade_legend(scale: Sequence[float]) -> Text:
    """From which distance on every shade is used."""
    text = Text("from ")
    for level, shade in enumerate(SHADES):
        value = scale[ceil(level * len(scale) / len(SHADES))]
        text.append(shade * 2, _style(value, scale, legible=False))
        text.append(f" {_decimal(value, 3)}  ")
    return text


def _style(value: float, scale: Sequence[float], *, legible: bool) -> Style:
    """A background between the stops; shades vanish in it, where the terminal shows colours."""
    span = scale[-1] - scale[0]
    place = (value - scale[0]) / span * (len(STOPS) - 1) if span > 0 else 0.0
    stop = min(int(place), len(STOPS) - 2)
    pairs = zip(STOPS[stop], STOPS[stop + 1], strict=True)
    red, green, blue = (round(a + (place - stop) * (b - a)) for a, b in pairs)
    background = Color.from_rgb(red, green, blue)
    if not legible:
        return Style(color=background, bgcolor=background)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    return Style(color="bright_white" if dark else "black", bgcolor=background)
