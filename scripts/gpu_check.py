"""Run the GPU tests, then time quantizing a few blocks of an 8B-shaped random model.

    python scripts/gpu_check.py

Prints seconds and peak device memory per method, extrapolated from the measured blocks to the
whole model, beside the least time the arithmetic could take on a device of `--tflops`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from compresso import __version__
from compresso.checkpoint.reader import Checkpoint
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import format_bytes, make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

WHOLE_MODEL_BLOCKS = 32
VOCABULARY = 1024


@dataclass(frozen=True)
class Timing:
    """One quantize run. seconds: of the whole run; per_block: of one block, start-up excluded."""

    method: str
    seconds: float
    per_block: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=3, help="blocks to quantize, at least 2")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tflops", type=float, default=790, help="bf16 peak of the device")
    parser.add_argument("--no-tests", action="store_true", help="only the timings")
    options = parser.parse_args()
    if not options.no_tests:
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
        subprocess.run(tests, check=True, cwd=Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as scratch:
        timings = measure(options, Path(scratch))
    show(options, timings)


def measure(options: argparse.Namespace, scratch: Path) -> list[Timing]:
    """Time both methods on `--blocks` blocks and on one less: the difference is one block."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (options.samples, options.length))
    np.save(scratch / "tokens.npy", tokens)
    for blocks in (options.blocks - 1, options.blocks):
        make_model(options, blocks, scratch / f"model-{blocks}")
    run(options, "rtn", options.blocks - 1, scratch / "warm-up")
    timings = []
    for method in ("rtn", "gptq"):
        fewer, _ = run(options, method, options.blocks - 1, scratch / f"{method}-fewer")
        seconds, peak = run(options, method, options.blocks, scratch / method)
        timings.append(Timing(method, seconds, seconds - fewer, peak))
    return timings


def make_model(options: argparse.Namespace, blocks: int, path: Path) -> None:
    """Write a random Llama in bf16, one that is shaped like an 8B but has few blocks."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        max_position_embeddings=options.length,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def run(options: argparse.Namespace, method: str, blocks: int, target: Path) -> tuple[float, int]:
    """Seconds and peak device bytes of one `quantize` at 4 bits, group 128."""
    source = Checkpoint(target.parent / f"model-{blocks}")
    step = make_step("quantize", {"method": method, "group_size": 128}, where="gpu_check")
    calibration = CalibrationSettings(
        dataset=str(target.parent / "tokens.npy"), samples=options.samples, length=options.length
    )
    runtime = make_runtime(RuntimeSettings(device=options.device, max_memory="64GB"))
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run_step(step, source, calibration, target, runtime)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if options.device != "cpu" else 0


def least_seconds(options: argparse.Namespace, method: str) -> float:
    """Arithmetic of one block at the device's peak: one forward pass and, for GPTQ, the grams."""
    if method == "rtn":
        return 0.0
    tokens = options.samples * options.length
    hidden, inner = options.hidden, options.intermediate
    key_value = hidden // 4
    weights = hidden * (2 * hidden + 2 * key_value + 3 * inner)
    # A gram is symmetric: half of its entries are enough.
    grams = (3 * hidden**2 + inner**2) / 2
    return 2 * tokens * (weights + grams) / (options.tflops * 1e12)


def show(options: argparse.Namespace, timings: list[Timing]) -> None:
    """Print the versions, the device and the table to stdout."""
    console = Console()
    device = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    console.print(
        f"compresso {__version__}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, {device}"
    )
    console.print(
        f"{options.blocks} blocks, hidden {options.hidden}, MLP {options.intermediate},"
        f" {options.samples} x {options.length} tokens, 4 bits, group 128"
    )
    table = Table("method", "seconds", "one block", "32 blocks", "arithmetic limit", "peak memory")
    for timing in timings:
        limit = WHOLE_MODEL_BLOCKS * least_seconds(options, timing.method)
        table.add_row(
            timing.method,
            f"{timing.seconds:.1f} s",
            f"{timing.per_block:.2f} s",
            f"{WHOLE_MODEL_BLOCKS * timing.per_block:.0f} s",
            f"{limit:.0f} s" if limit else "-",
            format_bytes(timing.peak),
        )
    console.print(table)


if __name__ == "__main__":
    main()
