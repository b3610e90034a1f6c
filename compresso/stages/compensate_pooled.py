"""Corrections that see sums over quantization groups, and end up in the zeros of the codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compresso.checkpoint.changed import ChangedCheckpoint
from compresso.checkpoint.coded import coding_of
from compresso.checkpoint.packings import decoded, method_of
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.grid import Packed
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.stages.heal_output import parts_of
from compresso.stages.merge_zeros import merge_zeros, merged_config

HINT = "leave out `--pooled`: corrections become an adapter"


@dataclass(frozen=True)
class Groups:
    """The quantization groups of a linear's rows. size: columns in each. count: how many."""

    size: int
    count: int


@dataclass(frozen=True)
class Pooled:
    """A checkpoint with corrections in its zeros.

    config: its config.json. names: of its tensors. tensors: its dense weights that changed.
    nbytes: that are stored.
    """

    config: dict[str, Any]
    names: list[str]
    tensors: dict[str, Tensor]
    nbytes: int

    def sizes(self, source: Checkpoint) -> dict[str, int]:
        """Stored bytes of the source, and how many more these are: zeros it did without."""
        before = source.stored_bytes
        return {"bytes_before": before, "bytes_added": self.nbytes - before}

    def warnings(self, source: Checkpoint) -> list[str]:
        """What those who load it must know that was otherwise for the source."""
        if coding_of(source.config) is not None:
            return []
        return [
            "codes with corrected zeros are stored in compresso's own layout, in place of"
            f" `{method_of(source.config)}`: pass `trust_remote_code=True` to load them"
        ]

    def changed(self, source: Checkpoint) -> ChangedCheckpoint:
        """The source with what changed, as a reader of the output finds it."""
        return ChangedCheckpoint(source, tensors=self.tensors)


def groups_of(source: Checkpoint, paths: Iterable[str]) -> dict[str, Groups]:
    """The groups of packed linears, by path in the checkpoint.

    Raises ConfigError for the first whose weights are not codes with a scale and a zero per group.
    """
    found: dict[str, Groups] = {}
    for path in paths:
        codes = None
        if source.packed and path in source.packing.shapes:
            codes = source.packing.uniform(path, source.load(source.packing.names(path)))
        if codes is None:
            raise ConfigError(
                f"`{path}` of `{source.path}` has no zeros that could take a correction", hint=HINT
            )
        grid = codes.grid if isinstance(codes, Packed) else codes
        count = grid.scale.shape[1]
        found[path] = Groups(codes.codes.shape[1] // count, count)
    return found


def write_pooled(
    adapter: ModelAdapter,
    source: Checkpoint,
    factors: Mapping[str, LowRank],
    target: CheckpointWriter,
) -> Pooled:
    """Commit every part with the corrections in its zeros, unless it is committed already.

    factors: by path in the checkpoint; `down` acts on the sums over the groups of inputs.

    Raises as `merge_zeros`.
    """
    everything: list[dict[str, Any]] = []
    names: list[str] = []
    tensors: dict[str, Tensor] = {}
    nbytes = 0
    corrected = {f"{path}.weight" for path in factors}
    parts = parts_of(source.weight_names(), adapter.blocks_prefix, adapter.count)
    for part, own in enumerate(parts):
        if target.restore(part) is None:
            stored, described = merge_zeros(source, adapter, own, factors)
            target.commit(part, stored, {"described": described})
        committed = target.restore(part)
        assert committed is not None
        stored, described = committed[0], committed[1]["described"]
        config = merged_config(source.config, [described])
        dense = decoded(stored, config, source.dtype)
        tensors |= {name: dense[name] for name in own if name in corrected}
        names += stored
        nbytes += sum(tensor.nbytes for tensor in stored.values())
        everything.append(described)
    return Pooled(merged_config(source.config, everything), names, tensors, nbytes)
