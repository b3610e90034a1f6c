"""What `analyze --sensitivity` measured, for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from compresso.stages.ladder import WIDTHS

SHOWN = 3  # the width whose damage the table shows; analysis.json has all


def sensitivity_table(summary: dict[str, Any]) -> Table:
    """A line per block: what each group loses alone at 3 bits, and its bits in every advice.

    summary: of the analysis. The bits of a block are written one digit per group.
    """
    groups, advice = summary["sensitivity"], summary["bits"]
    table = Table(box=None, pad_edge=False)
    table.add_column("block", justify="right")
    names = list(dict.fromkeys(_name(group["linears"]) for group in groups))
    for name in (*names, *(f"at {target}" for target in advice)):
        table.add_column(name, justify="right")
    for block in dict.fromkeys(group["block"] for group in groups):
        places = [place for place, group in enumerate(groups) if group["block"] == block]
        lost = {_name(groups[p]["linears"]): f"{groups[p][f'kl_{SHOWN}']:.4f}" for p in places}
        chosen = [
            "".join(str(WIDTHS[found["levels"][place]]) for place in places)
            for found in advice.values()
        ]
        table.add_row(str(block), *(lost.get(name, "") for name in names), *chosen)
    total = ["sum of KL", *[""] * len(names), *(f"{found['kl']:.3f}" for found in advice.values())]
    table.add_row(*total, style="dim")
    return table


def _name(linears: list[str]) -> str:
    """Of a group, by its first linear: `q_proj …`."""
    return linears[0].rpartition(".")[2] + (" …" if len(linears) > 1 else "")
