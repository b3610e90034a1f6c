"""Token sequences that a model writes itself, to calibrate on without any text."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso import __version__
from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ResourceError
from compresso.models.adapter import ModelAdapter
from compresso.models.sampling import whole, write_tokens
from compresso.models.tokenizer import Tokenizer
from compresso.runtime import Runtime, format_bytes, free_memory, log, track
from compresso.settings import CalibrationSettings

SELF = "self"
ROWS = 32  # sequences written at once, at most
SPARE = 1.2  # what a model in memory takes beside its weights
HELD_OUT = 1  # what is added to twice the seed for sequences to evaluate on


@dataclass(frozen=True)
class Author:
    """Who writes, where it is run, and the directory where what it wrote is kept for later runs."""

    checkpoint: Checkpoint
    runtime: Runtime
    directory: Path


@dataclass(frozen=True)
class _Start:
    """How sequences begin. words: for the record. token: None for one drawn from all tokens.

    follows: a token, and the one that always comes after it.
    """

    words: str
    token: int | None
    follows: tuple[int, int] | None = None


def generated(
    author: Author, settings: CalibrationSettings, *, length: int, held_out: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Sequences, (samples, length) int64, and what is to be recorded of them.

    A sequence begins with the token that the model's tokenizer begins texts with; if it has none,
    with the one it ends them with, as a text follows on another; if it has neither, with a token
    drawn from all. Everything else is drawn from what the model says, also after the end of a
    text. The same settings give the same tokens on the same machine, and fewer samples the first
    of them.

    held_out: write others than for calibration.

    Raises ResourceError if the model does not fit in memory, CheckpointError if what was kept
    cannot be read.

    Source: self-generated data as Liu et al., arXiv:2305.17888 (LLM-QAT), which begins with random
    tokens.
    """
    adapter = open_adapter(author.checkpoint, author.runtime)
    start = _start(author)
    path = author.directory / f"self-{_key(author, adapter, settings, length, start, held_out)}.npy"
    if path.exists():
        log(f"self: reused `{path}`")
        sequences = _read(path)
    else:
        sequences = _write(author, adapter, settings, length, start, held_out)
        _keep(sequences, path)
    return sequences, {
        "written_by": {
            "path": str(author.checkpoint.path.resolve()),
            "key": author.checkpoint.key,
        },
        "begins_with": start.words,
        "sampling_temperature": settings.sampling_temperature,
        "top_p": settings.top_p,
    }


def _start(author: Author) -> _Start:
    try:
        tokenizer = Tokenizer.open(
            author.checkpoint, trust_remote_code=author.runtime.trust_remote_code
        )
    except CheckpointError:
        return _Start("a random token", None)
    end, begin = tokenizer.end, tokenizer.encode("", special=True)[:1]
    if begin and begin != [end]:
        return _Start("the start token", begin[0], None if end is None else (end, begin[0]))
    if end is not None:
        return _Start("the end token", end)
    return _Start("a random token", None)


def _write(
    author: Author,
    adapter: ModelAdapter,
    settings: CalibrationSettings,
    length: int,
    start: _Start,
    held_out: bool,
) -> Tensor:
    """The sequences, a few at once."""
    source = author.checkpoint
    needed = int(SPARE * source.parameters * adapter.dtype.itemsize)
    if needed > (free := free_memory()):
        raise ResourceError(
            f"`{source.path}` takes {format_bytes(needed)} of memory to write text, but"
            f" {format_bytes(free)} are free",
            hint="calibrate on a text: `--dataset`",
        )
    generator = torch.Generator().manual_seed(2 * settings.seed + HELD_OUT * held_out)
    # One draw for each token, whatever is written at once.
    draws = torch.rand(settings.wanted, length, generator=generator, dtype=torch.float64)
    first = torch.full((settings.wanted,), start.token or 0)
    if start.token is None:
        vocabulary = int(adapter.config.get_text_config().vocab_size)
        first = (draws[:, 0] * vocabulary).long()
    rows = min(ROWS, max(1, author.runtime.max_memory // _cache_bytes(adapter, length)))
    parts = []
    with whole(adapter, source):
        pairs = list(zip(first.split(rows), draws.split(rows), strict=True))
        for number, (begin, drawn) in enumerate(pairs, start=1):
            words = f"self: part {number} of {len(pairs)}"
            parts.append(
                write_tokens(
                    adapter,
                    begin,
                    drawn,
                    temperature=settings.sampling_temperature,
                    top_p=settings.top_p,
                    follows=start.follows,
                    steps=partial(track, total=length - 1, description=words),
                )
            )
    return torch.cat(parts)


def _cache_bytes(adapter: ModelAdapter, length: int) -> int:
    """Of one sequence's keys and values, at most."""
    config = adapter.config.get_text_config()
    return 2 * adapter.count * length * int(config.hidden_size) * adapter.dtype.itemsize


def _key(
    author: Author,
    adapter: ModelAdapter,
    settings: CalibrationSettings,
    length: int,
    start: _Start,
    held_out: bool,
) -> str:
    """A short hash of all that decides what is written."""
    parts = [
        *(__version__, author.checkpoint.key, str(adapter.dtype), str(adapter.device)),
        *(settings.wanted, length, settings.seed, held_out),
        *(settings.sampling_temperature, settings.top_p, start.token, start.follows),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error}", hint="remove it: it is written anew"
        ) from error


def _keep(sequences: Tensor, path: Path) -> None:
    """Write them so that the file is there only when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.save(file, sequences.numpy().astype(np.int32))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write `{path}`: {error.strerror}") from error
