"""What every runtime does with every form of a checkpoint: table.yaml, read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("table.yaml")
RUNTIMES = ("transformers", "vllm", "llama.cpp", "peft")
EXTRA = "pip install 'compresso-llm[{}]'"


@dataclass(frozen=True)
class Traits:
    """What a runtime looks at in a checkpoint.

    kind:      how linears are stored: `dense`, `coded` (compresso's own), `gguf`, or a
               `quant_method` of transformers.
    bits:      of all codes. groups: columns sharing a scale, -1 for the row. mixed: whether the
               codes come in several forms. symmetric: whether all are.
    head:      whether the output head is stored as codes.
    structure: `stock`; `own`, with compresso's code; `decilm`.
    """

    kind: str
    bits: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    mixed: bool = False
    symmetric: bool = True
    head: bool = False
    structure: Literal["stock", "own", "decilm"] = "stock"


@dataclass(frozen=True)
class Row:
    """What a runtime does with some checkpoints: see table.yaml."""

    runtime: str
    kind: str
    loads: Literal["packed", "dense", "no"]
    checked: str
    note: str = ""
    needs: tuple[str, ...] = ()
    structure: str | None = None
    bits: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    symmetric: bool | None = None
    mixed: bool | None = None
    head: bool | None = None

    def fits(self, traits: Traits) -> bool:
        """Whether it is about such a checkpoint."""
        return (
            self.kind == traits.kind
            and self.structure in (None, traits.structure)
            and (self.bits is None or traits.bits <= {*self.bits})
            and (self.groups is None or traits.groups <= {*self.groups})
            and self.symmetric in (None, traits.symmetric)
            and self.mixed in (None, traits.mixed)
            and self.head in (None, traits.head)
        )

    @property
    def when(self) -> str:
        """What a checkpoint must be like for it, in words; empty for any of its kind."""
        facts = {"symmetric": "asymmetric", "mixed": "one form of codes", "head": "head dense"}
        yes = {"symmetric": "symmetric", "mixed": "several forms of codes", "head": "head of codes"}
        words = []
        if self.structure:
            words.append(f"{self.structure} structure")
        if self.bits:
            words.append(f"{_listed(self.bits)} bits")
        if self.groups:
            words.append(f"groups of {_listed(self.groups).replace('-1', 'a row')}")
        for name, no in facts.items():
            value = getattr(self, name)
            if value is not None:
                words.append(yes[name] if value else no)
        return ", ".join(words)

    @property
    def install(self) -> list[str]:
        """How the packages that it needs are installed."""
        by = table()["installed_by"]
        return list(dict.fromkeys(EXTRA.format(by[name]) for name in self.needs))

    def known(self) -> dict[str, Any]:
        """How the runtime loads such a checkpoint, what it needs and more; plain values."""
        return {
            "loads": self.loads,
            "note": self.note,
            "needs": list(self.needs),
            "install": self.install,
            "checked": self.checked,
            "version": table()["versions"][self.runtime],
        }


@dataclass(frozen=True)
class Fast:
    """Codes that a runtime runs fast, of those that `quantize` can write.

    layout: as the registry names it. bits: of the codes; none for a layout of one width.
    groups: those allowed, none for any; the first is taken where the user asks for none.
    symmetric: None for both. mixed: whether several widths may be in one checkpoint.
    why:    in words that go on `... runs fast`. checked: as in table.yaml.
    """

    layout: str
    mixed: bool
    why: str
    checked: str
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    symmetric: bool | None = None


@cache
def table() -> dict[str, Any]:
    """All of table.yaml, with its rows as `Row` and `Fast`."""
    found: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    found["rows"] = [Row(**_tuples(row)) for row in found["rows"]]
    found["fast"] = {
        name: [Fast(**_tuples(row)) for row in rows] for name, rows in found["fast"].items()
    }
    return found


def row_for(runtime: str, traits: Traits) -> Row | None:
    """What the table says of a runtime and a checkpoint; None if it says nothing."""
    rows: list[Row] = table()["rows"]
    return next((row for row in rows if row.runtime == runtime and row.fits(traits)), None)


def known_runtimes(traits: Traits) -> dict[str, dict[str, Any]]:
    """Of every runtime: how it loads such a checkpoint, what it needs and more; plain values."""
    found: dict[str, dict[str, Any]] = {}
    for runtime in RUNTIMES:
        row = row_for(runtime, traits)
        if row is None:
            found[runtime] = {"loads": "unknown", "note": f"nothing is known of `{traits.kind}`"}
        else:
            found[runtime] = row.known()
    return found


def sentence(known: dict[str, Any]) -> str:
    """What is known of one runtime, as `runtimes_for` has it, in a line."""
    words = {
        "packed": "loads, codes stay codes in memory",
        "dense": "loads, weights are dense in memory",
        "no": "does not load",
        "unknown": "unknown",
    }[known["loads"]]
    parts = [words]
    if known.get("needs"):
        parts.append(f"needs {' and '.join(known['needs'])} ({'; '.join(known['install'])})")
    if known["note"]:
        parts.append(known["note"])
    if known.get("checked", "").startswith("source"):
        parts.append("read in its source, not run")
    return ": ".join([parts[0], "; ".join(parts[1:])]) if parts[1:] else parts[0]


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }


def _listed(values: tuple[int, ...]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
