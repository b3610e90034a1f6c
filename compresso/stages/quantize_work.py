"""What one quantize run does to a block, and to the head."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.gram import GramSum
from compresso.calibration.originals import Originals
from compresso.calibration.states import States
from compresso.calibration.walk import LiveBlock
from compresso.checkpoint.packings import decoded
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import placed
from compresso.kernels.decomposition import Decomposed, Fisher
from compresso.kernels.gptq import relative_error
from compresso.kernels.matching import moved
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import empty_parameter
from compresso.recipe import Step
from compresso.stages.compensate_forms import with_factors
from compresso.stages.damping import with_damping_raised
from compresso.stages.quantize_layouts import Codes, Layout
from compresso.stages.quantize_parts import Done, Linear, stored
from compresso.stages.quantize_plan import Plan, options_of
from compresso.stages.quantize_tuning import tuned

MATCH_DAMPING = 0.1  # of `moved`


class Work:
    """One quantize run: what its blocks have in common."""

    def __init__(
        self,
        adapter: ModelAdapter,
        source: Checkpoint,
        step: Step,
        plan: Plan,
        layout: Layout,
        fisher: Mapping[str, Fisher] | None = None,
    ) -> None:
        """fisher: of linears, by name in the checkpoint, for a method that goes by it."""
        self.adapter = adapter
        self.source = source
        self.settings = step.settings
        self.plan = plan
        self.layout = layout
        self.tuned = step.method == "autoround"
        self.match: float = getattr(step.settings, "matched", 0.0)
        # AutoRound trains what another method rounded.
        method = registry.method("quantize", self.settings.start if self.tuned else step.method)
        self._fisher = fisher or {}
        self.decomposes = step.method == "lq-lora"  # every linear by itself, and without a gram
        self.calibrated = method.calibrated and not self.decomposes
        self._quantizer: Callable[..., Codes | Decomposed[Any]] = registry.load(method.code)
        chosen = asdict(method.settings()) | asdict(self.settings)
        self._options = options_of(self._quantizer, chosen)
        self._takes_bits = "bits" in self._options

    @property
    def followed(self) -> float:
        """The share of the sequences that the original model is to be run on, from the first."""
        if self.tuned:
            return 1.0
        return self.settings.match_share if self.match else 0.0

    def quantize_block(self, block: LiveBlock, states: States, originals: Originals | None) -> Done:
        """Quantize the linears of a block, which then runs with the decoded ones.

        states:    what enters the block.
        originals: the original model, which has run the block, if `followed`.
        """
        index, prefix = block.index, self.adapter.block_prefix(block.index)
        module = self.adapter.module_prefix(index)
        if (least := getattr(self.settings, "least", None)) is not None:
            block.weigh_tokens(least)
        tensors = self.source.load_weights(self.adapter.block_tensors(index))
        linears: list[Linear] = []
        for number, paths in enumerate(self.plan.groups[index]):
            gram = missing = None
            if self.match and originals is not None:
                gram, missing = originals.gram(block, paths)
            elif self.calibrated:
                gram = block.gram(paths)
            for path in paths:  # their place is taken by the decoded ones
                empty_parameter(block.module, f"{path}.weight")
            found = self._quantize_group(
                [f"{prefix}{path}" for path in paths],
                [self._matrix(tensors.pop(f"{prefix}{path}.weight")) for path in paths],
                gram,
                self.plan.bits[index][number],
                [partial(self.adapter.set_weight, block.module, path) for path in paths],
                missing,
            )
            del gram, missing  # not to be there beside the next ones
            linears += [
                Linear(f"{prefix}{path}", f"{module}{path}", path, count, codes, row)
                for path, (count, codes, row) in zip(paths, found, strict=True)
            ]
        if self.tuned and linears and originals is not None:
            both = states, originals.states
            linears = tuned(self.adapter, self.source, self.settings, block, both, linears)
        return stored(tensors, linears, self.layout, {"block": index})

    def follow(self, block: LiveBlock, originals: Originals, changed: dict[str, Tensor]) -> None:
        """Run a block in the original model; afterwards the block is as before.

        changed: the dense tensors that the block does not have from the source.
        """
        if changed:
            self.adapter.load_block(block.index, self.source)
        if self.match and not block.restored and self.plan.groups[block.index]:
            originals.record(block.index)
        else:
            originals.advance(block.index)
        if changed:
            self.adapter.load_block(block.index, self.source, changed)

    def restored(self, target: CheckpointWriter, index: int) -> dict[str, Tensor] | None:
        """The dense tensors of a block that is committed; None if it is not."""
        if (part := target.restore(index)) is None:
            return None
        config = self.layout.config(self.source.config, part[1]["described"])
        dense = decoded(part[0], config, self.source.dtype)
        beside = target.restore_beside(index) or {}
        return with_factors(dense, beside, transposed=self.adapter.family.transposed)

    def quantize_outside(self, states: States) -> Done:
        """Everything that is in no block, unchanged but for the head where that was asked for."""
        adapter = self.adapter
        tensors = self.source.load(adapter.outside_tensors() + adapter.unmapped_tensors())
        if not self.plan.head:
            return Done(tensors)
        weight = self._matrix(tensors.pop(adapter.head_tensor))
        name = adapter.head_tensor.removesuffix(".weight")
        gram = self._head_gram(states) if self.calibrated else None
        bits, put = self.plan.head_bits, [adapter.set_head]
        [(count, codes, row)] = self._quantize_group([name], [weight], gram, bits, put)
        head = Linear(name, adapter.family.head, "", count, codes, row)
        return stored(tensors, [head], self.layout, {})

    def _quantize_group(
        self,
        names: list[str],
        weights: list[Tensor],
        gram: Tensor | None,
        bits: int | None,
        put: Sequence[Callable[[Tensor], None]],
        missing: Tensor | None = None,
    ) -> list[tuple[int, Codes | Decomposed[Any], dict[str, Any]]]:
        """Quantize linears that read the same input as one matrix of stacked rows.

        put:     what takes each linear's decoded weight, (out, in). Empties `weights`.
        missing: of `moved`, for weights that are to be moved before.
        """
        start = time.perf_counter()
        sizes = [len(weight) for weight in weights]
        stacked = torch.empty(sum(sizes), weights[0].shape[1], device=self.adapter.device)
        for part in reversed(stacked.split(sizes)):
            part.copy_(weights.pop())
        moves: Sequence[float | None] = [None] * len(names)
        if missing is not None and gram is not None:
            stacked, moves = self._moved(stacked, missing, gram, sizes, names[0])
        pieces, damping = self._pieces(stacked, gram, bits, names, sizes)
        seconds = (time.perf_counter() - start) / len(stacked)
        found = []
        parts = zip(names, put, stacked.split(sizes), pieces, moves, strict=True)
        for name, put_decoded, weight, part, move in parts:
            # What later blocks see is what a reader of the checkpoint gets: the decoded weights
            # in the checkpoint's own type, and in float32 what an adapter adds.
            dense = part.decode()
            if not isinstance(part, Decomposed) or not self.settings.pack:
                dense = dense.to(self.source.dtype)
            put_decoded(dense)
            row: dict[str, Any] = {"linear": name}
            if bits is not None:
                row["bits"] = bits
            if move is not None:
                row["moved"] = move
            row["weight_error"] = relative_error(weight, dense)
            if isinstance(part, Decomposed):
                row |= {"rank": len(part.factors.down), "turns": len(part.errors)}
                if name in self._fisher:
                    row["fisher_error"] = part.error
            if gram is not None:
                row["output_error"] = relative_error(weight, dense, gram)
                row["damping"] = damping
            row["seconds"] = seconds * len(weight)
            found.append((weight.numel(), part, row))
        return found

    def _pieces(
        self,
        stacked: Tensor,
        gram: Tensor | None,
        bits: int | None,
        names: list[str],
        sizes: list[int],
    ) -> tuple[Sequence[Codes | Decomposed[Any]], float]:
        """The codes of each of the linears that were stacked, and the damping they took."""
        if not self.decomposes:
            codes, damping = self._round(stacked, gram, bits, names)
            assert not isinstance(codes, Decomposed)
            return codes.split(sizes), damping
        pieces: list[Codes | Decomposed[Any]] = []
        for name, part in zip(names, stacked.split(sizes), strict=True):
            rank = min(self.settings.rank, *part.shape)
            own = {"importance": self._fisher.get(name), "rank": rank}
            pieces.append(self._round(part, None, bits, [name], own)[0])
        return pieces, 0.0

    def _moved(
        self, weight: Tensor, missing: Tensor, gram: Tensor, sizes: list[int], name: str
    ) -> tuple[Tensor, list[float]]:
        """Stacked weights that make up for earlier errors, and how far each linear's moved."""
        with placed(f"`{name}`"):
            found = moved(weight, missing, gram, amount=self.match, damping=MATCH_DAMPING)
        pairs = zip(weight.split(sizes), found.split(sizes), strict=True)
        return found, [relative_error(*pair) for pair in pairs]

    def _round(
        self,
        weight: Tensor,
        gram: Tensor | None,
        bits: int | None,
        names: list[str],
        own: dict[str, Any] | None = None,
    ) -> tuple[Codes | Decomposed[Any], float]:
        """Run the method, with ten times the damping where the gram needs it.

        own: options of these linears alone.
        """
        options = {**self._options, "scale_dtype": self.source.dtype, **(own or {})}
        if self._takes_bits:
            options["bits"] = bits

        def quantize(damping: float) -> Codes | Decomposed[Any]:
            return self._quantizer(
                weight, gram, **options | ({"damping": damping} if damping else {})
            )

        return with_damping_raised(quantize, options.get("damping", 0.0), where=f"`{names[0]}`")

    def _matrix(self, weight: Tensor) -> Tensor:
        """(out, in) from the stored orientation, or back."""
        return weight.T if self.adapter.family.transposed else weight

    def _head_gram(self, states: States) -> Tensor:
        total = GramSum(states.width, self.adapter.device)
        for batch in range(states.batches):
            total.add(self.adapter.head_input(self.source, states[batch]))
            states.release(batch)
        return total.mean()
