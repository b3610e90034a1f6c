"""What runtimes look at in a checkpoint, and which of them load it."""

from __future__ import annotations

from typing import Any, Literal

from compresso.checkpoint.coded import coding_of
from compresso.checkpoint.packings import method_of
from compresso.checkpoint.reader import HEADS, Checkpoint
from compresso.runtimes.table import Traits, known_runtimes


def traits_of(source: Checkpoint) -> Traits:
    """Those of a checkpoint, by its config.json and the headers of its shards.

    Raises CheckpointError if it is packed in a way that compresso cannot read.
    """
    config, packing = source.config, source.packing
    structure: Literal["stock", "own", "decilm"] = "own" if "auto_map" in config else "stock"
    if source.decilm:
        structure = "decilm"
    if not packing.shapes:
        return Traits("dense", structure=structure)
    kinds = {path: packing.kind(path) for path in packing.shapes}
    linears = list(kinds.values())
    forms = [form for number, form in enumerate(linears) if form not in linears[:number]]
    return Traits(
        kind="coded" if coding_of(config) is not None else str(method_of(config)),
        bits=frozenset(form["bits"] for form in forms if "bits" in form),
        groups=frozenset(form["group_size"] for form in forms if "group_size" in form),
        mixed=len(forms) > 1,
        symmetric=all(form.get("symmetric", True) for form in forms),
        head=any(f"{path}.weight" in HEADS for path in kinds),
        structure=structure,
    )


def runtimes_for(source: Checkpoint) -> dict[str, dict[str, Any]]:
    """What is known of a checkpoint: see `known_runtimes`."""
    return known_runtimes(traits_of(source))
