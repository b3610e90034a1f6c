"""Running the compensate stage on tiny models, and reading what it made."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

from compresso import config
from compresso.checkpoint.reader import Checkpoint
from compresso.provenance import read_record
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

TOKENS = tokens(16, 32, seed=5)


def prepare(home):
    """Put the calibration text where `run` reads it."""
    np.save(home / "tokens.npy", TOKENS.numpy())
    return home


def saved(home, family, dtype=torch.bfloat16, **changes):
    """The path of a new checkpoint of a tiny model."""
    path = home / f"{family}-{len(list(home.iterdir()))}"
    build(family, **changes).to(dtype).save_pretrained(path)
    return path


def run(home, source, target, stage, method, **values):
    """The checkpoint that a step makes of another."""
    step = make_step(stage, {"method": method.split()[0], **values}, where="test")
    data = {"dataset": str(home / "tokens.npy"), "samples": 16, "batch_size": 8}
    calibration = config.build(CalibrationSettings, data, where="test")
    runtime = make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
    run_step(step, Checkpoint(source), calibration, target, runtime)
    return Checkpoint(target)


def quantized(home, source, target, method="rtn", **values):
    """The path of a quantized checkpoint, in groups of 32 columns where nothing else is said."""
    return run(home, source, target, "quantize", method, **{"group_size": 32, **values}).path


def rows(checkpoint):
    """What was reported of every linear, by name."""
    return {row["linear"]: row for row in read_record(checkpoint.path)["report"]["rows"]}


def weights(checkpoint):
    """The dense tensors that compresso reads."""
    return checkpoint.load_weights(checkpoint.weight_names())


def logits(path):
    """Of the calibration text, by a model of the weights that compresso reads."""
    checkpoint = Checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if checkpoint.adapter is not None or checkpoint.packed:
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        state = {name: weight.float() for name, weight in weights(checkpoint).items()}
        plain.load_state_dict(state, strict=False)
        model = plain
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def lost(path, original):
    """Mean squared difference of the logits of two checkpoints."""
    return (logits(path) - logits(original)).square().mean().item()
