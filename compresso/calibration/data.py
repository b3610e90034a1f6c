"""Token batches to calibrate on and to evaluate on, with a hash and honest counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.calibration.crops import apart, crops
from compresso.calibration.generated import SELF, Author, generated
from compresso.calibration.text import documents
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.models.tokenizer import Tokenizer
from compresso.settings import CalibrationSettings

TOKENS_PER_BATCH = 2048
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")
LONGEST_DEFAULT = 2048
KEYS = ("hash", "questions")  # entries of a record that identify it


@dataclass(frozen=True)
class Calibration:
    """Token sequences of one length, in batches, and what they were made from.

    batches: token ids, each (batch, tokens) int64, on the CPU.
    record:  what was asked for and what was used, for `compresso.json`.
    """

    batches: list[Tensor]
    record: dict[str, Any]

    @property
    def key(self) -> str:
        """A hash of the token ids and their arrangement, and of questions that go with them."""
        return " ".join(str(self.record[name]) for name in KEYS if name in self.record)


def load_calibration(
    settings: CalibrationSettings,
    source: Checkpoint,
    *,
    keep_back: bool = False,
    heldout_share: float = 0.0,
    trust_remote_code: bool = False,
    author: Author | None = None,
    used: Callable[[int], int] | None = None,
) -> Calibration:
    """Random crops of the dataset's training text, as GPTQ draws them; seeded.

    keep_back:     of a local text or of ids, which have no held-out part, take nothing from the
                   last tenth, which `load_heldout` gives then.
    heldout_share: see `heldout_count`; so many of the sequences, the last, have no token of the
                   text in common with the others.
    author:        who writes the text, if the dataset is `self`.
    used:          how many sequences of a length will be used: read so many if the settings do not
                   say how many, or what there is. What is written for it costs too much for that.

    Raises CheckpointError if the text is shorter than one sequence, or than two if some are held
    out, ConfigError if the settings cannot be right for this model.
    """
    dataset, length = _resolve(settings.dataset, settings.length, source)
    written: dict[str, Any] = {}
    asked = settings.wanted
    if settings.samples is not None:
        used = None
    if dataset == SELF:
        assert author is not None
        sequences, written = generated(author, settings, length=length, held_out=False)
        available = None
    elif dataset.endswith(".npy"):
        sequences, available = _read_tokens(Path(dataset), settings.length), None
        if keep_back:
            sequences = apart(sequences, dataset)[0]
        if used is not None:
            asked = min(used(sequences.shape[1]), len(sequences))
        _check_enough(sequences, asked, dataset, keep_back=keep_back)
        sequences = sequences[:asked]
    else:
        stream = _token_stream(dataset, source, held_out=False, trust=trust_remote_code)
        if keep_back and Path(dataset).exists():
            stream = apart(stream, dataset)[0]
        available = len(stream)
        _check_long_enough(available, length, dataset)
        if used is not None:
            asked = min(used(length), max(asked, available // length))
        heldout = heldout_count(heldout_share, asked)
        sequences = crops(stream, (asked, length), heldout, seed=settings.seed, dataset=dataset)
    record = {
        "dataset": dataset,
        "split": "calibration",
        "seed": settings.seed,
        "sequences_asked": asked,
        **written,
    }
    return _batched(sequences, settings.batch_size, record, available, source)


def heldout_count(share: float, sequences: int) -> int:
    """How many of the sequences, the last, are not learnt from; at least one if any share is."""
    return max(1, round(share * sequences)) if share else 0


def load_heldout(
    settings: CalibrationSettings,
    source: Checkpoint,
    *,
    whole: bool = False,
    kept_back: bool = False,
    trust_remote_code: bool = False,
    author: Author | None = None,
) -> Calibration:
    """Windows of the dataset's held-out text, end to end and in order, without the tail.

    With fewer `samples` than windows, evenly spaced ones. `samples` may be larger than what the
    text holds; the record says how many were used.

    whole:     take all windows, whatever `samples` says.
    kept_back: of a local text or of ids, take only what `load_calibration` kept back.
    author:    who writes the text, if the dataset is `self`; as many windows as `samples` says.

    Raises as `load_calibration` does.
    """
    dataset, length = _resolve(settings.dataset, settings.length, source)
    written: dict[str, Any] = {}
    if dataset == SELF:
        assert author is not None
        windows, written = generated(author, settings, length=length, held_out=True)
        available = None
    elif dataset.endswith(".npy"):
        windows, available = _read_tokens(Path(dataset), settings.length), None
        if kept_back:
            windows = apart(windows, dataset)[1]
    else:
        stream = _token_stream(dataset, source, held_out=True, trust=trust_remote_code)
        if kept_back and Path(dataset).exists():
            stream = apart(stream, dataset)[1]
        available = len(stream)
        _check_long_enough(available, length, dataset)
        windows = stream[: available // length * length].reshape(-1, length)
    used = len(windows) if whole else min(settings.wanted, len(windows))
    spaced = torch.arange(used) * len(windows) // used
    record: dict[str, Any] = {"dataset": dataset, "split": "held out", **written}
    if not whole:
        record["sequences_asked"] = settings.wanted
    return _batched(windows[spaced], settings.batch_size, record, available, source)


def model_length(config: dict[str, Any]) -> int:
    """The longest sequence the model's positions allow, at most 2048."""
    limits = [config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)]
    return min([LONGEST_DEFAULT, *limits])


def _resolve(dataset: str, length: int | None, source: Checkpoint) -> tuple[str, int]:
    if dataset == "auto":
        dataset = "stdlib" if _from_reference(source) else "wikitext2"
    return dataset, length or model_length(source.config)


def _from_reference(source: Checkpoint) -> bool:
    """Whether the checkpoint is the bundled model or was made from it."""
    bundled = (Path(__file__).parents[1] / "reference").resolve()
    record, path = source.provenance, source.path.resolve()
    while record:
        path = Path(record["source"]["path"]).resolve()
        record = record.get("parent") or {}
    return path == bundled


def _token_stream(dataset: str, source: Checkpoint, *, held_out: bool, trust: bool) -> Tensor:
    """All documents as one run of token ids, an end token after each; (tokens,) int64.

    The tokenizer's own start token is added once, before the first document.
    """
    tokenizer = Tokenizer.open(source, trust_remote_code=trust)
    ids: list[int] = []
    for number, text in enumerate(documents(dataset, held_out=held_out)):
        if number and tokenizer.end is not None:
            ids.append(tokenizer.end)
        ids += tokenizer.encode(text, special=number == 0)
    return torch.tensor(ids, dtype=torch.int64)


def _read_tokens(path: Path, length: int | None) -> Tensor:
    """Token ids from a .npy file: (sequences, tokens), or one run that `length` cuts."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot be read as an array: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise CheckpointError(
            f"`{path}` holds {array.dtype} of shape {array.shape}, not token ids",
            hint="expected integers of shape (sequences, tokens)",
        )
    tokens = torch.from_numpy(array.astype(np.int64))
    if tokens.ndim == 2 and length in (None, tokens.shape[1]):
        return tokens
    tokens = tokens.reshape(-1)
    length = length or min(LONGEST_DEFAULT, len(tokens))
    _check_long_enough(len(tokens), length, str(path))
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def _check_enough(sequences: Tensor, asked: int, dataset: str, *, keep_back: bool) -> None:
    if len(sequences) < asked:
        beside = " beside those kept back to judge by" if keep_back else ""
        raise CheckpointError(
            f"`{dataset}` holds {len(sequences)} sequences{beside}, fewer than the {asked} asked"
            " for",
            hint=f"pass `--nsamples {len(sequences)}`",
        )


def _check_long_enough(available: int, length: int, dataset: str) -> None:
    if available == 0:
        raise CheckpointError(f"dataset `{dataset}` is empty")
    if available < length:
        raise CheckpointError(
            f"dataset `{dataset}` holds {available} tokens, fewer than one sequence of {length}",
            hint="use a longer text, or a smaller `--seqlen`",
        )


def first_tokens(batches: list[Tensor], tokens: int) -> list[Tensor]:
    """The first sequences that hold so many tokens, in batches as they were; all if too few."""
    chosen: list[Tensor] = []
    for batch in batches:
        left = tokens - sum(part.numel() for part in chosen)
        if left <= 0:
            break
        chosen.append(batch[: -(-left // batch.shape[1])])
    return chosen


def _batched(
    sequences: Tensor,
    batch_size: int | None,
    record: dict[str, Any],
    available: int | None,
    source: Checkpoint,
) -> Calibration:
    vocabulary = source.config.get("vocab_size")
    top = int(sequences.max())
    if isinstance(vocabulary, int) and top >= vocabulary:
        raise ConfigError(
            f"dataset `{record['dataset']}` has token {top}, but the model's vocabulary ends at"
            f" {vocabulary - 1}",
            hint="the tokens were made with another tokenizer",
        )
    count, length = sequences.shape
    digest = hashlib.sha256(repr(tuple(sequences.shape)).encode())
    digest.update(sequences.numpy().tobytes())
    record = {
        **record,
        "sequences_used": count,
        "length": length,
        "tokens_used": sequences.numel(),
        "hash": digest.hexdigest(),
    }
    if available is not None:
        record["tokens_available"] = available
    size = batch_size or max(1, TOKENS_PER_BATCH // length)
    return Calibration(list(_split(sequences, size)), record)


def _split(sequences: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size].clone()
