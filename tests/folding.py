"""Running the fold stage, and stock models that have the weights it should come to."""

from __future__ import annotations

import torch
from tiny_models import BLOCKS, tokens
from transformers import AutoModelForCausalLM

from compresso.calibration.data import Calibration
from compresso.calibration.streams import Streams
from compresso.checkpoint.proof import prove
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.families import FAMILIES
from compresso.models.structure import MODELING_FILES
from compresso.recipe import make_step
from compresso.runtime import Runtime
from compresso.stages.fold import fold

CALIBRATION = Calibration([tokens(3, 20, seed=1), tokens(1, 20, seed=2)], {"dataset": "test"})
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)
FEW = ["llama", "qwen2", "gpt2"]
# A tiny Llama's blocks have these linears.
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
LINEARS = sum(rows * columns for rows, columns in SHAPES)


def start(source, target, method, **settings):
    """The report, before the output is finished."""
    step = make_step("fold", {"method": method, **settings}, where="test")
    with CheckpointWriter(target, key="test", parts=BLOCKS + 1) as writer:
        return fold(source, step, CALIBRATION, writer, RUNTIME)


def run(source, target, method, **settings):
    """The report, once the output is finished, published and proved."""
    step = make_step("fold", {"method": method, **settings}, where="test")
    with CheckpointWriter(target, key="test", parts=BLOCKS + 1) as writer:
        report = fold(source, step, CALIBRATION, writer, RUNTIME)
        side_files = source.side_files() | {file.name: file for file in MODELING_FILES}
        writer.finalize(config=report.config, side_files=side_files, expected=report.expected)
        writer.publish()
    prove(target, report.fingerprint, dtype=torch.float32, trust_remote_code=True)
    return report


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


@torch.no_grad()
def sharing(model, family, made_from):
    """A stock model whose blocks have the mean of the linears of those blocks."""
    blocks = model.get_submodule(FAMILIES[family].blocks)
    originals = {name: value.clone() for name, value in blocks.state_dict().items()}
    for block, origin in enumerate(made_from):
        for path in (path for group in FAMILIES[family].linears for path in group):
            for name, parameter in blocks[block].get_submodule(path).named_parameters():
                parameter.copy_(sum(originals[f"{b}.{path}.{name}"] for b in origin) / len(origin))
    return model


@torch.no_grad()
def copy_linears(model, family, pairs):
    """Give blocks the linears of others."""
    made_from = [[block] for block in range(BLOCKS)]
    for block, other in pairs.items():
        made_from[block] = [other]
    return sharing(model, family, made_from)


def save(model, path):
    model.save_pretrained(path)
    return Checkpoint(path)


def scored_from_now(monkeypatch):
    """Every candidate that is scored from here on."""
    scored = []
    score = Streams.score

    def recorded(self, candidates, **options):
        scored.extend(candidates)
        return score(self, candidates, **options)

    monkeypatch.setattr(Streams, "score", recorded)
    return scored
