"""Say what a checkpoint is, without loading its weights."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from compresso.checkpoint.hub import place_of
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ResourceError
from compresso.families import FAMILIES, RESTRUCTURED
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure
from compresso.provenance import history, read_record
from compresso.report import summary_table
from compresso.runtime import format_bytes
from compresso.runtimes.table import Traits, known_runtimes, sentence
from compresso.runtimes.traits import runtimes_for
from compresso.stages.contents import contents_of, is_gguf

MOST_NAMES_SHOWN = 10


def inspect_model(name: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything there is to say about a model, as commands take it: a checkpoint, or GGUF.

    Raises CheckpointError if there is none, or it is damaged.
    """
    path = place_of(name)
    if is_gguf(path):
        return _inspect_gguf(path)
    return inspect_checkpoint(Checkpoint(path), trust_remote_code=trust_remote_code)


def _inspect_gguf(path: Path) -> dict[str, Any]:
    """The same of a GGUF file, or a directory with one; its tensors by how they are stored."""
    stored = contents_of(path)
    if not stored:
        raise ResourceError(
            f"`{path}` cannot be read without package `gguf`",
            hint="pip install 'compresso-llm[gguf]'",
        )
    counts: dict[str, list[int]] = {}
    for tensor in stored:
        counts.setdefault(tensor.kind, []).append(tensor.nbytes)
    return {
        "path": str(path),
        "stored_bytes": sum(tensor.nbytes for tensor in stored),
        "tensors": len(stored),
        "stored": {kind: {"tensors": len(n), "bytes": sum(n)} for kind, n in counts.items()},
        "runtimes": known_runtimes(Traits("gguf")),
        "history": _history(path.parent if path.is_file() else path),
    }


def inspect_checkpoint(source: Checkpoint, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything there is to say about a checkpoint, as plain values.

    Sizes are of stored bytes: codes, scales, zero points, an adapter and everything else.

    Raises CheckpointError if the checkpoint does not hold what its config.json promises.
    """
    stored, parameters = source.stored_bytes, source.parameters
    stock = source.config["model_type"].removeprefix(RESTRUCTURED)
    found: dict[str, Any] = {
        "path": str(source.path),
        "model_type": source.config["model_type"],
        "supported": stock in FAMILIES,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": parameters,
        "stored_bytes": stored,
        "bits_per_weight": stored * 8 / parameters,
        "tensors": len(source.weight_names()),
        **_packed(source),
        **_adapter(source),
        "left_out_files": source.left_out_files(),
        "runtimes": runtimes_for(source),
        "history": _history(source.path),
    }
    if found["supported"]:
        found |= _structure(source, trust_remote_code=trust_remote_code)
    return found


def print_inspection(found: dict[str, Any]) -> None:
    """Write it to stdout, for people."""
    console = Console(highlight=False)
    shown = {
        key: value for key, value in found.items() if key not in ("packed", "history", "runtimes")
    }
    for key in ("unmapped_tensors", "left_out_files"):
        names = found.get(key, [])
        if len(names) > MOST_NAMES_SHOWN:
            shown[key] = [*names[:MOST_NAMES_SHOWN], f"and {len(names) - MOST_NAMES_SHOWN} more"]
    for kind, entry in found.get("stored", {}).items():
        size = format_bytes(entry["bytes"])
        shown[f"stored as {kind}"] = f"{entry['tensors']} tensors, {size}"
    shown |= _packed_rows(found.get("packed", []))
    if adapter := found.get("adapter"):
        low, high = adapter["lowest_rank"], adapter["highest_rank"]
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        size = format_bytes(adapter["bytes"])
        shown["adapter"] = f"{adapter['linears']} linears, {ranks}, {size}"
    if found.get("packed") == []:
        shown["packed"] = "none: all weights are dense"
    console.print(summary_table(shown, "checkpoint"))
    known = {name: sentence(one) for name, one in found["runtimes"].items()}
    console.print(summary_table(known, "runtimes"))
    for number, entry in enumerate(found["history"], start=1):
        given = {key: value for key, value in entry["settings"].items() if value is not None}
        settings = ", ".join(f"{key} {value}" for key, value in given.items())
        title = f"made by {number}. {entry['stage']} {entry['method']}"
        console.print(
            summary_table({"settings": settings, **entry["summary"], "from": entry["from"]}, title)
        )


def _structure(source: Checkpoint, *, trust_remote_code: bool) -> dict[str, Any]:
    """What only the model class knows."""
    adapter = ModelAdapter.open(
        source,
        dtype=source.dtype,
        device=torch.device("cpu"),
        trust_remote_code=trust_remote_code,
    )
    config = adapter.config.get_text_config()
    return {
        "architecture": type(adapter.model).__name__,
        "blocks": adapter.count,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "unmapped_tensors": adapter.unmapped_tensors(),
    } | _changes(adapter.structure)


def _changes(structure: Structure) -> dict[str, Any]:
    """In what a model differs from a stock one; nothing for a plain structure."""
    found: dict[str, Any] = {
        "blocks_without_attention": list(structure.no_attention),
        "blocks_without_mlp": list(structure.no_mlp),
        "linears_used_of_block": list(structure.shared),
        "corrected_blocks": list(structure.corrected),
        "rank_of_corrections": structure.rank,
    }
    return {name: value for name, value in found.items() if value}


def _packed(source: Checkpoint) -> dict[str, Any]:
    """How many linears are packed, and how, by kind; and the bits of each of their weights."""
    packing = source.packing
    kinds: list[dict[str, Any]] = []
    counts: list[int] = []
    for kind in map(packing.kind, packing.shapes):
        if kind not in kinds:
            kinds.append(kind)
            counts.append(0)
        counts[kinds.index(kind)] += 1
    found: dict[str, Any] = {
        "packed": [{"linears": count, **kind} for kind, count in zip(kinds, counts, strict=True)]
    }
    if kinds:
        stored = sum(source.info(n).nbytes for path in packing.shapes for n in packing.names(path))
        weights = sum(prod(shape) for shape in packing.shapes.values())
        found["packed_bits_per_weight"] = stored * 8 / weights
    return found


def _adapter(source: Checkpoint) -> dict[str, Any]:
    """What there is of corrections beside the weights; nothing if there are none."""
    adapter = source.adapter
    if adapter is None:
        return {}
    ranks = adapter.ranks.values()
    return {
        "adapter": {
            "linears": len(ranks),
            "lowest_rank": min(ranks),
            "highest_rank": max(ranks),
            "bytes": adapter.nbytes,
        }
    }


def _packed_rows(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Rows of the table, of what `_packed` found."""
    rows: dict[str, list[str]] = {}
    for entry in entries:
        values = dict(entry)
        linears = f"{values.pop('linears')} linears"
        if "symmetric" in entry:
            kind = "symmetric" if entry["symmetric"] else "asymmetric"
            group = "row" if entry["group_size"] == -1 else f"{entry['group_size']} columns"
            row, words = f"packed at {entry['bits']} bits", f"{linears}, {kind}, per {group}"
        else:
            row = f"packed as {values.pop('kind')}"
            words = ", ".join([linears, *(f"{name} {value}" for name, value in values.items())])
        rows.setdefault(row, []).append(words)
    return {row: "; ".join(words) for row, words in rows.items()}


def _history(folder: Path) -> list[dict[str, Any]]:
    """The stages that made what is in a folder, the first one first."""
    return [
        {
            "stage": record["step"]["stage"],
            "method": record["step"]["method"],
            "settings": {k: v for k, v in record["step"].items() if k not in ("stage", "method")},
            "summary": record["report"]["summary"],
            "from": record["source"]["path"],
            "created": record["created"],
            "versions": record["versions"],
        }
        for record in history(read_record(folder))
    ]
