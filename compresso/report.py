"""What a stage measured, and how it is shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compresso.runtime import format_bytes
from compresso.settings import TASK

if TYPE_CHECKING:
    from compresso.checkpoint.proof import Fingerprint
    from compresso.formats.writing import Written
    from compresso.kernels.lowrank import LowRank

MOST_ROWS_SHOWN = 100
# What a stage that trains writes beside its checkpoint, about that alone.
TRAINING_TABLE, TRAINING_PICTURE = "training.csv", "training.png"
# What an evaluation measures of each checkpoint: key, words, and how the value reads.
EVALUATED = (
    ("size", "size", format_bytes),
    ("parameters", "parameters", "{:,.0f}".format),
    ("bits_per_weight", "bits per weight", "{:.2f}".format),
    ("blocks", "blocks", "{:.0f}".format),
    ("ppl", "perplexity", "{:.4g}".format),
    ("kl", "KL to the original (nats)", "{:.4f}".format),
    ("top1_agreement", "same top token", "{:.1%}".format),
    ("prefill", "prefill (tokens/s)", "{:,.0f}".format),
    ("decode", "decode (tokens/s)", "{:,.1f}".format),
    ("peak_memory", "peak memory", format_bytes),
)


@dataclass
class Report:
    """What a stage measured, and what the checkpoint it wrote must hold.

    rows:        one per linear, block or checkpoint; a value that was not measured has no key.
    summary:     numbers and words about the whole.
    warnings:    what the user may want to act on.
    fingerprint: logits of the model in memory, to prove the output by; None if none is written.
    config:      the output's config.json; None if none is written.
    expected:    names of the tensors the output must hold.
    carried:     those of them that no module of the model takes, as in the source.
    files:       what else was written to the output: what it is -> file name.
    adapter:     low-rank corrections of the output's linears, by path in the checkpoint; None if it
                 has no adapter.
    written:     what is left to do with an export; None if it is none.
    earlier:     seconds that earlier runs took, which this one went on from.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    fingerprint: Fingerprint | None = None
    config: dict[str, Any] | None = None
    expected: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, LowRank] | None = None
    written: Written | None = None
    earlier: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What is kept in `compresso.json` and printed by `--json`."""
        return {
            "summary": self.summary,
            "rows": self.rows,
            "warnings": self.warnings,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The report kept in a record, without what only the running stage needs."""
        known = ("summary", "rows", "warnings", "files")
        return cls(**{name: values[name] for name in known if name in values})


def rows_to_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV, a column for every key that any of them has; empty if there are none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    if columns:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def show_report(report: Report, title: str) -> None:
    """Write tables of a report to stderr: an evaluation's side by side, any other's as it is."""
    console = Console(stderr=True, highlight=False)
    if any("ppl" in row for row in report.rows):
        console.print(comparison_table(report.rows, title))
        _show_samples(report, console)
        return
    if any("angles" in row for row in report.rows):
        from compresso.stages.heatmap import analysis_view

        console.print(analysis_view(report, width=console.width))
        return
    first = report.rows[0] if report.rows else {}
    if "stored" in first or ("block" in first and "linear" not in first):
        console.print(rows_table(report.rows[:MOST_ROWS_SHOWN], title))
    if report.summary:
        console.print(summary_table(report.summary, title))


def comparison_table(rows: list[dict[str, Any]], title: str) -> Table:
    """A column per checkpoint, the original first; a line per thing measured of any of them.

    A value with a standard error, under the same key and `_se`, reads `value ± error`.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(Text(str(row["checkpoint"])), justify="right", overflow="fold")
    for key, words, form in EVALUATED:
        if any(key in row for row in rows):
            table.add_row(words, *(_with_error(row, key, form) for row in rows))
    tasks = dict.fromkeys(key for row in rows for key in row if key.startswith(TASK))
    for key in tasks:
        if not key.endswith("_se"):
            cells = (_with_error(row, key, "{:.4g}".format) for row in rows)
            table.add_row(key.removeprefix(TASK).replace("_", " "), *cells)
    return table


def rows_table(rows: list[dict[str, Any]], title: str) -> Table:
    """A line per row, without the values that are lists; words on the left, numbers on the right.

    What is too long for its column goes on in the next line: nothing is cut.
    """
    columns = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = any(isinstance(row.get(column), str) for row in rows)
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(column.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(row.get(column, ""))) for column in columns))
    return table


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """A line per entry, without the values that are mappings, or lists of such."""
    table = Table(title=title, title_justify="left", show_header=False)
    for _ in ("what", "value"):
        table.add_column(overflow="fold")
    for key, value in summary.items():
        nested = value[:1] if isinstance(value, list) else [value]
        if not any(isinstance(item, dict) for item in nested):
            form = format_bytes if key == "size" or "bytes" in key else _plain
            table.add_row(key.replace("_", " "), Text(form(value)))
    return table


def _show_samples(report: Report, console: Console) -> None:
    written = [row for row in report.rows if "continuation" in row]
    if not written:
        return
    console.print(Text(f"\nprompt: {report.summary.get('prompt', '')}", "dim"))
    for row in written[:1] + written[1:][-1:]:
        console.print(Text(f"\n{row['checkpoint']} goes on:", "bold"))
        console.print(Text(str(row["continuation"])))


def _with_error(row: dict[str, Any], key: str, form: Any) -> str:
    if key not in row:
        return "-"
    error = row.get(f"{key}_se")
    value: str = form(row[key])
    return value if error is None else f"{value} ± {form(error)}"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)


def show_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Write rows to stdout, as a table on a terminal and else as lines of tab-separated values."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(rows_table(rows, title))
        return
    for row in rows:
        print("\t".join(_plain(value) for value in row.values()))
