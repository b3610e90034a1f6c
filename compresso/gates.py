"""Limits on what an evaluation measures, such as `ppl_ratio < 1.3`. Imports no torch."""

from __future__ import annotations

import difflib
import operator
import re
from dataclasses import dataclass
from typing import Any

from compresso.errors import ConfigError, GateError
from compresso.runtime import parse_bytes
from compresso.settings import TASK

METRICS = (
    "ppl",
    "ppl_ratio",
    "kl",
    "top1_agreement",
    "size",
    "size_ratio",
    "parameters_ratio",
    "bits_per_weight",
)
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_LIMIT = re.compile(r"\s*(<=|>=|<|>)\s*([^<>=]+?)\s*")
_NAMED = re.compile(r"\s*([\w-]+)\s*((?:<|>).*)")


@dataclass(frozen=True)
class Gate:
    """One limit: the evaluation passes if `metric comparison limit` holds."""

    metric: str
    comparison: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.limit:g}"


def parse_gates(limits: dict[str, Any], *, where: str) -> tuple[Gate, ...]:
    """Gates from a recipe's `assert`: metric -> `< 1.3`, or several limits with commas between.

    Raises ConfigError naming a metric that is not measured, or a limit that cannot be read.
    """
    if not isinstance(limits, dict):
        raise ConfigError(
            f"{where}: `assert` must map metrics to limits", hint='write `assert: {ppl: "< 20"}`'
        )
    return tuple(
        _parse(str(metric), text, where)
        for metric, texts in limits.items()
        for text in str(texts).split(",")
    )


def split_limits(texts: list[str]) -> dict[str, str]:
    """The `assert` mapping of limits given as on the command line: `ppl_ratio<1.3,kl<0.05`.

    Raises ConfigError if one has no metric or no comparison.
    """
    limits: dict[str, str] = {}
    for text in ",".join(texts).split(","):
        if (found := _NAMED.fullmatch(text)) is None:
            raise ConfigError(
                f"`--assert`: `{text.strip()}` is not a limit", hint="write it like `ppl_ratio<1.3`"
            )
        metric = found[1].replace("-", "_")
        limits[metric] = f"{limits[metric]}, {found[2]}" if metric in limits else found[2]
    return limits


def _parse(metric: str, text: str, where: str) -> Gate:
    if metric not in METRICS and not metric.startswith(TASK):
        near = difflib.get_close_matches(metric, METRICS)
        known = f"known: {', '.join(METRICS)}, and `{TASK}NAME_METRIC` of a task"
        hint = f"did you mean `{near[0]}`?" if near else known
        raise ConfigError(f"{where}: unknown metric `{metric}` in `assert`", hint=hint)
    found = _LIMIT.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        limit = float(parse_bytes(found[2])) if metric == "size" else float(found[2])
    except ValueError:
        raise ConfigError(
            f"{where}: `{text.strip()}` is not a limit for `{metric}`",
            hint="write a comparison and a number, in quotes: `< 1.3`",
        ) from None
    return Gate(metric, found[1], limit)


def gate_texts(gates: tuple[Gate, ...]) -> dict[str, str]:
    """The `assert` mapping that `parse_gates` reads these gates from."""
    texts: dict[str, list[str]] = {}
    for gate in gates:
        # repr keeps every digit of a float, so the gate read back is the same one.
        texts.setdefault(gate.metric, []).append(f"{gate.comparison} {gate.limit!r}")
    return {metric: ", ".join(limits) for metric, limits in texts.items()}


def check_gates(gates: tuple[Gate, ...], summary: dict[str, Any], *, written: str) -> None:
    """Raises GateError naming, with its number, every gate that does not hold.

    written: where the report is, for the hint.
    """
    failures = []
    for gate in gates:
        value = summary.get(gate.metric)
        if value is None:
            failures.append(f"`{gate}` cannot be checked: `{gate.metric}` was not measured")
        elif not _COMPARE[gate.comparison](value, gate.limit):
            failures.append(f"`{gate}` fails: `{gate.metric}` is {value:.6g}")
    if failures:
        raise GateError("; ".join(failures), hint=f"the whole report is in `{written}`")
