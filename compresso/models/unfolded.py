"""A restructured model in plainer form: what blocks share copied, what they lack as zeros."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresso.checkpoint.adapter_folder import AdapterFolder
from compresso.checkpoint.directory import TensorInfo
from compresso.checkpoint.packings import Packing
from compresso.checkpoint.reader import Checkpoint
from compresso.families import Family, family_of
from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.config import config_of
from compresso.models.corrected import BIAS, DOWN, UP, is_factor
from compresso.models.structure import Structure, halves, needs_code, restructure, structure_of

ENTRY = "quantization_config"


def unfolded(source: Checkpoint, *, fill: bool | Collection[int]) -> Checkpoint:
    """A view of a checkpoint in which every block has its own linears and no corrections.

    fill: also put zeros where an attention or an MLP was removed, which adds nothing to the
          residual stream: then the stock class runs it. Or of these the sub-blocks to do so for:
          2 i is the attention of block i, 2 i + 1 its MLP. Others are still missing, and `config`
          says so.

    Codes stay codes where no correction is added to them. The sums are computed in float32 and
    rounded once. A source that shares, lacks and corrects nothing is itself returned, unless it is
    stored as codes that only compresso's own class runs.
    """
    if not needs_code(source.config):
        return source
    return UnfoldedCheckpoint(source, fill=fill)


class UnfoldedCheckpoint(Checkpoint):
    """Reads as a checkpoint does. Use `unfolded`.

    Path, provenance and side files are those of the source, and so is the key.

    added:  dense tensors that the source does not store -> `copied`, `zeros` or `summed`.
    owners: path of every linear that is a copy here -> path of it in the source.
    """

    def __init__(self, source: Checkpoint, *, fill: bool | Collection[int]) -> None:
        """See `unfolded`."""
        super().__init__(source.path)
        self._source = source
        structure = structure_of(source.config)
        removed = [2 * block for block in structure.no_attention]
        removed += [2 * block + 1 for block in structure.no_mlp]
        filled = {s for s in removed if fill is True or (fill and s in fill)}
        kept = Structure(
            tuple(s // 2 for s in removed if s % 2 == 0 and s not in filled),
            tuple(s // 2 for s in removed if s % 2 and s not in filled),
        )
        plain = {key: value for key, value in source.config.items() if key != ENTRY}
        self.config = restructure(plain, kept)
        family = family_of(source.config["model_type"])
        adapter = ModelAdapter.open(source, dtype=source.dtype, device=torch.device("cpu"))
        self._prefix = adapter.blocks_prefix
        self._infos = {name: source.info(name) for name in source.names() if not is_factor(name)}
        self.added: dict[str, str] = {}
        self._aliases: dict[str, str] = {}  # stored name here -> in the source
        self.owners: dict[str, str] = {}
        self._sums: dict[str, tuple[str, str]] = {}  # of these two: the source's and a correction's
        for block in range(adapter.count):
            self._own(block, family, structure)
        if filled:
            self._fill(family, filled)
        self._infos = dict(sorted(self._infos.items()))

    def _own(self, block: int, family: Family, structure: Structure) -> None:
        """Give a block the linears that it shares, and add its corrections to them."""
        owner, corrected = structure.owner(block), block in structure.corrected
        if owner == block and not corrected:
            return
        for mlp, half in enumerate(halves(family)):
            if structure.lacks(2 * block + mlp):
                continue
            for path in half.linears:
                here, there = f"{self._prefix}{block}.{path}", f"{self._prefix}{owner}.{path}"
                for ending in ("weight", "bias"):
                    if f"{there}.{ending}" in self._source.weight_names():
                        self._take(here, there, ending, corrected=corrected)

    def _take(self, here: str, there: str, ending: str, *, corrected: bool) -> None:
        name, theirs = f"{here}.{ending}", f"{there}.{ending}"
        packed = ending == "weight" and there in self._source.packing.shapes
        if corrected:
            correction = f"{here}.{UP}" if ending == "weight" else f"{here}.{BIAS}"
            info = self._source.weight_info(theirs)
            self._sums[name] = (theirs, correction)
            if packed and here == there:
                for stored in self._source.packing.names(there):
                    del self._infos[stored]
            size = info.dtype.itemsize * torch.Size(info.shape).numel()
            self._infos[name] = TensorInfo(info.shape, info.dtype, size, "")
            self.added[name] = "summed"
        elif packed:
            for stored in self._source.packing.names(there):
                copied = here + stored.removeprefix(there)
                self._aliases[copied] = stored
                self._infos[copied] = self._source.info(stored)
            self.added[name] = "copied"
        else:
            self._aliases[name] = theirs
            self._infos[name] = self._source.info(theirs)
            self.added[name] = "copied"
        if ending == "weight":
            self.owners[here] = there

    def _fill(self, family: Family, filled: set[int]) -> None:
        """Put zeros where something was removed, of the shapes that the stock class has."""
        with init_empty_weights(include_buffers=False):
            stock = AutoModelForCausalLM.from_config(config_of(self))
        for name, parameter in stock.named_parameters():
            if not name.startswith(f"{family.blocks}."):
                continue
            block, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
            for mlp, half in enumerate(halves(family)):
                parts = tuple(f"{part}." for part in (*half.modules, *half.norms))
                if 2 * int(block) + mlp in filled and path.startswith(parts):
                    stored, dtype = f"{self._prefix}{block}.{path}", self._source.dtype
                    size = parameter.numel() * dtype.itemsize
                    self._infos[stored] = TensorInfo(tuple(parameter.shape), dtype, size, "")
                    self.added[stored] = "zeros"

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU. Raises CheckpointError if one is absent."""
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            info = self.info(name)
            if name in self._sums:
                found[name] = self._sum(name)
            elif self.added.get(name) == "zeros":
                found[name] = torch.zeros(info.shape, dtype=info.dtype)
            else:
                stored = self._aliases.get(name, name)
                found[name] = self._source.load([stored])[stored]
        return found

    def _sum(self, name: str) -> Tensor:
        theirs, correction = self._sums[name]
        weight = self._bare(theirs)
        if name.endswith(".bias"):
            return (weight.float() + self._source.load([correction])[correction]).to(weight.dtype)
        down = correction.removesuffix(UP) + DOWN
        factors = self._source.load([correction, down])
        product = factors[correction].float() @ factors[down].float()
        turned = product.T if self._transposed else product
        return (weight.float() + turned).to(weight.dtype)

    def _bare(self, name: str) -> Tensor:
        """A dense tensor of the source without what an adapter adds, which `load_weights` does."""
        path = name.removesuffix(".weight")
        packing = self._source.packing
        if path == name or path not in packing.shapes:
            return self._source.load([name])[name]
        return packing.decode(path, self._source.load(packing.names(path))).to(self._source.dtype)

    @cached_property
    def packed(self) -> bool:
        """Whether some linears are stored as codes that `load_weights` decodes."""
        return bool(self.packing.shapes)

    @cached_property
    def packing(self) -> Packing:
        """How the linears are stored that are stored as codes."""
        summed = {name.removesuffix(".weight") for name in self._sums}
        return _Shared(self._source.packing, self.owners, summed)

    @cached_property
    def adapter(self) -> AdapterFolder | None:
        """The corrections beside it: those of a shared linear are those of every copy."""
        found = self._source.adapter
        return None if found is None else _Copied(found, self.owners)  # type: ignore[return-value]

    @cached_property
    def key(self) -> str:
        """Identifies the contents, as that of the source does."""
        return self._source.key


class _Shared:
    """A packing in which further paths stand for linears of it, and some of its are dense."""

    def __init__(self, packing: Packing, owners: dict[str, str], dense: set[str]) -> None:
        paths = {path: path for path in packing.shapes}
        paths |= {path: owner for path, owner in owners.items() if owner in packing.shapes}
        self._packing = packing
        self._owners = {path: owner for path, owner in paths.items() if path not in dense}
        self.shapes = {path: packing.shapes[owner] for path, owner in self._owners.items()}

    def names(self, path: str) -> list[str]:
        """See `Packing`."""
        owner = self._owners[path]
        return [path + name.removeprefix(owner) for name in self._packing.names(owner)]

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """See `Packing`."""
        return self._packing.decode(self._owners[path], self._renamed(path, parts))

    def uniform(self, path: str, parts: dict[str, Tensor]) -> Packed | AffineCodes | None:
        """See `Packing`."""
        return self._packing.uniform(self._owners[path], self._renamed(path, parts))

    def kind(self, path: str) -> dict[str, Any]:
        """See `Packing`."""
        return self._packing.kind(self._owners[path])

    def _renamed(self, path: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._owners[path] + n.removeprefix(path): parts[n] for n in self.names(path)}


class _Copied:
    """An adapter that corrects every copy of a linear as it does that linear."""

    def __init__(self, adapter: AdapterFolder, owners: dict[str, str]) -> None:
        self._adapter = adapter
        own = {path: path for path in adapter.paths}
        self._owners = own | {path: o for path, o in owners.items() if o in adapter.ranks}
        self.ranks = {path: adapter.ranks[o] for path, o in sorted(self._owners.items())}
        self.sizes = {path: adapter.sizes[o] for path, o in self._owners.items()}
        self.key = adapter.key

    @property
    def paths(self) -> list[str]:
        """See `AdapterFolder`."""
        return list(self.ranks)

    @property
    def nbytes(self) -> int:
        """See `AdapterFolder`."""
        return sum(self.sizes.values())

    def load(self, paths: Iterable[str]) -> dict[str, LowRank]:
        """See `AdapterFolder`."""
        wanted = [path for path in dict.fromkeys(paths) if path in self._owners]
        found = self._adapter.load(self._owners[path] for path in wanted)
        return {path: found[self._owners[path]] for path in wanted}
