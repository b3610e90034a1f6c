"""The same model without its corrections, or with room for those of its blocks' linears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from compresso.checkpoint.coded import coding_of
from compresso.checkpoint.directory import TensorInfo
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.structure import halves, restructure, structure_of

DOWN, UP, BIAS = "correction_down.weight", "correction_up.weight", "correction_up.bias"


def without_adapter(source: Checkpoint) -> Checkpoint:
    """The source as if nothing lay beside its weights."""
    return source if source.adapter is None else _BareCheckpoint(source.path)


class _BareCheckpoint(Checkpoint):
    """Reads as a checkpoint does, but has no adapter."""

    @cached_property
    def adapter(self) -> None:
        """None."""


class CorrectedCheckpoint(_BareCheckpoint):
    """Reads as a checkpoint does, but some blocks have corrections, all of them zero.

    Path, provenance and side files are those of the source. Corrections that it has itself, in its
    blocks or in an adapter, are not there.
    """

    def __init__(
        self, source: Checkpoint, *, prefix: str, rank: int, corrected: Sequence[int]
    ) -> None:
        """prefix: what the names of all blocks start with in the checkpoint: `model.layers.`.

        rank: of the corrections, at least 1. corrected: the blocks that have them, ascending.
        """
        super().__init__(source.path)
        self._zeros: dict[str, tuple[int, ...]] = {}
        structure = replace(structure_of(source.config), rank=rank, corrected=tuple(corrected))
        self.config = restructure(source.config, structure, coded=coding_of(source.config))
        family = family_of(source.config["model_type"])
        dtype = source.dtype
        self._infos = {name: info for name, info in self._infos.items() if not is_factor(name)}
        dense = set(self.weight_names())
        for block in corrected:
            for mlp, half in enumerate(halves(family)):
                if structure.lacks(2 * block + mlp):
                    continue
                for path in half.linears:
                    owner = f"{prefix}{structure.owner(block)}.{path}"
                    shape = self.weight_info(f"{owner}.weight").shape
                    rows, columns = reversed(shape) if family.transposed else shape
                    name = f"{prefix}{block}.{path}"
                    self._zeros[f"{name}.{DOWN}"] = (rank, columns)
                    self._zeros[f"{name}.{UP}"] = (rows, rank)
                    if f"{owner}.bias" in dense:
                        self._zeros[f"{name}.{BIAS}"] = (rows,)
        for name, shape in self._zeros.items():
            count = torch.Size(shape).numel()
            self._infos[name] = TensorInfo(shape, dtype, count * dtype.itemsize, "")
        self._infos = dict(sorted(self._infos.items()))

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, corrections as zeros."""
        wanted = list(dict.fromkeys(names))
        found = super().load(name for name in wanted if name not in self._zeros)
        return {
            name: found[name]
            if name in found
            else torch.zeros(self._zeros[name], dtype=self.info(name).dtype)
            for name in wanted
        }


def is_factor(name: str) -> bool:
    """Whether a stored tensor is part of a correction."""
    return name.endswith((f".{DOWN}", f".{UP}", f".{BIAS}"))
