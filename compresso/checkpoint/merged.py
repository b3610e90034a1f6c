"""A checkpoint that reads as if its adapter had been added to its weights."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import Tensor

from compresso.checkpoint.reader import Checkpoint


class MergedCheckpoint(Checkpoint):
    """Reads as a dense checkpoint does, with every correction in its weight. Use `merged`.

    The sums are computed in float32 and rounded once, to the type of the weight. Path, provenance
    and side files are those of the source, and so is the key.
    """

    def __init__(self, source: Checkpoint) -> None:
        """See `merged`."""
        super().__init__(source.path)
        self._source = source

    @cached_property
    def key(self) -> str:
        """Identifies the contents, as that of the source does."""
        return self._source.key

    @cached_property
    def adapter(self) -> None:
        """It is in the weights."""

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. Raises CheckpointError if one is absent."""
        loaded = super().load(names)
        assert self._source.adapter is not None
        corrected = [f"{path}.weight" for path in self._source.adapter.paths]
        sums = self._source.load_weights(name for name in corrected if name in loaded)
        return loaded | {name: weight.to(loaded[name].dtype) for name, weight in sums.items()}


def merged(source: Checkpoint) -> Checkpoint:
    """A view of a checkpoint without an adapter; the checkpoint itself if it has none.

    Raises ValueError if its weights are codes, which take in no correction.
    """
    if source.adapter is None:
        return source
    if source.packed:
        raise ValueError("codes take in no correction")
    return MergedCheckpoint(source)
