"""A choice of bits to be made: the model, the quantizer at several widths, and the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from compresso.calibration.data import Calibration, first_tokens, model_length
from compresso.calibration.levels import Groups, Ladder, Levels, Place, places, weight_names
from compresso.calibration.sensitivity import Ledger, Sensitivity, damage_ledger
from compresso.calibration.streams import Streams
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime
from compresso.stages.ladder import group_bytes


@dataclass(frozen=True)
class BitJob:
    """Everything that the choice may go by.

    settings:    `target_bits` or `size`, the other None; `allocation`, `predict`, `seed`,
                 `sensitivity_tokens` to measure each group on, `score_tokens` to measure choices
                 on, and the fields that `evolve` reads.
    calibration: None for random tokens.
    groups:      what is quantized together, for every block.
    ladder:      the quantizer.
    elsewhere:   bytes that will be stored for all that is in no group; None if as in the source.
    """

    settings: Any
    adapter: ModelAdapter
    source: Checkpoint
    calibration: Calibration | None
    groups: Groups
    ladder: Ladder
    target: CheckpointWriter
    runtime: Runtime
    elsewhere: int | None = None

    @cached_property
    def places(self) -> list[Place]:
        """All groups, in execution order."""
        return places(self.groups)

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Stored bytes of every group at every width."""
        return group_bytes(self.ladder, self.adapter, self.source, self.groups)

    @cached_property
    def count(self) -> int:
        """Weights of all groups."""
        names = [name for place in self.places for name in self.weights(place)]
        return sum(prod(self.source.weight_info(name).shape) for name in names)

    @cached_property
    def other_bytes(self) -> int:
        """Bytes stored for all that is in no group."""
        if self.elsewhere is not None:
            return self.elsewhere
        names = [name for place in self.places for name in self.weights(place)]
        held = sum(self.source.weight_info(name).nbytes for name in names)
        return self.source.stored_bytes - held

    def batches(self, tokens: int) -> list[Tensor]:
        """So many tokens to measure KL on."""
        if self.calibration is not None:
            return first_tokens(self.calibration.batches, tokens)
        length = min(model_length(self.source.config), tokens)
        generator = torch.Generator().manual_seed(self.settings.seed)
        shape = (-(-tokens // length), length)
        vocabulary = self.adapter.config.get_text_config().vocab_size
        return list(torch.randint(vocabulary, shape, generator=generator).split(1))

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """For measuring each group."""
        return Sensitivity(
            self.adapter,
            self.source,
            self.groups,
            self.batches(self.settings.sensitivity_tokens),
            runtime=self.runtime,
            spill_dir=self.target.partial,
        )

    @cached_property
    def levels(self) -> Levels:
        """The groups at all widths. They stay beside the unfinished output if a run is killed."""
        key = [self.source.key, self.ladder.key, str(self.adapter.dtype), self.text_key]
        return Levels(
            self.target.partial.with_name(f"{self.target.partial.name}-levels"),
            self.adapter,
            self.source,
            self.groups,
            self.ladder,
            key=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
        )

    @cached_property
    def ledger(self) -> Ledger:
        """Where the damage of each group at each width is kept: beside the output, for others."""
        directory = self.target.target.parent
        return damage_ledger(self.sensitivity, self.levels, directory, calibration=self.text_key)

    @cached_property
    def streams(self) -> Streams:
        """For scoring choices."""
        return Streams(
            self.adapter,
            self.source,
            self.batches(self.settings.score_tokens),
            budget=self.runtime.max_memory,
            spill_dir=self.target.partial,
            versions=self.levels.tensors,
        )

    @property
    def text_key(self) -> str:
        """Key of the tokens that a calibrated quantizer reads."""
        return self.calibration.key if self.calibration and self.ladder.calibrated else ""

    def weights(self, place: Place) -> list[str]:
        """Names in the checkpoint of the weights of a group."""
        return weight_names(self.adapter, self.groups, place)

    def build(self, wanted: Mapping[Place, Sequence[int]]) -> None:
        """Have these widths of these groups."""
        self.levels.build(
            wanted,
            self.calibration.batches if self.calibration else [],
            runtime=self.runtime,
            spill_dir=self.target.partial,
        )

    def by_block(self, chosen: Sequence[int]) -> list[list[int]]:
        """Widths, for every block, of a choice of the level of every group."""
        widths: list[list[int]] = [[] for _ in self.groups]
        for (block, _), level in zip(self.places, chosen, strict=True):
            widths[block].append(self.ladder.bits[level])
        return widths
