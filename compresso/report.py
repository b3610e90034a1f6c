"""What a stage measured, and how it is shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from compresso.checkpoint.proof import Fingerprint


@dataclass
class Report:
    """What a stage measured, and what the checkpoint it wrote must hold.

    rows:        one per linear, block or checkpoint; a value that was not measured has no key.
    summary:     numbers and words about the whole.
    warnings:    what the user may want to act on.
    fingerprint: logits of the model in memory, to prove the output by; None if none is written.
    config:      the output's config.json; None if none is written.
    expected:    names of the tensors the output must hold.
    files:       what else was written to the output: what it is -> file name.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    fingerprint: Fingerprint | None = None
    config: dict[str, Any] | None = None
    expected: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)

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
