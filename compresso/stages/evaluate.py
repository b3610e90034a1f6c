"""Measure what compression did: perplexity, distance from the original, speed and size."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.calibration.data import Calibration
from compresso.calibration.opening import open_adapter
from compresso.calibration.states import States
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import CheckpointError, ResourceError
from compresso.kernels.divergence import (
    Estimate,
    TokenScores,
    mean,
    perplexity,
    proportion,
    token_scores,
)
from compresso.models.adapter import ModelAdapter
from compresso.models.tokenizer import Tokenizer
from compresso.provenance import lineage
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, log, track
from compresso.runtimes import transformers
from compresso.runtimes.memory import shortage
from compresso.runtimes.tasks import run_tasks
from compresso.settings import EvalSettings

# Logits of one chunk of positions are held for two models at once, in float32.
LOGITS_BYTES = 256 * 2**20
SAMPLE_TOKENS = 24
DECODED = 64
SPEEDS = ("prefill", "decode", "peak_memory")


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint walked to its last block: what is left to run is its head."""

    name: str
    source: Checkpoint
    adapter: ModelAdapter
    states: States


@torch.no_grad()
def evaluate(
    source: Checkpoint,
    step: Step,
    calibration: Calibration,
    target: Path,
    runtime: Runtime,
) -> Report:
    """Compare a checkpoint with its original on held-out windows.

    calibration: the held-out windows, run through every checkpoint alike.
    target:      a directory for hidden states that do not fit the memory budget.

    Each model is walked block by block, so one that does not fit memory is evaluated too; only
    the speed needs a whole model, in a process of its own, and is left out with a warning where
    that cannot fit.

    Reports a row per checkpoint: `ppl` with its standard error over windows, `kl` (nats per
    token, original || compressed) likewise, `top1_agreement` with its binomial standard error,
    what tasks measure under `task_NAME_METRIC` with the standard errors of lm-eval,
    `size` (stored bytes), `parameters`, `bits_per_weight`, tokens per second and peak memory.
    """
    settings: EvalSettings = step.settings
    report = Report()
    checkpoints = _checkpoints(source, settings, report)
    # First, as it needs the memory, and to say soon if there is no task, or no text for it.
    achieved = [_tasks(one, settings, runtime) if settings.tasks else {} for _, one in checkpoints]
    original = _walk(checkpoints[0], calibration, target, runtime)
    tokenizer = Tokenizer.open(source, trust_remote_code=runtime.trust_remote_code)
    prompt = _sample_prompt(settings, tokenizer, calibration)
    for (name, checkpoint), answers in zip(checkpoints, achieved, strict=True):
        compared = original
        if checkpoint is not original.source:
            compared = _walk((name, checkpoint), calibration, target, runtime)
        row: dict[str, Any] = {"checkpoint": name, "path": str(checkpoint.path)}
        row |= size_of(checkpoint)
        row |= _quality(original, compared, calibration)
        if settings.speed:
            row |= _speed(checkpoint, calibration, prompt, tokenizer, runtime, report)
        report.rows.append(row | answers)
    if len(report.rows) > 1 or settings.against is None:
        report.summary = _summary(report.rows)
    report.summary["prompt"] = tokenizer.decode(prompt[0].tolist())
    report.summary["evaluation"] = calibration.record
    return report


def size_of(checkpoint: Checkpoint) -> dict[str, float]:
    """`size` in stored bytes of all tensors, `parameters`, and the bits these come to."""
    stored, parameters = checkpoint.stored_bytes, checkpoint.parameters
    return {
        "size": stored,
        "parameters": parameters,
        "bits_per_weight": stored * 8 / parameters,
        "blocks": _block_count(checkpoint.config),
    }


def _block_count(config: dict[str, Any]) -> int:
    return int(next(config[key] for key in ("num_hidden_layers", "n_layer") if key in config))


def _checkpoints(
    source: Checkpoint, settings: EvalSettings, report: Report
) -> list[tuple[str, Checkpoint]]:
    """The original first, then what lies between if asked, then `source`."""
    ancestors = lineage(source)
    if settings.against is not None:
        first = open_checkpoint(settings.against)
    elif len(ancestors) == 1:
        return [("original", source)]
    else:
        try:
            first = Checkpoint(ancestors[0].path)
        except CheckpointError:
            report.warnings.append(
                f"the original `{ancestors[0].path}` is gone: distances are from the checkpoint"
                " itself; pass `--against`"
            )
            return [(ancestors[-1].name, source)]
        if first.key != ancestors[0].key:
            raise CheckpointError(
                f"`{ancestors[0].path}` has changed since `{source.path}` was made from it",
                hint="pass the original as `--against`",
            )
    between = ancestors[1:-1] if settings.each else []
    middle = [(ancestor.name, Checkpoint(ancestor.path)) for ancestor in between]
    if first.path.resolve() == source.path.resolve():
        return [("original", first)]
    return [("original", first), *middle, (ancestors[-1].name, source)]


def _walk(
    checkpoint: tuple[str, Checkpoint], calibration: Calibration, target: Path, runtime: Runtime
) -> Evaluated:
    name, source = checkpoint
    # Differences between models are small: float32 keeps rounding out of them.
    adapter = open_adapter(source, runtime, dtype=torch.float32)
    states = enter_blocks(
        adapter,
        source,
        calibration.batches,
        probe=None,
        budget=runtime.max_memory // 2,
        spill_dir=target,
    )
    for _ in track(walk_blocks(adapter, source, states), adapter.count, f"eval {name}"):
        pass
    return Evaluated(name, source, adapter, states)


def _quality(
    original: Evaluated, compared: Evaluated, calibration: Calibration
) -> dict[str, float]:
    """Perplexity of `compared`, and unless it is `original` itself, its distance from that."""
    losses, divergences, same, tokens = [], [], 0, 0
    for number, batch in enumerate(calibration.batches):
        pieces = list(_scores(original, compared, number, batch))
        losses.append(torch.cat([piece.compressed for piece in pieces], 1).mean(1).cpu())
        divergences.append(torch.cat([piece.divergence for piece in pieces], 1).mean(1).cpu())
        same += sum(int(piece.same_top.sum()) for piece in pieces)
        tokens += batch[:, 1:].numel()
    row = _pair("ppl", perplexity(torch.cat(losses)))
    if compared is not original:
        row |= _pair("kl", mean(torch.cat(divergences)))
        row |= _pair("top1_agreement", proportion(same, tokens))
    return row


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    """The value under `name`, and under `name_se` its standard error where it has one."""
    row = {name: estimate.value}
    if estimate.error is not None:
        row[f"{name}_se"] = estimate.error
    return row


def _scores(
    original: Evaluated, compared: Evaluated, number: int, batch: Tensor
) -> Iterator[TokenScores]:
    """Scores of one batch in runs of positions, (windows, positions) each.

    The last token of a window predicts nothing that is known.
    """
    reference, hidden = original.states[number], compared.states[number]
    targets = batch[:, 1:].to(hidden.device)
    vocabulary = original.adapter.config.get_text_config().vocab_size
    chunk = max(1, LOGITS_BYTES // (4 * vocabulary * len(batch)))
    for start in range(0, targets.shape[1], chunk):
        part = slice(start, min(start + chunk, targets.shape[1]))
        logits = compared.adapter.logits(compared.source, hidden[:, part])
        expected = logits
        if compared is not original:
            expected = original.adapter.logits(original.source, reference[:, part])
        yield token_scores(expected, logits, targets[:, part])


def _sample_prompt(
    settings: EvalSettings, tokenizer: Tokenizer, calibration: Calibration
) -> Tensor:
    if settings.prompt is not None:
        return torch.tensor([tokenizer.encode(settings.prompt, special=True)])
    return calibration.batches[0][:1, :SAMPLE_TOKENS]


def _speed(
    checkpoint: Checkpoint,
    calibration: Calibration,
    prompt: Tensor,
    tokenizer: Tokenizer,
    runtime: Runtime,
    report: Report,
) -> dict[str, Any]:
    if checkpoint.adapter is not None and importlib.util.find_spec("peft") is None:
        report.warnings.append(
            f"`{checkpoint.path}`: speed not measured, as package `peft`, which runs its adapter,"
            " is not installed: pip install 'compresso-llm[peft]'"
        )
        return {}
    if (reason := shortage(checkpoint, runtime.device)) is not None:
        report.warnings.append(f"`{checkpoint.path}`: speed not measured, {reason}")
        return {}
    try:
        speed = transformers.speed(
            checkpoint.path,
            calibration.batches[0][:1],
            DECODED,
            sample=prompt,
            device=str(runtime.device),
            trust_remote_code=runtime.trust_remote_code,
        )
    except ResourceError as error:
        raise ResourceError(
            str(error), hint="pass `--no-speed`: the quality is measured block by block"
        ) from error
    row = {name: value for name, value in asdict(speed).items() if name in SPEEDS}
    row["continuation"] = tokenizer.decode(speed.continuation)
    return row


def _tasks(checkpoint: Checkpoint, settings: EvalSettings, runtime: Runtime) -> dict[str, float]:
    """What it achieves in tasks. Raises ResourceError if it does not fit memory."""
    if (reason := shortage(checkpoint, runtime.device)) is not None:
        raise ResourceError(
            f"`{checkpoint.path}` is too large for tasks: {reason}", hint="leave out `--tasks`"
        )
    log(f"eval: `{checkpoint.path}` in {', '.join(settings.tasks)}")
    return run_tasks(
        checkpoint.path,
        settings.tasks,
        most=settings.task_limit,
        shots=settings.num_fewshot,
        device=str(runtime.device),
        trust_remote_code=runtime.trust_remote_code,
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last checkpoint's numbers, and its ratios to the first's."""
    first, last = rows[0], rows[-1]
    summary = {key: value for key, value in last.items() if isinstance(value, int | float)}
    for key in ("ppl", "size", "parameters", "prefill", "decode"):
        if key in first and key in last:
            summary[f"{key}_ratio"] = last[key] / first[key]
    return summary
