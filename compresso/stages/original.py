"""The original of a compressed checkpoint: which one it is, and what in it is what."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.families import RESTRUCTURED, family_of
from compresso.models.rotation import RotatedCheckpoint, rotated
from compresso.models.structure import structure_of
from compresso.models.tokenizer import Tokenizer
from compresso.provenance import history, lineage, read_record

IN_BLOCK = re.compile(r"(.*?\.)(\d+)\.(.+)")
CORRECTION = ".correction_"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
)
# Words, numbers, white space, code and other scripts: where tokenizers differ.
PROBE = (
    "The quick brown fox, 3.14159 and 2026-11-21.\n\n\tdef f(x):\n        return x**2 != None\n"
    "naïve café — “quotes” Übergröße Привет мир 你好世界 こんにちは مرحبا 🙂"
)
HINT = "pass the model it was made from as `--original`"


def original_of(
    source: Checkpoint, given: str | None, *, trust_remote_code: bool = False
) -> Checkpoint:
    """The checkpoint that `source` was made from, in the coordinates of `source`.

    given: a directory, hub name or `reference` that the user named; None for the first that the
           record names.

    If a step rotated the model, this is a view of the original, rotated likewise.

    Raises ConfigError if none is given or recorded, or it is the source itself; CheckpointError if
    it is gone, has changed since, or is not a model that `source` can have been made from: another
    family, vocabulary, tokenizer or shape of a weight.
    """
    original = _recorded(source) if given is None else open_checkpoint(given)
    if original.key == source.key:
        raise ConfigError(f"`{original.path}` is given as its own original", hint=HINT)
    _check_model(source, original)
    _check_shapes(source, original)
    _check_tokenizer(source, original, trust_remote_code=trust_remote_code)
    steps = [record["step"] for record in _since(source, original)]
    seeds = [step["seed"] for step in steps if step.get("rotate")]
    if len(seeds) > 1:
        raise ConfigError(
            f"`{source.path}` was rotated {len(seeds)} times",
            hint="pass what the last rotation was made of as `--original`",
        )
    return rotated(original, seed=seeds[0]) if seeds else original


def block_map(source: Checkpoint, original: Checkpoint) -> list[int]:
    """For every block of `source`, the block of the original that it was.

    Found in the record of what was pruned since; without one, both must have as many blocks.

    Raises CheckpointError if neither tells.
    """
    count, found = block_count(source), list(range(block_count(original)))
    for record in _since(source, original):
        if record["step"]["stage"] == "prune":
            gone = record["report"]["summary"]["removed_blocks"]
            found = [block for place, block in enumerate(found) if place not in gone]
    if len(found) != count:
        found = list(range(block_count(original)))
    if len(found) != count:
        raise CheckpointError(
            f"nothing records which {count} of the {len(found)} blocks of `{original.path}` are"
            f" left in `{source.path}`",
            hint=HINT,
        )
    return found


def block_count(checkpoint: Checkpoint) -> int:
    """How many blocks a checkpoint's config.json says it has."""
    count: int = checkpoint.config[family_of(checkpoint.config["model_type"]).count]
    return count


def _recorded(source: Checkpoint) -> Checkpoint:
    first = lineage(source)[0]
    if first.key == source.key:
        raise ConfigError(f"`{source.path}` does not record an original", hint=HINT)
    if not first.path.is_dir():
        raise CheckpointError(f"the original `{first.path}` is gone", hint=HINT)
    original = Checkpoint(first.path)
    if original.key != first.key:
        raise CheckpointError(
            f"`{first.path}` has changed since `{source.path}` was made from it", hint=HINT
        )
    return original


def _since(source: Checkpoint, original: Checkpoint) -> list[dict[str, Any]]:
    """The records of the steps from the original, if it is among them, to `source`."""
    records = history(read_record(source.path))
    key = (original.plain if isinstance(original, RotatedCheckpoint) else original).key
    keys = [record["source"]["key"] for record in records]
    return records[keys.index(key) :] if key in keys else records


def _check_model(source: Checkpoint, original: Checkpoint) -> None:
    """Raises CheckpointError if not even the embeddings are alike."""
    facts = [_facts(source), _facts(original)]
    for what, own in facts[0].items():
        if facts[1][what] != own:
            raise CheckpointError(
                f"`{original.path}` cannot be the original of `{source.path}`: its {what} is"
                f" `{facts[1][what]}`, not `{own}`",
                hint=HINT,
            )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    family = family_of(checkpoint.config["model_type"])
    embedding = f"{family.embedding}.weight"
    stored = (embedding, embedding.removeprefix(f"{family.body}."))
    name = next((name for name in stored if name in checkpoint.weight_names()), None)
    if name is None:
        raise CheckpointError(f"`{checkpoint.path}` has no tensor `{embedding}`")
    vocabulary, width = checkpoint.weight_info(name).shape
    return {
        "family": checkpoint.config["model_type"].removeprefix(RESTRUCTURED),
        "vocabulary": vocabulary,
        "hidden size": width,
    }


def _check_shapes(source: Checkpoint, original: Checkpoint) -> None:
    """Raises CheckpointError if a weight of a block has another shape in the original."""
    theirs = _block_weights(original)
    blocks = block_map(source, original)
    owners = structure_of(original.config)
    for (block, path), own in _block_weights(source).items():
        place = blocks[block]
        name = f"{place}.{path}"
        found = theirs.get((place, path)) or theirs.get((owners.owner(place), path))
        if found != own:
            raise CheckpointError(
                f"`{original.path}` cannot be the original of `{source.path}`: its `{name}`"
                + (" is missing" if found is None else f" has the shape {found}, not {own}"),
                hint=HINT,
            )


def _block_weights(checkpoint: Checkpoint) -> dict[tuple[int, str], tuple[int, ...]]:
    """Shapes of all tensors of blocks but corrections, by block and name in it."""
    found = {}
    for name in checkpoint.weight_names():
        if (place := IN_BLOCK.fullmatch(name)) and CORRECTION not in name:
            found[int(place[2]), place[3]] = checkpoint.weight_info(name).shape
    return found


def _check_tokenizer(source: Checkpoint, original: Checkpoint, *, trust_remote_code: bool) -> None:
    """Raises CheckpointError if the two read a text differently; not if one reads none."""
    own, theirs = _tokenizer_files(source), _tokenizer_files(original)
    if own == theirs or not own or not theirs:
        return
    ids = [
        Tokenizer.open(one, trust_remote_code=trust_remote_code).encode(PROBE, special=False)
        for one in (source, original)
    ]
    if ids[0] != ids[1]:
        raise CheckpointError(
            f"`{original.path}` has another tokenizer than `{source.path}`", hint=HINT
        )


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes of the files that say what the tokens are."""
    paths: list[Path] = [checkpoint.path / name for name in TOKENIZER_FILES]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()
    }
