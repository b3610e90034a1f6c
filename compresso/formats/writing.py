"""What the formats of `export` are given, and what they return.

A format is a module with `write(export) -> Written`. It writes what it writes through
`export.writer`: either parts, with `write_parts` of parts.py, and a config.json; or files of its
own in `export.writer.partial`. What is common is done by others: side files, the adapter's folder,
`compresso.json`, the proof, and the rename that publishes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compresso.calibration.data import Calibration
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.corrected import without_adapter
from compresso.models.unfolded import unfolded
from compresso.report import Report
from compresso.runtime import Runtime


@dataclass
class Written:
    """What a format wrote, and what proves it.

    exported:  the model whose weights are stored; None if the format has compared them itself.
    runtime:   that it is proved in, by the name that `compresso.runtimes.engine` knows it by.
    config:    its config.json; None if it has none, as files of its own hold everything.
    expected:  names of all tensors in its parts. carried: those that no module takes.
    files:     further files to put beside it: name -> file.
    rows:      what is stored, by form: see `tally`.
    packages:  import name -> what to install, of what its runtime needs to load it.
    shipped:   whether code comes with it that its runtime has to be told to trust.
    tolerance: share of the largest logit that its runtime may be off by; None for what rounding
               to the type it is computed in comes to.
    longest:   most tokens up to which it is the model, if those are fewer than the model takes.
    model:     reads as what is stored, if that is not what the source has; to prove it by.
    reread:    the same, where compresso can read what was written.
    adapter:   corrections that are to lie beside it, for PEFT, by path in transformers.
    corrected: whether such corrections are in files of its own instead.
    fan_in_fan_out: whether the linears that they correct are modules of (in, out) weights.
    """

    exported: Checkpoint | None = None
    runtime: str = "transformers"
    config: dict[str, Any] | None = None
    expected: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    shipped: bool = False
    tolerance: float | None = None
    longest: int | None = None
    model: Checkpoint | None = None
    reread: bool = False
    adapter: dict[str, LowRank] = field(default_factory=dict)
    corrected: bool = False
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Export:
    """One run: the source, what the user asked for, and where it goes.

    source: as the user gave it. report: for warnings and the summary.
    calibration: batches of text, for a format that was asked to weigh what it rounds.
    """

    source: Checkpoint
    settings: Any
    writer: CheckpointWriter
    runtime: Runtime
    report: Report
    calibration: Calibration | None = None

    @property
    def beside(self) -> bool:
        """Whether the source has corrections that are to lie beside the weights."""
        return self.source.adapter is not None and not self.settings.merge_adapter

    @cached_property
    def own(self) -> Checkpoint:
        """The model with the structure it has. Corrections that lie beside it are not in it."""
        return without_adapter(self.source) if self.beside else self.source

    @cached_property
    def unshared(self) -> Checkpoint:
        """The same with linears of its own in every block; removed halves are still missing."""
        return unfolded(self.own, fill=False)

    @cached_property
    def stock(self) -> Checkpoint:
        """The same as the stock class has it: shared linears copied, removed halves zeros."""
        return unfolded(self.own, fill=True)

    def open(self, model: Checkpoint) -> ModelAdapter:
        """The architecture of one of these, without its weights."""
        return ModelAdapter.open(
            model,
            dtype=model.dtype,
            device=torch.device("cpu"),
            trust_remote_code=self.runtime.trust_remote_code,
        )
