"""Running the export stage, and what plain transformers makes of the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from correcting import PROBE, RUNTIME
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresso.checkpoint.reader import Checkpoint
from compresso.recipe import make_step
from compresso.run import Outcome, run_step
from compresso.settings import CalibrationSettings


def run_export(
    source: Checkpoint, target: Path, form: str, *, verify: bool = True, **settings: Any
) -> Outcome:
    """The outcome of a step that wrote `target`, and proved it if it was to."""
    step = make_step("export", {"format": form, **settings}, where="test")
    runtime = replace(RUNTIME, verify=verify)
    return run_step(step, source, CalibrationSettings(), target, runtime)


@torch.no_grad()
def loaded_logits(path: Path, *, trust_remote_code: bool = False) -> tuple[Any, Tensor]:
    """A model that plain transformers loads whole, and what it says of `PROBE`."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), model(input_ids=PROBE).logits.float()


def close(one: Tensor, other: Tensor, limit: float = 1e-4) -> bool:
    """Whether logits are the same but for rounding."""
    return bool((one - other).abs().max() <= limit * other.abs().max())
