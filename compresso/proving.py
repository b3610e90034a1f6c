"""Prove that what lies on the disk is the model it should be: in transformers, or elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compresso.calibration.replay import replay
from compresso.checkpoint.packings import BITSANDBYTES, method_of
from compresso.checkpoint.proof import TOLERANCE, Fingerprint, ProofReport, compare, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError
from compresso.runtime import Runtime
from compresso.runtimes.engine import Engine

PROMPT = 32  # most tokens continued
NEW_TOKENS = 16


def not_proved(target: Path) -> str:
    """The warning of a result at `target` that was not to be proved."""
    return f"not proved, as asked: `compresso verify {target}` does it"


def prove_here(
    written: Checkpoint,
    fingerprint: Fingerprint,
    runtime: Runtime,
    *,
    carried: Collection[str] = (),
) -> ProofReport:
    """Hold a checkpoint against what it should say, within the memory budget.

    A model that fits it is loaded whole, as users load it, and generates. A larger one is run block
    by block, and so is, besides, one that bitsandbytes runs, whose kernels round more than a proof
    may allow. One with an adapter is loaded only if PEFT is there.

    fingerprint: its `dtype` is what the checkpoint is run in. Not modified.
    carried:     stored tensors that no module takes, as in the source.

    Raises GateError if it is another model, or does not load and run.
    """
    dtype = fingerprint.dtype or runtime.compute_dtype(written.dtype)
    fits = written.parameters * max(dtype.itemsize, written.dtype.itemsize) <= runtime.max_memory
    corrected = written.adapter is not None
    loads = fits and (not corrected or importlib.util.find_spec("peft") is not None)
    if not loads or method_of(written.config) == BITSANDBYTES:
        logits = replay(
            written,
            fingerprint.tokens,
            dtype=dtype,
            device=runtime.device,
            trust_remote_code=runtime.trust_remote_code,
        )
        found = compare(written.path, logits, fingerprint, _limit(fingerprint, dtype))
        found = replace(found, adapter="compresso" if corrected else None)
    if loads:
        found = prove(
            written.path,
            fingerprint,
            dtype=dtype,
            device=runtime.device,
            trust_remote_code=runtime.trust_remote_code,
            carried=carried,
            tolerance=fingerprint.tolerance,
        )
    return found


def prove_in(
    engine: Engine, path: Path, fingerprint: Fingerprint, *, trust_remote_code: bool = False
) -> ProofReport:
    """Hold what lies at `path` against what it should say, run by a runtime as its users run it.

    Generating with a cache must give the tokens that generating without gives. Where they part,
    the two must be nearly tied there, and the comparison ends.

    fingerprint: Not modified.

    Raises GateError if it is another model, or does not load and run.
    """
    tolerance = _limit(fingerprint, fingerprint.dtype or torch.float32)
    logits = engine.logits(path, fingerprint.tokens, trust_remote_code=trust_remote_code)
    found = compare(path, logits, fingerprint, tolerance)
    prompt = fingerprint.tokens[:, :PROMPT]
    room = fingerprint.tokens.shape[1]
    prompt = prompt[:, : max(1, min(PROMPT, room - NEW_TOKENS))]
    cached, uncached = (
        engine.generate(path, prompt, NEW_TOKENS, cache=cache, trust_remote_code=trust_remote_code)
        for cache in (True, False)
    )
    pairs = enumerate(zip(cached, uncached, strict=True))
    parted = next((place for place, (one, other) in pairs if one != other), None)
    if parted is None:
        return replace(found, generated=len(cached))
    both = torch.tensor([[*prompt[0].tolist(), *cached[:parted]]])
    scores = engine.logits(path, both, trust_remote_code=trust_remote_code)[0, -1]
    _check_tie(path, scores, (cached[parted], uncached[parted]), tolerance, parted)
    return replace(found, generated=parted)


def _check_tie(
    path: Path, scores: Tensor, tokens: tuple[int, int], tolerance: float, place: int
) -> None:
    """Raises GateError if either token is not among the highest, within the tolerance."""
    limit = 2 * tolerance * max(1.0, float(scores.abs().max()))
    behind = float(scores.max() - scores[list(tokens)].min())
    if not behind <= limit:
        raise GateError(
            f"`{path}` generates otherwise with a cache than without: at new token {place + 1} one"
            f" is {behind:.3g} below the highest logit (limit {limit:.3g})"
        )


def _limit(fingerprint: Fingerprint, dtype: torch.dtype) -> float:
    return fingerprint.tolerance or TOLERANCE[dtype]
