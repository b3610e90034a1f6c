"""The terminal view of an analysis: every number is there, in 80 columns and without colour."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from compresso.report import Report
from compresso.stages.heatmap import analysis_view, format_blocks, format_units, triangle_of


def rendered(report, width=80, **console):
    out = Console(width=width, **console)
    with out.capture() as captured:
        out.print(analysis_view(report, width=width))
    return captured.get()


def made_up(blocks):
    """A report whose distances are all different, with the nearest runs at known places."""
    generator = torch.Generator().manual_seed(blocks)
    values = torch.rand(blocks, blocks, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    rows = [
        {
            "block": block,
            "influence": float(values[block, 0]),
            "attention": 0.9,
            "mlp": 0.8,
            "angles": values[block, : blocks - block].tolist(),
        }
        for block in range(blocks)
    ]
    return Report(rows=rows, summary={"advice": {}})


def test_blocks_are_listed_with_their_influence_and_order():
    report = made_up(6)
    lines = rendered(report).splitlines()[2:8]
    values = [row["influence"] for row in report.rows]
    for block, line in enumerate(lines):
        number, influence, *_, order, attention, mlp = line.split()
        assert (int(number), float(influence)) == (block, pytest.approx(values[block], abs=1e-4))
        assert int(order) == 1 + sum(value < values[block] for value in values)
        assert (attention, mlp) == ("0.9000", "0.8000")


def test_bars_are_in_proportion_and_cut_where_one_would_dwarf_the_others():
    report = made_up(6)
    for row, influence in zip(report.rows, [0.9, 0.02, 0.01, 0.02, 0.08, 0.0], strict=True):
        row["influence"] = influence
    bars = [re.sub(r"[^█▏▎▍▌▋▊▉▶]", "", line) for line in rendered(report).splitlines()[2:8]]
    assert bars == ["█" * 23 + "▶", "█" * 6, "█" * 3, "█" * 6, "█" * 24, ""]


def test_advice_is_listed():
    report = made_up(6)
    choice = {"drop": [0, 2, 3], "share": 0.225, "influence": 0.0635, "angle": 0.1254}
    report.summary["advice"] = {
        "10%": {"tail": {"impossible": "0.1 is less than half a block"}},
        "20%": {"shortgpt": choice, "tail": choice},
    }
    first, second, third = rendered(report).splitlines()[-6:-3]
    assert first.split(maxsplit=2)[:2] == ["10%", "tail"] and "less than half a block" in first
    assert re.split(r"\s{2,}", second.strip()) == [
        *("20%", "shortgpt", "0, 2-3"),
        *("22.5%", "0.064", ".125"),
    ]
    assert third.split()[0] == "tail"


def test_damage_and_pairs_are_shown_where_they_were_measured():
    report = made_up(6)
    assert "loses without it" not in rendered(report) and "alike" not in rendered(report)
    for block, row in enumerate(report.rows):
        for half, value in (("attention", 12.5), ("mlp", 13.25), ("block", 14.75)):
            row[f"ppl_without_{half}"], row[f"kl_without_{half}"] = value + block, 0.125 * block
    table = [[1.0 if a == b else 1 / (1 + abs(a - b)) for a in range(6)] for b in range(6)]
    away = [[0.0 if a == b else 0.5 + 0.01 * abs(a - b - 2) for a in range(6)] for b in range(6)]
    report.summary["pairs"] = {"alignment": table, "distance": away}
    lines = rendered(report).splitlines()
    damage = next(line for line in lines if "15.25" in line)
    assert damage.split() == ["2", "14.5", "0.2500", "15.25", "0.2500", "16.75", "0.2500"]
    pairs = next(line for line in lines if line.split()[:3] == ["2", "1", "0.500"])
    assert pairs.split() == ["2", "1", "0.500", "4", "0.500", "0.500"]


def test_groups_are_listed_with_their_damage_and_bits():
    report = made_up(2)
    named = (["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"])
    report.summary["sensitivity"] = [
        {"block": block, "linears": linears, "kl_3": block + place / 10}
        for block in range(2)
        for place, linears in enumerate(named)
    ]
    report.summary["bits"] = {"3": {"levels": [0, 1, 2, 3], "kl": 0.25}}
    lines = [line.split() for line in rendered(report).splitlines()]
    assert ["block", "q_proj", "…", "down_proj", "at", "3"] in lines
    assert ["0", "0.0000", "0.1000", "23"] in lines
    assert ["1", "1.0000", "1.1000", "48"] in lines


def test_halves_are_listed_by_name():
    assert format_units([1, 2, 5]) == "1-2, 5"
    assert format_units(["a3", "m5"]) == "a3, m5"


@pytest.mark.parametrize(("blocks", "text"), [([3], "3"), ([1, 2, 4, 7, 8, 9], "1-2, 4, 7-9")])
def test_format_blocks(blocks, text):
    assert format_blocks(blocks) == text


def map_lines(text, blocks):
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "best angle" in line)
    return lines[start + 1 : start + blocks]


@pytest.mark.parametrize("blocks", [2, 6, 12])
def test_the_map_shows_every_distance_without_colour(blocks):
    report = made_up(blocks)
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 80
    for count, line in enumerate(map_lines(text, blocks), start=1):
        distances = triangle_of(report.rows)[count - 1]
        start = distances.index(min(distances))
        shown = [f"{value:.3f}"[1:] for value in distances]
        words = line.replace("◆", " ").split()
        run_and_angle = [f"{start}-{start + count - 1}", shown[start]]
        assert words == [str(count), *shown, *run_and_angle]
        cells = line[len(str(blocks)) + 1 :]
        assert cells.index("◆") == 5 * start


def test_more_blocks_are_shown_as_shades():
    report = made_up(32)
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 80
    shades = {shade: [] for shade in " ░▒▓█"}
    for count, line in enumerate(map_lines(text, 32), start=1):
        distances = triangle_of(report.rows)[count - 1]
        best = distances.index(min(distances))
        for start, value in enumerate(distances):
            cell = line[3 + 2 * start : 5 + 2 * start]
            assert (cell == "◆◆") == (start == best)
            if start != best:
                shades[cell[0]].append(value)
        assert line.split()[-2:] == [f"{best}-{best + count - 1}", f"{distances[best]:.3f}"[1:]]
    ranges = [(min(values), max(values)) for values in shades.values()]
    assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def test_even_more_blocks_are_thinned_out():
    text = rendered(made_up(100))
    assert max(map(len, text.splitlines())) <= 80
    assert sum("◆" in line for line in map_lines(text, 100)) == 50


@pytest.mark.parametrize("blocks", [12, 32])
def test_colour_only_adds_to_the_text(blocks):
    report = made_up(blocks)
    plain = rendered(report)
    terminal = {"force_terminal": True, "color_system": "truecolor"}
    coloured = rendered(report, **terminal)
    uncoloured = rendered(report, no_color=True, **terminal)
    assert "\x1b[" not in plain
    assert "48;2;" in coloured and "8;2;" not in uncoloured
    for text in (coloured, uncoloured):
        assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain
