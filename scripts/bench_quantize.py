"""Compare all ways to quantize one model, by what they store.

    python scripts/bench_quantize.py --out DIR --text tests/data/heldout_tokens.npy \\
        --dataset tests/data/calibration_tokens.npy

Every checkpoint is made by `compresso quantize`, and judged as everyone who loads it gets it: its
decoded weights, run in float32. Perplexity and KL(original || quantized) in nats on held-out
windows, against the bits that are stored per quantized weight, scales and all, and the bytes of the
whole. Checkpoints stay in DIR, so a run that was stopped goes on. Writes quantize.json, quantize.md
and quantize.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from math import exp
from pathlib import Path
from typing import Any

import numpy
import torch

from compresso import registry
from compresso.calibration.replay import replay
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import ConfigError

WIDTHS, GROUPS = (2, 3, 4), (32, 64, 128)


def ways(mixed: int) -> dict[str, list[str]]:
    """Name in the table -> options. mixed: group size where the bits of groups are chosen."""
    found: dict[str, list[str]] = {}
    for method, bits, size in product(("rtn", "hqq", "gptq"), WIDTHS, GROUPS):
        options = f"--method {method} --bits {bits} --group-size {size}"
        found[f"{method} {bits} bits g{size}"] = options.split()
    for bits in WIDTHS:
        at = f"--bits {bits}".split()
        found[f"rtn rotated {bits} bits g64"] = ["--method", "rtn", *at, "--rotate"]
        found[f"gptq rotated {bits} bits g64"] = ["--method", "gptq", *at, "--rotate"]
        found[f"rsq {bits} bits g64"] = ["--method", "rsq", *at]
        for method, p in product(("higgs", "gptq+higgs"), (1, 2, 4)):
            if bits * p <= 8:
                found[f"{method} p{p} {bits} bits"] = [
                    "--method",
                    method,
                    *at,
                    "--dimension",
                    f"{p}",
                ]
    for target in (2.25, 2.5, 2.75, 3.25, 4.25):
        options = f"--method gptq --target-bits {target} --group-size {mixed}"
        found[f"gptq mixed {target} bits g{mixed}"] = options.split()
    for target in (2.25, 2.5, 3.0, 3.25, 4.0, 4.25):
        for method in ("higgs", "gptq+higgs"):
            options = f"--method {method} --target-bits {target}"
            found[f"{method} mixed {target} bits"] = options.split()
    for target in (2.25, 2.5):
        for allocation in ("search", "lim", "zd", "uniform"):
            options = f"--method gptq --target-bits {target} --allocation {allocation}"
            name = f"gptq mixed {allocation} {target} bits g{mixed}"
            found[name] = [*options.split(), "--group-size", f"{mixed}"]
    for bits in WIDTHS:
        at = f"--bits {bits}"
        more = {
            f"gptq unmatched {bits} bits g64": f"--method gptq {at} --match 0",
            f"rsq unmatched {bits} bits g64": f"--method rsq {at} --match 0",
            f"gptq+higgs unmatched {bits} bits": f"--method gptq+higgs {at} --match 0",
            f"best {bits} bits": f"--preset best {at}",
            f"autoround {bits} bits g64": f"--method autoround {at}",
        }
        found |= {name: options.split() for name, options in more.items()}
    more = {
        "nf4": "--method nf4",
        "nf4 double": "--method nf4 --scale-bits 8",
        "gptq 8-bit scales 2 bits g32": "--method gptq --bits 2 --group-size 32 --scale-bits 8",
        "gptq 8-bit scales 3 bits g32": "--method gptq --bits 3 --group-size 32 --scale-bits 8",
        "autoround from rtn 2 bits g64": "--method autoround --bits 2 --start rtn",
        "best mixed 2.25 bits": "--preset best --target-bits 2.25",
        "best mixed 3.25 bits": "--preset best --target-bits 3.25",
    }
    return found | {name: options.split() for name, options in more.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", type=Path, required=True, help=".npy of held-out windows")
    parser.add_argument("--dataset", required=True, help="calibration text, or .npy of sequences")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--mixed-group-size", type=int, default=128, help="where bits are chosen")
    parser.add_argument("--only", nargs="*", help="what names in the table start with")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "quantize.json"
    rows: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    windows = torch.from_numpy(numpy.load(options.text)[: options.windows].astype("int64"))
    source = open_checkpoint(options.model)
    original, loss = scores(source, windows)
    print(f"original: perplexity {exp(loss):.3f}, {source.stored_bytes / 1e6:.2f} MB", flush=True)
    for name, given in ways(options.mixed_group_size).items():
        if name in rows or (options.only and not name.startswith(tuple(options.only))):
            continue
        try:
            rows[name] = row = measure(name, given, original, windows, options)
        except subprocess.CalledProcessError as error:
            if error.returncode != ConfigError.exit_code:
                raise
            print(f"{name}: impossible for this model", flush=True)
            continue
        print(f"{name}: {row['ppl']:.3f} / {row['kl']:.4f}, {row['bits']:.3f} bits", flush=True)
        results.write_text(json.dumps(rows, indent=1))
    (options.out / "quantize.md").write_text(table(rows, loss))
    draw(rows, options.out / "quantize.png", title=source.path.name)


def measure(
    name: str,
    given: list[str],
    original: list[torch.Tensor],
    windows: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Make a checkpoint, unless it is there, and judge it."""
    target = options.out / name.replace(" ", "-")
    command = ["quantize", options.model, "-o", str(target), *given]
    method = registry.with_preset("quantize", {given[0].strip("-"): given[1]})["method"]
    if registry.method("quantize", method).calibrated:
        command += ["--dataset", options.dataset]
    subprocess.run([sys.executable, "-m", "compresso", *command], check=True, stdout=2)
    summary = Checkpoint(target).provenance["report"]["summary"]
    return {
        "bits": summary["stored_bits"],
        **judge(target, original, windows),
        "seconds": summary["seconds"],
    }


def judge(path: Path, original: list[torch.Tensor], windows: torch.Tensor) -> dict[str, float]:
    """Perplexity, KL(original || this) in nats, and stored bytes of a checkpoint.

    original: logarithms of probabilities after all tokens of each window but the last.
    """
    made = Checkpoint(path)
    lost = divergence = 0.0
    for row, expected, found in zip(windows, original, logarithms(made, windows), strict=True):
        lost += cross_entropy(found, row)
        divergence += float((expected.exp() * (expected - found)).sum(-1).mean())
    return {
        "bytes": made.stored_bytes,
        "ppl": exp(lost / len(windows)),
        "kl": divergence / len(windows),
    }


def scores(source: Checkpoint, windows: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """What `judge` compares with, and the mean loss of the original."""
    found = list(logarithms(source, windows))
    losses = [cross_entropy(one, row) for one, row in zip(found, windows, strict=True)]
    return found, sum(losses) / len(losses)


def logarithms(checkpoint: Checkpoint, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of the probabilities after all tokens of each window but the last, run in float32."""
    place: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    for row in windows:
        logits = replay(checkpoint, row[None], **place, trust_remote_code=True)
        yield logits[0, :-1].log_softmax(-1)


def cross_entropy(logarithms: torch.Tensor, window: torch.Tensor) -> float:
    """Of the next token, in nats. logarithms: of probabilities, after all tokens but the last."""
    return -float(logarithms.gather(-1, window[1:, None]).mean())


def table(rows: dict[str, Any], loss: float) -> str:
    """Markdown, by stored bits; the loss is log perplexity less that of the original."""
    lines = ["| | bits per weight | MB | perplexity | loss | KL | seconds |", "|---" * 7 + "|"]
    for name, row in sorted(
        rows.items(), key=lambda item: (round(item[1]["bits"], 1), item[1]["kl"])
    ):
        lost = float(numpy.log(row["ppl"])) - loss
        lines.append(
            f"| {name} | {row['bits']:.3f} | {row['bytes'] / 1e6:.2f} | {row['ppl']:.3f} |"
            f" {lost:.4f} | {row['kl']:.4f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def method_of(name: str) -> str:
    """What a name in the table says before the width."""
    return name.split(" bits")[0].rsplit(" ", 1)[0] if " bits" in name else name


def draw(rows: dict[str, Any], path: Path, *, title: str) -> None:
    """KL against stored bits per weight, a line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(map(method_of, rows))
    for number, method in enumerate(methods):
        mine = [
            row for name, row in rows.items() if name.split(" bits")[0].rsplit(" ", 1)[0] == method
        ]
        mine.sort(key=lambda row: row["bits"])
        style = ("-", "--", ":")[number % 3]
        axes.plot(
            [row["bits"] for row in mine],
            [row["kl"] for row in mine],
            style,
            marker="o",
            ms=4,
            label=method,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits stored per quantized weight")
    axes.set_ylabel("KL(original || quantized), nats per token")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
