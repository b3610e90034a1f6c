"""Measure the peak memory of `prune` and `quantize` on a checkpoint far larger than a block.

    python scripts/bench_memory.py --work DIR

Writes a random Llama of 24 blocks, about 3 GB, and runs every command in a process of its own.
The bound is what the design promises: the interpreter with its libraries, one block in float32,
one gram, the budget for hidden states, and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INNER, BLOCKS, HEADS, VOCABULARY = 2048, 6656, 24, 16, 32000
BUDGET = 200_000_000
MARGIN = 300_000_000
# A process starts with the peak of the one that starts it, so that has to be a small one.
LAUNCHER = (
    "import os, subprocess, sys\n"
    "process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "_, status, usage = os.wait4(process.pid, 0)\n"
    "print(usage.ru_maxrss)\n"
    "sys.exit(status != 0)\n"
)
LIBRARIES = "import torch, transformers, compresso.run, compresso.stages.quantize"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory with 10 GB free")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    model = options.work / "model"
    if not model.exists():
        make_model(model)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (options.samples, options.length))
    np.save(options.work / "tokens.npy", tokens)
    text = ["--dataset", str(options.work / "tokens.npy"), "--nsamples", str(options.samples)]
    budget = ["--max-memory", str(BUDGET)]
    commands = {
        "prune --method tail": ["prune", "--method", "tail", "--blocks", "6"],
        "prune --method shortgpt": ["prune", "--blocks", "6", *text],
        "quantize --method rtn": ["quantize", "--method", "rtn"],
        "quantize --method gptq": ["quantize", *text],
    }
    base = measure([sys.executable, "-c", LIBRARIES])[1]
    bound = base + block_bytes() + 4 * INNER**2 + BUDGET + MARGIN
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    console = Console()
    console.print(
        f"checkpoint {size / 1e9:.2f} GB, interpreter {base / 1e6:.0f} MB, block in float32"
        f" {block_bytes() / 1e6:.0f} MB, gram {4 * INNER**2 / 1e6:.0f} MB, budget"
        f" {BUDGET / 1e6:.0f} MB"
    )
    table = Table("command", "seconds", "peak memory", "bound")
    for number, (name, command) in enumerate(commands.items()):
        target = ["-o", str(options.work / f"out-{number}")]
        run = [sys.executable, "-m", "compresso", command[0], str(model), *command[1:]]
        seconds, peak = measure([*run, *target, *budget])
        table.add_row(name, f"{seconds:.0f}", f"{peak / 1e6:.0f} MB", f"{bound / 1e6:.0f} MB")
    console.print(table)


def block_bytes() -> int:
    """One block in float32."""
    return 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)


def make_model(path: Path) -> None:
    """Write a random Llama in bf16, one shard per block, without ever holding all of it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    shards = []
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        tensors = {f"{prefix}.self_attn.{n}_proj.weight": random(HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {f"{prefix}.mlp.{n}_proj.weight": random(INNER, HIDDEN) for n in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = random(HIDDEN, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        shards.append(tensors.keys())
        save_file(tensors, path / f"model-{block}.safetensors", {"format": "pt"})
    outside = {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    outside |= {
        n: random(VOCABULARY, HIDDEN) for n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    shards.append(outside.keys())
    save_file(outside, path / f"model-{BLOCKS}.safetensors", {"format": "pt"})
    places = {n: f"model-{i}.safetensors" for i, names in enumerate(shards) for n in names}
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(path)


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * unit


if __name__ == "__main__":
    main()
