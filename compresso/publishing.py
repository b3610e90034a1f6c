"""Put a model card beside what was written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compresso.card import (
    CARD,
    ORIGIN,
    ORIGINAL_CARD,
    Origin,
    front_matter,
    hub_name,
    is_ours,
    model_card,
)
from compresso.checkpoint.reader import Checkpoint
from compresso.loading import Output
from compresso.provenance import lineage
from compresso.runtimes.table import Traits, known_runtimes
from compresso.runtimes.traits import runtimes_for, traits_of

LICENCES = ("license", "licence", "notice", "copying", "use_policy")


def origin_of(source: Checkpoint) -> dict[str, Any]:
    """What is to be recorded of the first model in the history of what is made from `source`.

    It is what the record of `source` has; or, if it has none, what `source` is itself.
    """
    if recorded := source.provenance.get(ORIGIN):
        return dict(recorded)
    first = lineage(source)[0].path
    card = source.path / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    origin = Origin(
        name=hub_name(first),
        folder=first.name,
        bytes=source.stored_bytes,
        parameters=source.parameters,
        front=_plain(front_matter(text)),
        licence=[n for n in source.side_files() if n.lower().startswith(LICENCES)],
    )
    return asdict(origin)


def output_of(path: Path) -> Output:
    """What a folder holds that a stage or an export has written."""
    if files := sorted(path.glob("*.gguf")):
        traits = Traits("gguf")
        size = sum(file.stat().st_size for file in files)
        runtimes = known_runtimes(traits)
        return Output(size, 0, traits.kind, runtimes, gguf=files[0].name)
    found = Checkpoint(path)
    return Output(
        bytes=found.stored_bytes,
        parameters=found.parameters,
        kind=traits_of(found).kind,
        runtimes=runtimes_for(found),
        adapter=found.adapter is not None,
    )


def card_of(path: Path, record: dict[str, Any], **options: Any) -> str:
    """The card of an output. record: its compresso.json. options: those of `model_card`."""
    return model_card(record, output_of(path), **options)


def original_card(source: Checkpoint) -> dict[str, Path]:
    """The card that somebody else wrote of a source, under the name that it is carried by."""
    card = source.path / CARD
    if card.is_file() and not is_ours(card.read_text(encoding="utf-8", errors="replace")):
        return {ORIGINAL_CARD: card}
    return {}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Of metadata, what JSON can hold: a date becomes text."""
    return {
        str(key): value if isinstance(value, str | int | float | bool | list) else str(value)
        for key, value in values.items()
        if value is not None
    }
