"""Measure what repairs give back: corrections of few bits, and training of what lost blocks.

    python scripts/bench_repair.py --out DIR --text tests/data/heldout_tokens.npy \\
        --dataset tests/data/calibration_tokens.npy

Every checkpoint is made by `compresso`, and judged as everyone who loads it gets it: its weights
with what corrects them, run in float32. "Recovered" is the share of the lost log perplexity that
came back; after healing, also that on held-out text like that it read. Corrections start from
2 bits, group 64; healing from 30 % of the parameters removed, or blocks shared by twos. Checkpoints
stay in DIR, so a run that was stopped goes on. Writes repair.json, repair.md, and heal.png: the
recovered share against tokens trained on.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import numpy
import torch
from bench_quantize import judge, scores

from compresso import registry
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.kernels.lowrank import correction_parameters

BASES = {
    "rtn": "quantize --method rtn --bits 2",
    "gptq": "quantize --method gptq --bits 2",
    "blockpruner 30%": "prune --method blockpruner --ratio 0.3",
    "tail 30%": "prune --method tail --ratio 0.3",
    "folded by 2": "fold --method foldgpt --max-group 2 --ratio 0.3",
}
QUANTIZED = ("rtn", "gptq")
CORRECTIONS = {
    "svd": "eora --no-weighted",
    "eora": "eora --match 0",
    "eora match": "eora --match 1",
    "eora spread": "eora --size",
    "loftq": "loftq",
    "lq-lora": "lq-lora --no-fisher",
    "lq-lora fisher": "lq-lora",
    "rilq": "rilq",
    "rilq spread": "rilq --size",
    "lrec": "lrec",
}
AS_RANK = "as-rank-"  # stands for as many bytes as that rank takes in all linears
DATA_FREE = {"--no-weighted", "--no-fisher"}
RANKS = (16, 64)
RANKS_OF = {"rilq": (4, 16, 64), "rilq spread": (4, 16, 64), "lrec": (16,)}
HEALERS = ("lora", "last-k", "lisa", "full")
DISTILL = {"": "none", " distilled": "logits"}


def ways(tokens: int) -> dict[str, tuple[str, list[str]]]:
    """Name in the table -> what it is made from, options. tokens: that healing is to train on."""
    found = {}
    for base, (name, given) in product(QUANTIZED, CORRECTIONS.items()):
        for rank in RANKS_OF.get(name, RANKS):
            amount = f"{AS_RANK}{rank}" if given.endswith("--size") else f"--rank {rank}"
            options = f"compensate --method {given} {amount}"
            found[f"{base} + {name} r{rank}"] = base, options.split()
    lossy = [base for base in BASES if base not in QUANTIZED]
    for base, method, (suffix, distill) in product(lossy, HEALERS, DISTILL.items()):
        options = f"heal --method {method} --distill {distill} --tokens {tokens}"
        found[f"{base} + {method}{suffix}"] = base, options.split()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", type=Path, required=True, help=".npy of held-out windows")
    parser.add_argument("--dataset", required=True, help="calibration text, or .npy of sequences")
    parser.add_argument(
        "--train", help="text that healing trains on; that of --dataset if not given"
    )
    parser.add_argument("--train-sequences", type=int, default=128, help="of it")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that healing trains on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--only", nargs="*", help="what names in the table start with")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "repair.json"
    rows: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    windows = torch.from_numpy(numpy.load(options.text)[: options.windows].astype("int64"))
    source = open_checkpoint(options.model)
    original, loss = scores(source, windows)
    rows["original"] = {"ppl": exp(loss), "kl": 0.0, "bytes": source.stored_bytes, "seconds": 0}
    known = ways(options.tokens)

    def ensure(name: str) -> None:
        """Make a checkpoint, and what it is made from, and judge both."""
        before, given = known.get(name, ("", BASES.get(name, "").split()))
        if name not in rows:
            if before:
                ensure(before)
            start = str(place(options.out, before)) if before else options.model
            made = make(name, start, given, options)
            rows[name] = made | judge(place(options.out, name), original, windows)
            if before:
                rows[name]["base"] = before
                print(line(name, rows), flush=True)
            results.write_text(json.dumps(rows, indent=1))

    for name in known:
        if not options.only or name.startswith(tuple(options.only)):
            ensure(name)
    (options.out / "repair.md").write_text(table(rows))
    draw(rows, options.out)


def place(out: Path, name: str) -> Path:
    """Where a checkpoint is made."""
    return out / name.replace(" ", "-").replace("%", "").replace("+", "")


def make(name: str, start: str, given: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Make a checkpoint, unless it is there; what it took."""
    target = place(options.out, name)
    command = [given[0], start, "-o", str(target), *(sized(word, start) for word in given[1:])]
    if registry.method(given[0], given[2]).calibrated and not DATA_FREE & {*given}:
        text = options.dataset
        if given[0] == "heal" and options.train:
            text = options.train
            command += ["--nsamples", str(options.train_sequences), "--seqlen", "512"]
        command += ["--dataset", text]
    subprocess.run([sys.executable, "-m", "compresso", *command], check=True, stdout=2)
    summary = Checkpoint(target).provenance["report"]["summary"]
    found = {"seconds": summary["seconds"]}
    if given[0] == "heal":
        found |= {"tokens": summary["tokens_seen"], "where_trained": summary["recovered"]}
    return found


def sized(word: str, start: str) -> str:
    """An option's value; where it stands for a rank's bytes, these."""
    if not word.startswith(AS_RANK):
        return word
    source = Checkpoint(Path(start))
    count = correction_parameters(
        source.packing.shapes.values(), rank=int(word.removeprefix(AS_RANK))
    )
    return f"+{count * source.dtype.itemsize}B"


def recovered(name: str, rows: dict[str, Any]) -> float:
    """Share of the log perplexity that its base lost which a repair gave back."""
    best, lost, now = (log(rows[one]["ppl"]) for one in ("original", rows[name]["base"], name))
    return (lost - now) / (lost - best)


def line(name: str, rows: dict[str, Any]) -> str:
    """One line of the table."""
    row = rows[name]
    share = f"{recovered(name, rows):.1%}" if "base" in row else ""
    if "where_trained" in row:
        share += f"; {row['where_trained']:.1%}"
    return (
        f"| {name} | {row['bytes'] / 1e6:.2f} | {row['ppl']:.3f} | {row['kl']:.4f} | {share} |"
        f" {row.get('tokens', '')} | {row['seconds']:.0f} |"
    )


def table(rows: dict[str, Any]) -> str:
    """Markdown, every base before its repairs."""
    lines = ["| | MB | perplexity | KL | recovered | tokens | seconds |", "|---" * 7 + "|"]
    bases = dict.fromkeys(row["base"] for row in rows.values() if "base" in row)
    order = ["original"]
    for base in bases:
        order += [base, *(name for name, row in rows.items() if row.get("base") == base)]
    return "\n".join(lines + [line(name, rows) for name in order]) + "\n"


def curve(path: Path) -> tuple[list[int], list[float]]:
    """Tokens trained on, and the share that was recovered by then, on the stage's own text."""
    summary = Checkpoint(path).provenance["report"]["summary"]
    best, lost = log(summary["ppl_original"]), log(summary["ppl_unhealed"])
    with (path / "training.csv").open() as file:
        measured = [row for row in csv.DictReader(file) if row["heldout_ppl"]]
    losses = [log(float(row["heldout_ppl"])) for row in measured]
    return [int(row["tokens"]) for row in measured], [(lost - x) / (lost - best) for x in losses]


def draw(rows: dict[str, Any], out: Path) -> None:
    """Held-out share recovered against tokens, a panel per base, a line per way to heal."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    healed = [name for name in rows if " + " in name and rows[name]["base"] not in QUANTIZED]
    bases = list(dict.fromkeys(rows[name]["base"] for name in healed))
    if not bases:
        return
    figure = Figure(figsize=(5 * len(bases), 4.5), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False, sharey=True)[0]
    for panel, base in zip(panels, bases, strict=True):
        for name in (name for name in healed if rows[name]["base"] == base):
            tokens, shares = curve(place(out, name))
            way, _, distilled = name.removeprefix(f"{base} + ").partition(" ")
            color = f"C{HEALERS.index(way)}"  # the same in every panel
            panel.plot(tokens, shares, "--" if distilled else "-", color=color)
        panel.set_title(base, loc="left")
        panel.set_xlabel("tokens trained on")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("recovered share of lost log perplexity")
    known = [Line2D([], [], color=f"C{index}", label=way) for index, way in enumerate(HEALERS)]
    known += [Line2D([], [], color="grey", linestyle="--", label="distilled")]
    panels[-1].legend(handles=known, frameon=False, fontsize=8)
    figure.savefig(out / "heal.png", dpi=120)


if __name__ == "__main__":
    main()
