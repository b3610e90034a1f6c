"""How fast models run where people run them, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from compresso.calibration.probe import PROBE_SEED
from compresso.checkpoint.directory import CONFIG, read_json
from compresso.checkpoint.hub import place_of
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, CompressoError, ConfigError
from compresso.provenance import history, read_record
from compresso.runtime import Runtime, format_bytes, log
from compresso.runtimes.engine import Engine, Speed, all_engines, engines_for, ready_engine
from compresso.runtimes.memory import shortage

TRANSFORMERS, LLAMA = "transformers", "llama.cpp"
PROMPT, NEW = 256, 64
SAFE_IDS = 256  # ids that every tokenizer has
# What is compared of two models: key, words, and whether more is better.
COMPARED = (("prefill", "prefill", True), ("decode", "decode", True), ("memory", "memory", False))
# What is measured of each: key, words, and how the value reads.
MEASURED = (
    ("prefill", "prefill (tokens/s)", "{:,.0f}".format),
    ("decode", "decode (tokens/s)", "{:,.1f}".format),
    ("first_token", "first token (s)", "{:.3f}".format),
    ("load", "load (s)", "{:.2f}".format),
    ("memory", "memory of the model", format_bytes),
    ("peak_memory", "of the process", format_bytes),
    ("disk_bytes", "on disk", format_bytes),
)


@dataclass(frozen=True)
class Plan:
    """What is measured. prompt: tokens read; None for 256, or fewer where a model takes fewer.

    new: tokens written after it. rounds: how often all models are measured, in turns.
    """

    prompt: int | None = None
    new: int = NEW
    rounds: int = 3


@dataclass(frozen=True)
class Job:
    """A model in a runtime. model: what the user knows it as. path: what is loaded."""

    model: str
    path: Path
    engine: Engine


def bench(
    names: list[str],
    runtimes: list[str],
    plan: Plan,
    runtime: Runtime,
    *,
    convert: Callable[[Path], Path] | None = None,
) -> dict[str, Any]:
    """Time models in runtimes, in turns, and compare each with the first; plain values.

    names:    checkpoints, as commands take them, or exports: directories or GGUF files. The
              original of the first, if it is on the disk, is measured, too, before all others.
    runtimes: names of those to run them in; all that are installed if empty.
    convert:  writes a checkpoint as GGUF, rounding nothing, and says where; for llama.cpp.

    Every measurement is a process of its own. A row has the median of the rounds, and under `_low`
    and `_high` the ends of what they came to.

    Raises CheckpointError if there is no such model, or none that a runtime takes; ConfigError if
    a model does not take so many tokens; ResourceError if a runtime asked for is not installed.
    """
    chosen = [ready_engine(name) for name in dict.fromkeys(runtimes)] or None
    paths = with_original([place_of(name) for name in names])
    skipped: list[str] = []
    jobs = list(_jobs(paths, chosen, runtime, skipped, convert))
    if not jobs:
        raise CheckpointError("there is nothing to measure", hint="; ".join(skipped) or None)
    prompt = _prompt(paths, plan)
    speeds: list[list[Speed]] = [[] for _ in jobs]
    for turn in range(plan.rounds):
        for job, found in zip(jobs, speeds, strict=True):
            log(f"round {turn + 1} of {plan.rounds}: `{job.model}` in {job.engine.NAME}")
            found.append(_measure(job, prompt, plan.new, runtime))
    rows = [_row(job, found) for job, found in zip(jobs, speeds, strict=True)]
    return {
        "prompt_tokens": prompt.shape[1],
        "new_tokens": plan.new,
        "rounds": plan.rounds,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "comparison": list(_compared(rows, plan.rounds)),
        "not_measured": skipped,
    }


def with_original(paths: list[Path]) -> list[Path]:
    """The models, with the original of the first before them if that is on the disk."""
    records = history(read_record(_folder(paths[0])))
    if not records:
        return paths
    original = Path(records[0]["source"]["path"])
    if not (original / CONFIG).is_file():
        log(
            f"the original `{original}` is gone: there is nothing to compare with but what is given"
        )
        return paths
    if any(path.resolve() == original.resolve() for path in paths):
        return paths
    return [original, *paths]


def print_bench(found: dict[str, Any]) -> None:
    """Write it to stdout, for people."""
    console = Console(highlight=False)
    words = (
        f"{found['prompt_tokens']} tokens read, {found['new_tokens']} written;"
        f" median of {found['rounds']} (lowest to highest); {found['threads']} threads"
    )
    console.print(Text(words))
    for runtime in dict.fromkeys(row["runtime"] for row in found["rows"]):
        console.print(_side_by_side([row for row in found["rows"] if row["runtime"] == runtime]))
    for line in (*found["comparison"], *found["not_measured"]):
        console.print(Text(line), soft_wrap=True)


def _side_by_side(rows: list[dict[str, Any]]) -> Table:
    """A column per model of a runtime; a line per thing measured."""
    title = Text(f"in {rows[0]['runtime']} {rows[0]['version']}")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(Text(row["model"]), justify="right", overflow="fold")
    for key, words, form in MEASURED:
        table.add_row(words, *(_spread(row, key, form) for row in rows))
    return table


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _jobs(
    paths: list[Path],
    chosen: list[Engine] | None,
    runtime: Runtime,
    skipped: list[str],
    convert: Callable[[Path], Path] | None,
) -> Iterator[Job]:
    """Every model in every runtime that takes it; what is left out is told in `skipped`."""
    for path in paths:
        taking = engines_for(path)
        for one in chosen or all_engines():
            job, reason = Job(str(path), path, one), None
            if (missing := one.missing()) is not None:
                reason = f"this needs {missing}"
            elif one in taking:
                reason = _shortage(path, runtime) if one.NAME == TRANSFORMERS else None
            elif one.NAME == LLAMA and taking and convert is not None:
                try:
                    job = Job(f"{path} as GGUF", convert(path), one)
                except CompressoError as error:
                    reason = f"it cannot be written as GGUF: {error}"
            else:
                reason = "it is not in the form that this loads: `compresso export` writes it"
            if reason is None:
                yield job
            elif one in taking or chosen or one.NAME == LLAMA:
                skipped.append(f"not measured: `{path}` in {one.NAME}, as {reason}")


def _shortage(path: Path, runtime: Runtime) -> str | None:
    source = Checkpoint(path)
    try:
        return shortage(source, runtime.device)
    except CheckpointError:  # another program's codes: only it knows what it takes
        return None


def _prompt(paths: list[Path], plan: Plan) -> Tensor:
    """Random tokens that all models have: speed does not depend on which they are."""
    vocabulary, longest = SAFE_IDS, PROMPT + plan.new
    sizes = []
    for path in paths:
        config = read_json(_folder(path) / CONFIG) if (_folder(path) / CONFIG).is_file() else {}
        text = config | (config.get("text_config") or {})
        sizes += [text["vocab_size"]] if "vocab_size" in text else []
        takes = text.get("max_position_embeddings") or text.get("n_positions") or longest
        if takes < plan.new + (plan.prompt or 1):
            raise ConfigError(
                f"`{path}` takes {takes} tokens, fewer than are to be read and written",
                hint="pass smaller `--prompt-tokens` and `--new-tokens`",
            )
        longest = min(longest, takes)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    shape = (1, plan.prompt or longest - plan.new)
    return torch.randint(0, min(sizes, default=vocabulary), shape, generator=generator)


def _measure(job: Job, prompt: Tensor, new: int, runtime: Runtime) -> Speed:
    options: dict[str, Any] = {"trust_remote_code": runtime.trust_remote_code}
    if job.engine.NAME == TRANSFORMERS:
        options["device"] = str(runtime.device)
    return job.engine.speed(job.path, prompt, new, **options)


def _row(job: Job, speeds: list[Speed]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": job.model,
        "runtime": job.engine.NAME,
        "version": job.engine.version(),
        "disk_bytes": speeds[0].disk_bytes,
    }
    values = {
        name: [getattr(speed, name) for speed in speeds]
        for name in ("prefill", "decode", "first_token", "load", "peak_memory")
    }
    values["memory"] = [speed.peak_memory - speed.base_memory for speed in speeds]
    for name, found in values.items():
        row[name] = statistics.median(found)
        row[f"{name}_low"], row[f"{name}_high"] = min(found), max(found)
    return row


def _compared(rows: list[dict[str, Any]], rounds: int) -> Iterator[str]:
    """A line for every model after the first of a runtime: what it gains on that, if it does."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        before = first.setdefault(row["runtime"], row)
        if before is row:
            continue
        parts = [f"{row['disk_bytes'] / before['disk_bytes']:.2f} x the size on disk"]
        for key, words, more in COMPARED:
            if before[key] > 0:
                verdict = _verdict(before, row, key, more)
                parts.append(f"{words} {row[key] / before[key]:.2f} x: {verdict}")
            else:  # a model that fits what its libraries had taken before
                parts.append(f"{words}: too little to tell")
        note = "" if rounds > 1 else " (of one round, whose spread is not known)"
        yield f"`{row['model']}` in {row['runtime']}, against `{before['model']}`{note}: " + (
            "; ".join(parts)
        )


def _verdict(before: dict[str, Any], row: dict[str, Any], key: str, more: bool) -> str:
    """Whether one is better than the other, by more than the rounds differ among themselves."""
    higher = row[f"{key}_low"] > before[f"{key}_high"]
    lower = row[f"{key}_high"] < before[f"{key}_low"]
    if not higher and not lower:
        return "no gain"
    return "gain" if higher == more else "loss"


def _spread(row: dict[str, Any], key: str, form: Any) -> str:
    ends = [str(form(row.get(f"{key}_{end}", row[key]))) for end in ("low", "high")]
    spread = f" ({ends[0]} to {ends[1]})" if ends[0] != ends[1] else ""
    return f"{form(row[key])}{spread}"
