"""Say what a checkpoint is, without loading its weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.console import Console

from compresso.checkpoint.layout import schemes
from compresso.checkpoint.reader import Checkpoint
from compresso.families import FAMILIES, RESTRUCTURED
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure
from compresso.provenance import history, read_record
from compresso.report import summary_table

PACKED = ".weight_packed"
MOST_NAMES_SHOWN = 10


def inspect_checkpoint(source: Checkpoint, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything there is to say about a checkpoint, as plain values.

    Sizes are of stored bytes: codes, scales, zero points and everything else.

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
        "packed": _packed(source),
        "left_out_files": source.left_out_files(),
        "history": _history(source),
    }
    if found["supported"]:
        found |= _structure(source, trust_remote_code=trust_remote_code)
    return found


def print_inspection(found: dict[str, Any]) -> None:
    """Write it to stdout, for people."""
    console = Console(highlight=False)
    shown = {key: value for key, value in found.items() if key not in ("packed", "history")}
    for key in ("unmapped_tensors", "left_out_files"):
        names = found.get(key, [])
        if len(names) > MOST_NAMES_SHOWN:
            shown[key] = [*names[:MOST_NAMES_SHOWN], f"and {len(names) - MOST_NAMES_SHOWN} more"]
    for entry in found["packed"]:
        kind = "symmetric" if entry["symmetric"] else "asymmetric"
        group = "row" if entry["group_size"] == -1 else f"{entry['group_size']} columns"
        shown[f"packed at {entry['bits']} bits"] = (
            f"{entry['linears']} linears, {kind}, per {group}"
        )
    if not found["packed"]:
        shown["packed"] = "none: all weights are dense"
    console.print(summary_table(shown, "checkpoint"))
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


def _packed(source: Checkpoint) -> list[dict[str, Any]]:
    """How many linears are packed, and how, by kind."""
    paths = [name.removesuffix(PACKED) for name in source.names() if name.endswith(PACKED)]
    kinds = Counter(schemes(source.config, paths).values())
    return [
        {
            "linears": count,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
        }
        for scheme, count in kinds.items()
    ]


def _history(source: Checkpoint) -> list[dict[str, Any]]:
    """The stages that made it, the first one first."""
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
        for record in history(read_record(source.path))
    ]
