"""Write a model part by part: a shard for every block, with at most one matrix worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.formats.matrices import Matrix, corrected, matrices
from compresso.formats.writing import Export, Written
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules
from compresso.models.structure import Structure, restructure, structure_of
from compresso.models.unfolded import ENTRY, UnfoldedCheckpoint
from compresso.runtime import track

How = Literal["repacked", "rescaled", "rounded", "decoded", "copied", "zeros", "summed", "kept"]


@dataclass(frozen=True)
class Stored:
    """What a format stores for a matrix.

    tensors:   by name. form: in a few words, the same for matrices stored alike.
    how:       `repacked`: the codes that the source has, exactly; `rescaled`: these, but scales are
               rounded to another type; `rounded`: codes found now.
    described: what its config.json has to say about it, in plain values.
    """

    tensors: dict[str, Tensor]
    form: str
    how: How
    described: dict[str, Any] = field(default_factory=dict)


Pack = Callable[[Matrix], Stored | None]


@dataclass(frozen=True)
class Parts:
    """What `write_parts` wrote.

    expected: names of all tensors. rows: as `tally` returns them. described: of every matrix that
    is stored as codes, by its path in transformers. kept: modules of the matrices that are dense.
    rounded:  names of the dense weights whose codes were found now.
    """

    expected: list[str]
    rows: list[dict[str, Any]]
    described: dict[str, dict[str, Any]]
    kept: list[str]
    rounded: list[str]


def write_parts(
    export: Export,
    model: Checkpoint,
    adapter: ModelAdapter,
    pack: Pack,
    *,
    also: Mapping[int, dict[str, Tensor]] | None = None,
) -> Parts:
    """Commit a part for every block of a model and one for the rest, one matrix at a time.

    model:   one of the export's. adapter: its architecture.
    pack:    what to store for a matrix; None to store its dense weight.
    also:    further tensors, zeros, that the format asks for: by block, by name.

    Parts that an earlier run committed are taken as they are.
    """
    by_path = {matrix.path: matrix for matrix in matrices(model, adapter)}
    parts = [adapter.block_tensors(index) for index in range(adapter.count)]
    parts.append([*adapter.outside_tensors(), *adapter.unmapped_tensors()])
    export.writer.resize(len(parts))
    expected: list[str] = []
    entries: list[dict[str, Any]] = []
    for index in track(range(len(parts)), len(parts), "export"):
        if (committed := export.writer.restore(index)) is None:
            tensors, own = _part(model, parts[index], by_path, pack)
            for name, zeros in (also or {}).get(index, {}).items():
                tensors[name] = zeros
                form = str(zeros.dtype).removeprefix("torch.")
                entry = {"how": "zeros", "form": form, "weights": zeros.numel()}
                own.append(entry | {"bytes": zeros.nbytes})
            export.writer.commit(index, tensors, {"entries": own})
            names = list(tensors)
        else:
            names, own = list(committed[0]), committed[1]["entries"]
        expected += names
        entries += own
    packed = {e["module"]: e["described"] for e in entries if "described" in e}
    kept = [m.module for m in by_path.values() if m.module not in packed]
    anew = {e["module"] for e in entries if e["how"] == "rounded"}
    rounded = [matrix.name for matrix in by_path.values() if matrix.module in anew]
    return Parts(expected, tally(entries), packed, kept, rounded)


def _part(
    model: Checkpoint, names: list[str], by_path: dict[str, Matrix], pack: Pack
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of a part, and what to say about each of the model's."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for name in names:
        path = name.removesuffix(".weight")
        matrix = by_path.get(path) if path != name else None
        found = pack(matrix) if matrix is not None else None
        weights = prod(model.weight_info(name).shape)
        if found is not None:
            assert matrix is not None
            size = sum(tensor.nbytes for tensor in found.tensors.values())
            entry = {"how": found.how, "form": found.form, "weights": weights, "bytes": size}
            entries.append(entry | {"module": matrix.module, "described": found.described})
            tensors |= found.tensors
            continue
        tensors[name] = dense_tensor(model, name)
        form = str(tensors[name].dtype).removeprefix("torch.")
        entry = {"how": _how(model, name), "form": form, "weights": weights}
        entries.append(entry | {"bytes": tensors[name].nbytes})
    return tensors, entries


def dense_tensor(model: Checkpoint, name: str) -> Tensor:
    """A tensor of the dense model: a weight in the model's type, anything else as it is stored."""
    path = name.removesuffix(".weight")
    if path in model.packing.shapes or corrected(model, path):
        return model.load_weights([name])[name].to(model.dtype).contiguous()
    return model.load([name])[name]


def _how(model: Checkpoint, name: str) -> How:
    path = name.removesuffix(".weight")
    if corrected(model, path):
        return "summed"
    if isinstance(model, UnfoldedCheckpoint) and (added := model.added.get(name)):
        return added  # type: ignore[return-value]
    return "decoded" if path in model.packing.shapes else "kept"


def tally(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for all tensors that were stored alike: how many, of how many weights and bytes.

    entries: `how`, `form`, `weights` and `bytes` of each.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        key = entry["how"], entry["form"]
        row = rows.setdefault(key, {"stored": key[0], "as": key[1], "tensors": 0})
        row["tensors"] += 1
        for name in ("weights", "bytes"):
            row[name] = row.get(name, 0) + entry[name]
    for row in rows.values():
        row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
    return list(rows.values())


def corrections(export: Export, model: Checkpoint, adapter: ModelAdapter) -> dict[str, LowRank]:
    """What is to lie beside a model for PEFT, by path in transformers; empty if nothing is.

    model: one of the export's. adapter: its architecture.
    """
    if not export.beside:
        return {}
    found = export.source.adapter
    assert found is not None
    factors = found.load(found.paths)
    owners = model.owners if isinstance(model, UnfoldedCheckpoint) else {}
    factors |= {path: factors[owner] for path, owner in owners.items() if owner in factors}
    modules = linear_modules(adapter.model, adapter.family, model)
    return {modules[path]: factor for path, factor in factors.items()}


def written(
    parts: Parts,
    model: Checkpoint,
    adapter: ModelAdapter,
    config: dict[str, Any],
    *,
    packages: dict[str, str],
    tolerance: float | None = None,
    corrected: dict[str, LowRank] | None = None,
) -> Written:
    """What parts come to that compresso reads, too.

    model:     that was written. adapter: its architecture.
    config, packages and tolerance: as `Written` has them.
    corrected: what `corrections` returned; None for nothing.
    """
    return Written(
        exported=model,
        config=config,
        expected=parts.expected,
        rounded=parts.rounded,
        carried=adapter.unmapped_tensors(),
        rows=parts.rows,
        packages=packages,
        tolerance=tolerance,
        reread=any(row["stored"] in ("rounded", "rescaled") for row in parts.rows),
        adapter=corrected or {},
    )


def dense_config(model: Checkpoint, *, structure: Structure | None = None) -> dict[str, Any]:
    """The config.json of a model whose linears are all dense.

    structure: another than it has; None for its own.
    """
    plain = {key: value for key, value in model.config.items() if key != ENTRY}
    return restructure(plain, structure_of(plain) if structure is None else structure)


def refuse_inexact_merge(model: Checkpoint, found: Iterable[Matrix]) -> None:
    """Raises ConfigError if an adapter was to be merged, but corrects linears that stay codes."""
    for matrix in found:
        if corrected(model, matrix.path) and matrix.path in model.packing.shapes:
            raise ConfigError(
                f"the correction of `{matrix.path}` cannot be merged into its codes exactly",
                hint="leave out `--merge-adapter`: the adapter then lies beside the weights; or"
                " export `dense`",
            )
