"""What one run of `eora` does to a block: find what its linears lack, and correct them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compresso.calibration.following import Following
from compresso.calibration.walk import LiveBlock
from compresso.errors import placed
from compresso.kernels.gptq import relative_error
from compresso.kernels.lowrank import truncate
from compresso.kernels.matching import moved
from compresso.models.corrected import BIAS
from compresso.models.substitution import put_parameter
from compresso.stages.compensate_forms import Form
from compresso.stages.pair import Pair

MATCH_DAMPING = 0.01  # of `moved`


@dataclass(frozen=True)
class Sought:
    """What a linear lacks.

    path:   in its block. name: in the checkpoint.
    weight: as it is, (rows, columns) float32. change: what would make up for all that it lacks,
            likewise.
    gram:   of its input, (columns, columns) float32; None if it was not asked for.
    """

    path: str
    name: str
    weight: Tensor
    change: Tensor
    gram: Tensor | None


@dataclass(frozen=True)
class Done:
    """What is stored of a block. See `Settled`; rows: one for each corrected linear."""

    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """One run: what its blocks have in common.

    weighted: by grams. match: how much of what was lost in earlier blocks is sought, too.
    """

    pair: Pair
    weighted: bool
    match: float

    def seek(self, block: LiveBlock, following: Following | None) -> Iterator[Sought]:
        """What the linears of a block lack, in execution order, without those that lack nothing.

        The caller may change each before it asks for the next.

        following: the original, which has run the block, if what was lost earlier is sought.
        """
        index, pair = block.index, self.pair
        for paths in pair.groups(index):
            weights = {path: pair.weight(index, path) for path in paths}
            changes = {path: pair.whole(index, path) - weights[path] for path in paths}
            gram = None
            if following is not None:
                gram = self._match(block, following, weights, changes)
            elif self.weighted and any(bool(one.count_nonzero()) for one in changes.values()):
                gram = block.gram(paths)
            for path in paths:
                if bool(changes[path].count_nonzero()):
                    name = pair.name(index, path)
                    yield Sought(path, name, weights[path], changes[path], gram)

    def correct(
        self, block: LiveBlock, following: Following | None, form: Form, ranks: Mapping[str, int]
    ) -> Done:
        """Correct the linears of a block, which then runs with them.

        ranks: of every linear's correction, by its name in the checkpoint.
        """
        done = Done(self.pair.source.load(self.pair.stored(block.index)), {}, [])
        self._correct_biases(block, done.tensors)
        for sought in self.seek(block, following):
            if not (rank := ranks.get(sought.name, 0)):
                continue
            with placed(f"`{sought.name}`"):
                found = truncate(sought.change, rank, sought.gram)
            settled = form.settle(sought.name, sought.weight, found)
            form.put(block.module, sought.path, sought.weight, settled)
            done.tensors.update(settled.tensors)
            done.beside.update(settled.beside)
            row = {"block": block.index, "linear": sought.name, "rank": rank}
            done.rows.append(row | _errors(sought, settled.change) | {"bytes": settled.nbytes})
        return done

    def _match(
        self,
        block: LiveBlock,
        following: Following,
        weights: Mapping[str, Tensor],
        changes: dict[str, Tensor],
    ) -> Tensor:
        """The gram of an input group; adds to the changes what makes up for earlier losses."""
        adapter, paths = self.pair.adapter, tuple(weights)
        owner = adapter.blocks[adapter.structure.owner(block.index)]
        for path in paths:  # with the original's weights, all that is missing was lost earlier
            adapter.set_weight(owner, path, weights[path] + changes[path])
        gram, missing = following.originals.gram(block, paths)
        for path, part in zip(paths, missing.split(list(map(len, weights.values()))), strict=True):
            adapter.set_weight(owner, path, weights[path])
            change = changes[path]
            with placed(f"`{self.pair.name(block.index, path)}`"):
                changes[path] = moved(change, part, gram, amount=self.match, damping=MATCH_DAMPING)
        return gram

    def _correct_biases(self, block: LiveBlock, tensors: dict[str, Tensor]) -> None:
        """Where corrections of a block have biases, let these be what its linears' lack."""
        adapter, prefix = self.pair.adapter, self.pair.adapter.block_prefix(block.index)
        for name in [name for name in tensors if name.endswith(f".{BIAS}")]:
            path = name.removeprefix(prefix).removesuffix(f".{BIAS}")
            tensors[name] = self.pair.bias(block.index, path).to(tensors[name].dtype)
            stored = tensors[name].to(adapter.device, adapter.dtype)
            put_parameter(block.module, f"{path}.{BIAS}", stored)


def _errors(sought: Sought, change: Tensor) -> dict[str, float]:
    """Squared errors before and after, of the output, or of the weight where no gram is known.

    Relative to the square of what would lack nothing.
    """
    kind = "weight" if sought.gram is None else "output"
    wanted = sought.weight + sought.change
    return {
        f"{kind}_error_before": relative_error(wanted, sought.weight, sought.gram),
        f"{kind}_error": relative_error(wanted, sought.weight + change, sought.gram),
    }
