"""Let blocks share weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresso.calibration.data import Calibration
from compresso.calibration.opening import open_adapter
from compresso.calibration.probe import probe_of
from compresso.calibration.walk import LiveBlock, States, enter_blocks, walk_blocks
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.gptq import relative_error
from compresso.kernels.lowrank import LowRank, truncate
from compresso.kernels.sharing import mean
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure, restructure, structure_of
from compresso.models.substitution import put_parameter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.fold_plan import Plan, linear_tensors, make_plan
from compresso.stages.prune_choice import Choice

DOWN, UP, BIAS = "correction_down.weight", "correction_up.weight", "correction_up.bias"


@torch.no_grad()
def fold(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Let blocks use the linears of other blocks, each with its own norms, as the method says.

    Shared weights are stored once. With a rank, every linear of a block that lost its own gets a
    low-rank correction towards it, fitted to what reaches it in the folded model. What is not
    shared is stored as it was, bit for bit. A block is committed as soon as it is done; a restarted
    run takes up the plan, and a search for it, where it was.

    Reports a row per block: the block whose linears it `uses`, the `group` of blocks that use the
    same, the `parameters` stored for it, the `damage` its group was predicted to do, and how much
    of what sharing changed the corrections `captured`: a share of the output energy, 1 if nothing
    is lost.

    Peak memory: two blocks' weights, one gram and its factor, and the hidden states of the
    calibration tokens up to the memory budget; for the search see `Streams`.
    """
    _check(source)
    adapter = open_adapter(source, runtime)
    plan = make_plan(Choice(step, adapter, source, calibration, target, runtime))
    work = _Work(adapter, source, plan)
    weighted = calibration is not None and plan.rank > 0 and step.settings.weighted
    probe = probe_of(adapter.config)
    states = enter_blocks(
        adapter,
        source,
        calibration.batches if calibration and weighted else [],
        probe=probe,
        budget=runtime.max_memory,
        spill_dir=target.partial,
    )
    rows = work.write(target, states, weighted=weighted)
    outside = source.load(adapter.outside_tensors() + adapter.unmapped_tensors())
    target.commit(adapter.count, outside, {})
    assert states.probe is not None
    report = Report(rows=rows, config=work.config(), expected=work.expected())
    report.carried = adapter.unmapped_tensors()
    report.fingerprint = Fingerprint(probe, adapter.logits(source, states.probe).cpu())
    report.summary = _summary(source, plan, rows, outside)
    if "slots" in plan.facts:
        report.warnings.append("a looped model has to be healed before it is of use")
    return report


def _check(source: Checkpoint) -> None:
    if source.packed:
        raise ConfigError(
            f"the weights of `{source.path}` are quantized", hint="fold first, then quantize"
        )
    if not structure_of(source.config).plain:
        raise ConfigError(
            f"`{source.path}` lacks parts of blocks, or shares some already",
            hint="fold a checkpoint of whole blocks",
        )


class _Work:
    """One fold run: what its blocks have in common."""

    def __init__(self, adapter: ModelAdapter, source: Checkpoint, plan: Plan) -> None:
        self.adapter = adapter
        self.source = source
        self.plan = plan
        self.paths = adapter.family.all_linears
        self.linears = linear_tensors(adapter)

    def write(
        self, target: CheckpointWriter, states: States, *, weighted: bool
    ) -> list[dict[str, Any]]:
        """Commit the blocks that are not committed yet. Returns a row per block.

        weighted: fit corrections to the inputs that reach the folded blocks before them.
        """
        rows: list[dict[str, Any]] = []

        def restore(index: int) -> dict[str, Tensor] | None:
            if (part := target.restore(index)) is None:
                return None
            rows.append(part[1]["row"])
            return self.dense(index, part[0])

        blocks = walk_blocks(self.adapter, self.source, states, restore=restore)
        for block in track(blocks, self.adapter.count, "fold"):
            if not block.restored:
                tensors, row = self.fold_block(block, weighted=weighted)
                target.commit(block.index, tensors, {"row": row})
                rows.append(row)
        return rows

    def fold_block(
        self, block: LiveBlock, *, weighted: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors to store of a block, and its row. The block becomes the folded one."""
        index, prefix = block.index, self.adapter.block_prefix(block.index)
        linears = {f"{prefix}{name}" for name in self.linears}
        names = [name for name in self.adapter.block_tensors(index) if name not in linears]
        tensors, shared = self.source.load(names), self._shared(index)
        if self.plan.uses[index] == index:
            tensors |= {f"{prefix}{name}": tensor for name, tensor in shared.items()}
        lost: list[float] = []
        for paths in self.adapter.family.linears:
            corrected = index in self.plan.corrected
            gram = block.gram(paths) if corrected and weighted else None
            for path in paths:
                if corrected:
                    factors, error = self._correct(index, path, shared, gram)
                    tensors |= factors
                    lost.append(error)
                for name, tensor in self._folded(index, path, shared, tensors).items():
                    put_parameter(
                        block.module, name, tensor.to(self.adapter.device, self.adapter.dtype)
                    )
        row = self._row(index, tensors)
        if self.plan.rank:
            row["captured"] = 1 - sum(lost) / max(1, len(lost))
        return tensors, row

    def dense(self, index: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the folded block by name in the source, from those stored of it."""
        prefix, shared = self.adapter.block_prefix(index), self._shared(index)
        tensors = dict(stored)
        for path in self.paths:
            for name, tensor in self._folded(index, path, shared, stored).items():
                tensors[f"{prefix}{name}"] = tensor
        return tensors

    def _shared(self, index: int) -> dict[str, Tensor]:
        """The linears' tensors that a block uses, as they are stored, by name within a block."""
        origin = [self.adapter.block_prefix(block) for block in self.plan.made_from[index]]
        found = {}
        for name in self.linears:
            tensors = self.source.load(f"{prefix}{name}" for prefix in origin)
            first = tensors[f"{origin[0]}{name}"]
            found[name] = first if len(origin) == 1 else mean(tensors.values()).to(first.dtype)
        return found

    def _correct(
        self, index: int, path: str, shared: dict[str, Tensor], gram: Tensor | None
    ) -> tuple[dict[str, Tensor], float]:
        """The stored correction of a linear, and how much of the weight's change it leaves."""
        name = f"{self.adapter.block_prefix(index)}{path}"
        kinds = [kind for kind in ("weight", "bias") if f"{path}.{kind}" in shared]
        own = self.source.load_weights(f"{name}.{kind}" for kind in kinds)
        changes = [
            own[f"{name}.{kind}"].float() - shared[f"{path}.{kind}"].float() for kind in kinds
        ]
        dtype = own[f"{name}.weight"].dtype
        change = self._turned(changes[0]).to(self.adapter.device)
        found = truncate(change, self.plan.rank, gram)
        up, down = found.up.to(dtype), found.down.to(dtype)
        left = relative_error(change, LowRank(up.float(), down.float()).product(), gram)
        tensors = {f"{name}.{UP}": up.cpu(), f"{name}.{DOWN}": down.cpu()}
        return tensors | {f"{name}.{BIAS}": bias.to(dtype) for bias in changes[1:]}, left

    def _folded(
        self, index: int, path: str, shared: dict[str, Tensor], stored: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A linear's tensors as the folded block runs it, by name within the block.

        stored: has the block's corrections, if there are any, by name in the checkpoint.
        """
        found = {name: shared[name] for name in shared if name.startswith(f"{path}.")}
        if index in self.plan.corrected:
            name = f"{self.adapter.block_prefix(index)}{path}"
            product = stored[f"{name}.{UP}"].float() @ stored[f"{name}.{DOWN}"].float()
            found[f"{path}.weight"] = found[f"{path}.weight"].float() + self._turned(product)
            if (bias := f"{path}.bias") in found:
                found[bias] = found[bias].float() + stored[f"{name}.{BIAS}"].float()
        return found

    def _turned(self, weight: Tensor) -> Tensor:
        """(out, in) from the stored orientation, or back."""
        return weight.T if self.adapter.family.transposed else weight

    def _row(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        uses = self.plan.uses
        row: dict[str, Any] = {"block": index, "uses": uses[index]}
        row["group"] = list(dict.fromkeys(uses)).index(uses[index])
        row |= {"parameters": _parameters(tensors), "bytes": _bytes(tensors)}
        if "groups" in self.plan.facts:
            row["damage"] = self.plan.damage.get(str(index), 0.0)
        return row

    def config(self) -> dict[str, Any]:
        """The config.json of the folded model."""
        structure = Structure(
            shared=tuple(self.plan.uses),
            rank=self.plan.rank,
            corrected=tuple(self.plan.corrected),
        )
        return restructure(self.source.config, structure)

    def expected(self) -> list[str]:
        """Names of all tensors the output holds."""
        names = set(self.source.names())
        for index in range(self.adapter.count):
            prefix = self.adapter.block_prefix(index)
            if self.plan.uses[index] != index:
                names -= {f"{prefix}{name}" for name in self.linears}
            if index in self.plan.corrected:
                names |= {f"{prefix}{path}.{end}" for path in self.paths for end in (DOWN, UP)}
                biased = [path for path in self.paths if f"{path}.bias" in self.linears]
                names |= {f"{prefix}{path}.{BIAS}" for path in biased}
        return sorted(names)


def _summary(
    source: Checkpoint, plan: Plan, rows: list[dict[str, Any]], outside: dict[str, Tensor]
) -> dict[str, Any]:
    """What the model came to; sizes are of what is stored."""
    parameters = sum(row["parameters"] for row in rows) + _parameters(outside)
    stored = sum(row["bytes"] for row in rows) + _bytes(outside)
    compute = f"unchanged: all {len(rows)} blocks run"
    if plan.rank:
        compute += f", {len(plan.corrected)} of them with corrections on top"
    return plan.facts | {
        "rank": plan.rank,
        "unique_blocks": len(set(plan.uses)),
        "saved_share": 1 - parameters / source.parameters,
        "parameters_before": source.parameters,
        "parameters_after": parameters,
        "bytes_before": source.stored_bytes,
        "bytes_after": stored,
        "compute": compute,
    }


def _parameters(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
