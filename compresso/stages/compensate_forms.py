"""Where corrections go: into the weights, beside them as an adapter, or into the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.corrected import DOWN, UP, is_factor
from compresso.models.substitution import put_parameter

Factors = dict[str, LowRank]  # by path of the linear in the checkpoint
FACTOR_UP, FACTOR_DOWN = ".up", ".down"


@dataclass(frozen=True)
class Settled:
    """A correction as it is stored.

    change:  what it adds to the weight, (rows, columns) float32.
    tensors: what is stored for it among those of the block, by name, in place of any others.
    beside:  what is kept beside them for the adapter, by name; see `factors_of`.
    nbytes:  what the checkpoint grows by.
    """

    change: Tensor
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]
    nbytes: int


class Form(Protocol):
    """A way to store corrections, and to run blocks with them."""

    def settle(self, name: str, weight: Tensor, found: LowRank) -> Settled:
        """A correction in the numbers that are stored.

        name: of the linear in the checkpoint. weight: without it, (rows, columns) float32.
        """
        ...

    def put(self, block: nn.Module, path: str, weight: Tensor, settled: Settled) -> None:
        """Let a linear of a loaded block run with it."""
        ...

    def restored(
        self, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Those dense tensors of a block that are not as in the source.

        tensors: what is stored of it. beside: what is kept beside it.
        """
        ...


@dataclass(frozen=True)
class Merged:
    """Corrections added to dense weights, which are rounded to the type that they had."""

    adapter: ModelAdapter
    dtype: torch.dtype

    def settle(self, name: str, weight: Tensor, found: LowRank) -> Settled:
        """See `Form`."""
        merged = (weight + found.product()).to(self.dtype)
        turned = merged.T if self.adapter.family.transposed else merged
        stored = {f"{name}.weight": turned.contiguous().cpu()}
        return Settled(merged.float() - weight, stored, {}, 0)

    def put(self, block: nn.Module, path: str, weight: Tensor, settled: Settled) -> None:
        """See `Form`."""
        self.adapter.set_weight(block, path, weight + settled.change)

    def restored(
        self, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Form`."""
        return dict(tensors)


@dataclass(frozen=True)
class Beside:
    """An adapter beside weights that stay as they are, bit by bit."""

    adapter: ModelAdapter
    source: Checkpoint

    def settle(self, name: str, weight: Tensor, found: LowRank) -> Settled:
        """See `Form`."""
        rounded = _rounded(found, self.source.dtype)
        beside = factor_tensors({name: rounded}, self.source.dtype)
        return Settled(rounded.product(), {}, beside, _nbytes(beside))

    def put(self, block: nn.Module, path: str, weight: Tensor, settled: Settled) -> None:
        """See `Form`."""
        self.adapter.set_weight(block, path, weight + settled.change)

    def restored(
        self, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Form`."""
        dense = self.source.load_weights(f"{name}.weight" for name in factors_of(beside))
        return with_factors(dense, beside, transposed=self.adapter.family.transposed)


@dataclass(frozen=True)
class Within:
    """Corrections that blocks apply themselves, as they share weights with others.

    source: as `CorrectedCheckpoint` reads it.
    """

    adapter: ModelAdapter
    source: Checkpoint

    def settle(self, name: str, weight: Tensor, found: LowRank) -> Settled:
        """See `Form`."""
        rounded = _rounded(found, self.source.dtype)
        stored = {f"{name}.{UP}": rounded.up, f"{name}.{DOWN}": rounded.down}
        tensors = {key: factor.to(self.source.dtype).cpu() for key, factor in stored.items()}
        return Settled(rounded.product(), tensors, {}, _nbytes(tensors))

    def put(self, block: nn.Module, path: str, weight: Tensor, settled: Settled) -> None:
        """See `Form`."""
        for name, tensor in settled.tensors.items():
            ending = name[name.index(".correction_") :]
            stored = tensor.to(self.adapter.device, self.adapter.dtype)
            put_parameter(block, f"{path}{ending}", stored)

    def restored(
        self, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Form`."""
        return {name: tensor for name, tensor in tensors.items() if is_factor(name)}


def factor_tensors(factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Corrections that are exact in `dtype` as tensors to be kept beside a part."""
    found: dict[str, Tensor] = {}
    for name, one in factors.items():
        found[f"{name}{FACTOR_UP}"] = one.up.to(dtype).cpu()
        found[f"{name}{FACTOR_DOWN}"] = one.down.to(dtype).cpu()
    return found


def factors_of(beside: Mapping[str, Tensor]) -> Factors:
    """The corrections among what was kept beside a part: the inverse of `factor_tensors`."""
    names = [name.removesuffix(FACTOR_UP) for name in beside if name.endswith(FACTOR_UP)]
    return {
        name: LowRank(beside[f"{name}{FACTOR_UP}"].float(), beside[f"{name}{FACTOR_DOWN}"].float())
        for name in names
    }


class KeptFactors(Mapping[str, LowRank]):
    """The corrections that parts were committed with, by path; one part is in memory at a time."""

    def __init__(self, target: CheckpointWriter, parts: int) -> None:
        """parts: how many are committed."""
        self._target = target
        self._part_of: dict[str, int] = {}
        self._now: tuple[int, Factors] = -1, {}
        for part in range(parts):
            self._part_of |= dict.fromkeys(self._load(part), part)

    def __getitem__(self, path: str) -> LowRank:
        return self._load(self._part_of[path])[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)

    def _load(self, part: int) -> Factors:
        if part != self._now[0]:
            self._now = part, factors_of(self._target.restore_beside(part) or {})
        return self._now[1]


def with_factors(
    dense: Mapping[str, Tensor], beside: Mapping[str, Tensor], *, transposed: bool
) -> dict[str, Tensor]:
    """Dense tensors by name with the corrections that were kept beside them added, in float32."""
    found = dict(dense)
    for name, one in factors_of(beside).items():
        product = one.product()
        found[f"{name}.weight"] = found[f"{name}.weight"].float() + (
            product.T if transposed else product
        )
    return found


def _rounded(factors: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(factors.up.to(dtype).float(), factors.down.to(dtype).float())


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
