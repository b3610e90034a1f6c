"""A checkpoint as it will be once some of its weights have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.lowrank import LowRank


@dataclass(frozen=True)
class _Corrections:
    """Stands for an adapter that is not written yet."""

    factors: Mapping[str, LowRank]

    @property
    def sizes(self) -> dict[str, int]:
        return dict.fromkeys(self.factors, 0)

    def load(self, paths: Iterable[str]) -> dict[str, LowRank]:
        return {path: self.factors[path] for path in paths if path in self.factors}


class ChangedCheckpoint(Checkpoint):
    """Reads as the source does, but with other weights; nothing of it is on the disk.

    `names`, `info` and `load` still give what is.
    """

    def __init__(
        self,
        source: Checkpoint,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        corrections: Mapping[str, LowRank] | None = None,
    ) -> None:
        """tensors: dense ones that `load_weights` gives in place of those stored. Not modified.

        corrections: of linears, in place of those of an adapter beside the source; None for none.
        """
        super().__init__(source.path)
        self._tensors = dict(tensors or {})
        self.adapter = _Corrections(corrections) if corrections else None  # type: ignore[assignment]

    def load_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As a checkpoint does, but for what has changed."""
        wanted = list(dict.fromkeys(names))
        found = super().load_weights(name for name in wanted if name not in self._tensors)
        found |= {name: self._tensors[name] for name in wanted if name in self._tensors}
        return found
