"""Input groups at several bit widths: each quantized once, and kept on disk for models to try.

A width of an input group is a level. Groups are given as `groups[block]`: for every block the
linears of each, by path in the block, as they are quantized together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compresso.calibration.candidates import Candidate
from compresso.calibration.states import enter_blocks
from compresso.calibration.walk import walk_blocks
from compresso.checkpoint.directory import open_shard
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.shard_file import write_safetensors
from compresso.errors import ResourceError
from compresso.kernels.gptq import relative_error
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, track

Groups = Sequence[Sequence[tuple[str, ...]]]
Place = tuple[int, int]  # block, and number of the group among the block's
Widths = tuple[int | None, ...]  # of every group of a block; None for one that stays as it is
STAMP = "key"


class Decodable(Protocol):
    """A quantized matrix."""

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32."""


@dataclass(frozen=True)
class Ladder:
    """A quantizer, and the widths it is used at.

    bits:       widths, ascending.
    quantize:   given stacked weights, (rows, columns) float32, the gram of their input or None, and
                a width, the quantized matrix.
    nbytes:     given the shape of one linear, (rows, columns), and a width, what is stored for it.
    calibrated: whether `quantize` needs the gram.
    key:        names the quantizer and its settings, the widths apart.
    """

    bits: tuple[int, ...]
    quantize: Callable[[Tensor, Tensor | None, int], Decodable]
    nbytes: Callable[[tuple[int, int], int], int]
    calibrated: bool
    key: str


def places(groups: Groups) -> list[Place]:
    """All groups, in execution order."""
    return [(block, group) for block, own in enumerate(groups) for group in range(len(own))]


def weight_names(adapter: ModelAdapter, groups: Groups, place: Place) -> list[str]:
    """Names in the checkpoint of the weights of a group."""
    block, group = place
    return [f"{adapter.block_prefix(block)}{path}.weight" for path in groups[block][group]]


def changed_in(adapter: ModelAdapter, versions: Mapping[int, Hashable]) -> Candidate:
    """The model with these versions of some blocks' own linears, wherever those are used."""
    owners = ((block, adapter.structure.owner(block)) for block in range(adapter.count))
    return Candidate(
        versions=tuple((block, versions[owner]) for block, owner in owners if owner in versions)
    )


class Levels:
    """Dense weights of input groups at several widths, in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        adapter: ModelAdapter,
        source: Checkpoint,
        groups: Groups,
        ladder: Ladder,
        *,
        key: str,
    ) -> None:
        """Start the directory, or go on with what a run with the same key left.

        key: names the source, the quantizer and the tokens it is calibrated on.

        Raises ResourceError if nothing can be written there.
        """
        self.groups = groups
        self.ladder = ladder
        self._directory = directory
        self._adapter = adapter
        self._source = source
        with _writing(directory):
            stamp = directory / STAMP
            if directory.is_dir() and (not stamp.is_file() or stamp.read_text() != key):
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)
            stamp.write_text(key)

    def build(
        self,
        wanted: Mapping[Place, Sequence[int]],
        batches: list[Tensor],
        *,
        runtime: Runtime,
        spill_dir: Path,
    ) -> None:
        """Quantize groups to the wanted widths, where that was not done yet.

        batches: what a calibrated quantizer is given the gram of, with all weights as they are.

        Holds one block's weights at a time. Raises what the quantizer does.
        """
        missing = {
            place: left
            for place, widths in wanted.items()
            if (left := [bits for bits in widths if not self._path(place, bits).is_file()])
        }
        if not missing:
            return
        last = max(block for block, _ in missing)
        for block, gram in track(
            self._blocks(batches if self.ladder.calibrated else None, runtime, spill_dir, last),
            last + 1,
            f"quantize to {' '.join(map(str, self.ladder.bits))} bits",
        ):
            for group, paths in enumerate(self.groups[block]):
                if (block, group) in missing:
                    self._quantize((block, group), missing[block, group], gram(paths))

    def error(self, place: Place, bits: int) -> float:
        """|W' - W|^2 / |W|^2 of the group's stacked weights at that width."""
        with open_shard(self._path(place, bits)) as shard:
            return float(shard.metadata()["error"])

    def tensors(self, block: int, widths: Hashable) -> dict[str, Tensor]:
        """The dense tensors of a block's own groups at these widths, by name in the checkpoint.

        widths: as `Widths`. The block may be one that uses the linears of another.
        """
        assert isinstance(widths, tuple)
        owner = self._adapter.structure.owner(block)
        found: dict[str, Tensor] = {}
        for group, bits in enumerate(widths):
            if bits is not None:
                with open_shard(self._path((owner, group), bits)) as shard:
                    names = shard.keys()
                    found |= {name: shard.get_tensor(name) for name in names}
        return found

    def candidate(self, widths: Mapping[int, Widths]) -> Candidate:
        """The model with these widths of some blocks' own groups."""
        return changed_in(self._adapter, widths)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _blocks(
        self, batches: list[Tensor] | None, runtime: Runtime, spill_dir: Path, last: int
    ) -> Iterator[tuple[int, Callable[[tuple[str, ...]], Tensor | None]]]:
        """Every block up to the last, and what gives its grams; none if there are no batches."""
        if batches is None:
            for block in range(last + 1):
                yield block, lambda paths: None
            return
        states = enter_blocks(
            self._adapter,
            self._source,
            batches,
            probe=None,
            budget=runtime.max_memory,
            spill_dir=spill_dir,
        )
        for live in walk_blocks(self._adapter, self._source, states, keep=range(last + 1)):
            yield live.index, live.gram

    @torch.no_grad()
    def _quantize(self, place: Place, widths: list[int], gram: Tensor | None) -> None:
        names = weight_names(self._adapter, self.groups, place)
        turned = self._adapter.family.transposed
        loaded = self._source.load_weights(names)
        parts = [loaded[name].T if turned else loaded[name] for name in names]
        stacked = torch.cat(parts).to(self._adapter.device, torch.float32)
        for bits in widths:
            decoded = self.ladder.quantize(stacked, gram, bits).decode().to(self._source.dtype)
            split = decoded.split([len(part) for part in parts])
            tensors = {
                name: part.T if turned else part for name, part in zip(names, split, strict=True)
            }
            path = self._path(place, bits)
            temporary = path.with_suffix(".tmp")
            error = relative_error(stacked, decoded)
            with _writing(path):
                with temporary.open("wb") as file:
                    write_safetensors(file, tensors, {"format": "pt", "error": repr(error)})
                temporary.replace(path)

    def _path(self, place: Place, bits: int) -> Path:
        return self._directory / f"{place[0]}-{place[1]}-{bits}.safetensors"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write `{path}`: {error.strerror}",
            hint="the levels to choose from take as much room as the source, once for each width",
        ) from error
