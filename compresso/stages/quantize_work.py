"""What one quantize run does to a block, and to the head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.gram import GramSum
from compresso.calibration.originals import Originals
from compresso.calibration.states import States
from compresso.calibration.tuning import Rule, tune_block
from compresso.calibration.walk import LiveBlock
from compresso.checkpoint.packings import decoded
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import NumericalError
from compresso.kernels.gptq import relative_error
from compresso.kernels.matching import moved
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import empty_parameter
from compresso.recipe import Step
from compresso.stages.damping import with_damping_raised
from compresso.stages.quantize_layouts import Codes, Described, Layout
from compresso.stages.quantize_plan import Plan, options_of

MATCH_DAMPING = 0.1  # of `moved`
# How AutoRound moves from what another method rounded.
RULE: dict[str, Rule] = {"rtn": "sign", "gptq": "gradient"}


@dataclass(frozen=True)
class Done:
    """What is stored of a block, or of what is in none.

    tensors: by name. rows: one for each quantized linear. described: what config.json has to say.
    """

    tensors: dict[str, Tensor]
    rows: list[dict[str, Any]]
    described: list[Described]


@dataclass(frozen=True)
class _Linear:
    """A quantized linear.

    name: in the checkpoint. module: in transformers. path: in its block. weights: how many it has.
    """

    name: str
    module: str
    path: str
    weights: int
    codes: Codes
    row: dict[str, Any]


class Work:
    """One quantize run: what its blocks have in common."""

    def __init__(
        self, adapter: ModelAdapter, source: Checkpoint, step: Step, plan: Plan, layout: Layout
    ) -> None:
        self.adapter = adapter
        self.source = source
        self.settings = step.settings
        self.plan = plan
        self.layout = layout
        self.tuned = step.method == "autoround"
        self.match: float = getattr(step.settings, "match", 0.0)
        # AutoRound trains what another method rounded.
        method = registry.method("quantize", self.settings.start if self.tuned else step.method)
        self.calibrated = method.calibrated
        self._quantizer: Callable[..., Codes] = registry.load(method.code)
        chosen = asdict(method.settings()) | asdict(self.settings)
        self._options = options_of(self._quantizer, chosen)
        self._takes_bits = "bits" in self._options

    @property
    def followed(self) -> float:
        """The share of the sequences that the original model is to be run on, from the first."""
        return self.settings.match_share if self.match else float(self.tuned)

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
        linears: list[_Linear] = []
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
                _Linear(f"{prefix}{path}", f"{module}{path}", path, count, codes, row)
                for path, (count, codes, row) in zip(paths, found, strict=True)
            ]
        if self.tuned and linears and originals is not None:
            linears = self._tune(block, states, originals.states, linears)
        return self._stored(tensors, linears, {"block": index})

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

    def restored(self, tensors: dict[str, Tensor], described: list[Described]) -> dict[str, Tensor]:
        """The dense form of the tensors that are stored of a block."""
        config = self.layout.config(self.source.config, described)
        return decoded(tensors, config, self.source.dtype)

    def quantize_outside(self, states: States) -> Done:
        """Everything that is in no block, unchanged but for the head where that was asked for."""
        adapter = self.adapter
        tensors = self.source.load(adapter.outside_tensors() + adapter.unmapped_tensors())
        if not self.plan.head:
            return Done(tensors, [], [])
        weight = self._matrix(tensors.pop(adapter.head_tensor))
        name = adapter.head_tensor.removesuffix(".weight")
        gram = self._head_gram(states) if self.calibrated else None
        bits, put = self.plan.head_bits, [adapter.set_head]
        [(count, codes, row)] = self._quantize_group([name], [weight], gram, bits, put)
        head = _Linear(name, adapter.family.head, "", count, codes, row)
        return self._stored(tensors, [head], {})

    def _quantize_group(
        self,
        names: list[str],
        weights: list[Tensor],
        gram: Tensor | None,
        bits: int | None,
        put: Sequence[Callable[[Tensor], None]],
        missing: Tensor | None = None,
    ) -> list[tuple[int, Codes, dict[str, Any]]]:
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
        codes, damping = self._round(stacked, gram, bits, names)
        seconds = (time.perf_counter() - start) / len(stacked)
        found = []
        pieces: Sequence[Codes] = codes.split(sizes)
        parts = zip(names, put, stacked.split(sizes), pieces, moves, strict=True)
        for name, put_decoded, weight, part, move in parts:
            # What later blocks see is what a reader of the checkpoint gets: the decoded weights
            # in the checkpoint's own type.
            dense = part.decode().to(self.source.dtype)
            put_decoded(dense)
            row: dict[str, Any] = {"linear": name}
            if bits is not None:
                row["bits"] = bits
            if move is not None:
                row["moved"] = move
            row["weight_error"] = relative_error(weight, dense)
            if gram is not None:
                row["output_error"] = relative_error(weight, dense, gram)
                row["damping"] = damping
            row["seconds"] = seconds * len(weight)
            found.append((weight.numel(), part, row))
        return found

    def _moved(
        self, weight: Tensor, missing: Tensor, gram: Tensor, sizes: list[int], name: str
    ) -> tuple[Tensor, list[float]]:
        """Stacked weights that make up for earlier errors, and how far each linear's moved."""
        try:
            found = moved(weight, missing, gram, amount=self.match, damping=MATCH_DAMPING)
        except NumericalError as error:
            raise NumericalError(f"`{name}`: {error}", hint=error.hint) from error
        pairs = zip(weight.split(sizes), found.split(sizes), strict=True)
        return found, [relative_error(*pair) for pair in pairs]

    def _round(
        self, weight: Tensor, gram: Tensor | None, bits: int | None, names: list[str]
    ) -> tuple[Codes, float]:
        """Run the method, with ten times the damping where the gram needs it."""
        options = {**self._options, "scale_dtype": self.source.dtype}
        if self._takes_bits:
            options["bits"] = bits

        def quantize(damping: float) -> Codes:
            return self._quantizer(
                weight, gram, **options | ({"damping": damping} if damping else {})
            )

        return with_damping_raised(quantize, options.get("damping", 0.0), where=f"`{names[0]}`")

    def _tune(
        self, block: LiveBlock, states: States, originals: States, linears: list[_Linear]
    ) -> list[_Linear]:
        """The same linears with trained roundings, in place in the block."""
        start, settings = time.perf_counter(), self.settings
        weights = {
            linear.path: self._matrix(
                self.source.load_weights([f"{linear.name}.weight"])[f"{linear.name}.weight"]
            ).to(self.adapter.device, torch.float32)
            for linear in linears
        }
        tuned = tune_block(
            self.adapter,
            states,
            block.index,
            {linear.path: (weights[linear.path], linear.codes) for linear in linears},  # type: ignore[misc]
            targets=originals,
            symmetric=settings.symmetric,
            steps=settings.steps,
            sequences=settings.sequences,
            seed=settings.seed,
            rule=RULE[settings.start],
        )
        share = (time.perf_counter() - start) / len(linears)
        found = []
        for linear in linears:
            codes = tuned.packed[linear.path]
            dense = codes.decode().to(self.source.dtype)
            self.adapter.set_weight(block.module, linear.path, dense)
            row = {"linear": linear.name, "bits": linear.row["bits"]}
            row["weight_error"] = relative_error(weights[linear.path], dense)
            row |= {"block_error_before": tuned.before, "block_error": tuned.after}
            row["seconds"] = linear.row["seconds"] + share
            found.append(replace(linear, codes=codes, row=row))
        block.forget()
        return found

    def _stored(
        self, tensors: dict[str, Tensor], linears: list[_Linear], row: dict[str, Any]
    ) -> Done:
        """Everything that is stored: tensors that stayed as they were, and packed linears."""
        done = Done(tensors, [], [])
        for linear in linears:
            packed, described = self.layout.pack(linear.name, linear.module, linear.codes)
            tensors |= packed
            size = sum(tensor.nbytes for tensor in packed.values())
            stored = {"stored_bits": 8 * size / linear.weights, "parameters": linear.weights}
            done.rows.append({**row, **linear.row, **stored})
            done.described.append(described)
        return done

    def _matrix(self, weight: Tensor) -> Tensor:
        """(out, in) from the stored orientation, or back."""
        return weight.T if self.adapter.family.transposed else weight

    def _head_gram(self, states: States) -> Tensor:
        total = GramSum(states.width, self.adapter.device)
        for batch in range(states.batches):
            total.add(self.adapter.head_input(self.source, states[batch]))
            states.release(batch)
        return total.mean()
