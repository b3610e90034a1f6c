"""Documents to calibrate on and to evaluate on: the standard library, local files, hub sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compresso.calibration.stdlib import stdlib_files
from compresso.errors import CheckpointError, ConfigError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
DOWNLOAD_ERRORS = (OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class HubText:
    """Where a hub dataset keeps its text.

    joined: its rows are lines of one text; otherwise each row is a document of its own.
    """

    path: str
    name: str | None
    calibration: dict[str, str]
    held_out: dict[str, str]
    joined: bool


HUB_TEXTS = {
    "wikitext2": HubText(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"split": "train"},
        {"split": "test"},
        joined=True,
    ),
    "c4": HubText(
        "allenai/c4",
        None,
        {"data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train"},
        {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train"},
        joined=False,
    ),
}
DATASETS = ("stdlib", "self", *HUB_TEXTS)


def documents(dataset: str, *, held_out: bool) -> Iterator[str]:
    """The documents of a dataset, in a fixed order.

    dataset:  `stdlib`, a name of HUB_TEXTS, a local file or directory, or a hub dataset with a
              `text` column.
    held_out: the part kept for evaluation. A local file has no such part: it is given whole.

    Raises CheckpointError if it cannot be read, ConfigError if it is of no known kind.
    """
    path = Path(dataset)
    if dataset == "stdlib":
        return (text for _, text in stdlib_files(held_out=held_out))
    if path.exists():
        return _local(path)
    if path.suffix in FILE_SUFFIXES or dataset.startswith((".", "/", "~")):
        raise CheckpointError(f"no such file or directory: `{dataset}`")
    if dataset not in HUB_TEXTS and "/" not in dataset:
        raise ConfigError(
            f"unknown dataset `{dataset}`",
            hint=f"known: {', '.join(DATASETS)}, a local file or directory, or `owner/name`",
        )
    split = "test" if held_out else "train"
    plain = HubText(dataset, None, {"split": split}, {"split": split}, joined=False)
    return _hub(HUB_TEXTS.get(dataset, plain), held_out=held_out)


def _local(path: Path) -> Iterator[str]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FILE_SUFFIXES)
        if not files:
            raise CheckpointError(
                f"`{path}` holds no text", hint=f"known endings: {', '.join(FILE_SUFFIXES)}"
            )
    for file in files:
        yield from _read(file)


def _read(file: Path) -> Iterator[str]:
    if file.suffix == ".parquet":
        from datasets import Dataset

        yield from _text_column(Dataset.from_parquet(str(file)), str(file))
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"`{file}` cannot be read as UTF-8 text: {error}") from error
    if file.suffix in (".jsonl", ".json"):
        yield from _json_documents(text, file)
    elif text:
        yield text


def _json_documents(text: str, file: Path) -> Iterator[str]:
    """One document per line, or per item of one list; each a string or has `text`."""
    try:
        if file.suffix == ".json":
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"`{file}` is not valid JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        document = row.get("text") if isinstance(row, dict) else row
        if not isinstance(document, str):
            raise CheckpointError(f"`{file}`: row {number} has no `text`")
        yield document


def _hub(text: HubText, *, held_out: bool) -> Iterator[str]:
    from datasets import load_dataset

    options = text.held_out if held_out else text.calibration
    try:
        rows = load_dataset(text.path, text.name, **options)
    except DOWNLOAD_ERRORS as error:
        raise CheckpointError(
            f"dataset `{text.path}` cannot be loaded: {str(error).splitlines()[0]}",
            hint="offline? use `--dataset stdlib` or a local .txt, .jsonl or .parquet file",
        ) from error
    found = _text_column(rows, text.path)
    if text.joined:
        yield "\n\n".join(found)
    else:
        yield from found


def _text_column(rows: Iterable[dict[str, object]], origin: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise CheckpointError(f"`{origin}` has no `text` column of strings")
        yield str(row["text"])
