"""Compare sharing weights with dropping them, at the same stored bytes.

    python scripts/bench_fold.py --out DIR --text tests/data/heldout_tokens.npy \\
        --dataset tests/data/calibration_tokens.npy

For every share of the parameters and every way: the checkpoint that `compresso` makes, the bytes
that it stores, and its perplexity and KL(original || made) on held-out windows by `compresso eval`.
What is made stays in DIR, so a run that was stopped goes on. Writes fold.json and fold.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARES = (0.1, 0.2, 0.3, 0.4)
# Name in the table -> command. All get --ratio; a way that cannot reach a share has no cell there.
WAYS = {
    "drop blocks, shortgpt": ["prune", "--method", "shortgpt"],
    "drop blocks, blockpruner": ["prune", "--method", "blockpruner", "--unit", "block"],
    "drop halves, blockpruner": ["prune", "--method", "blockpruner"],
    "fold, foldgpt": ["fold", "--method", "foldgpt"],
    "fold, foldgpt, rank 16": ["fold", "--method", "foldgpt", "--rank", "16"],
    "fold, foldgpt, rank 32": ["fold", "--method", "foldgpt", "--rank", "32"],
    **{
        f"loop twice, {init}": ["fold", "--method", "recursive", "--loops", "2", "--init", init]
        for init in ("average", "stepwise", "lower")
    },
}
SCORED = ("blockpruner", "foldgpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", required=True, help="held-out text, or .npy of windows")
    parser.add_argument("--dataset", required=True, help="calibration text, or .npy of sequences")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--score-tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="ways, by their names in the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, command in WAYS.items():
        if options.only and name not in options.only:
            continue
        for share in SHARES:
            if (row := measure(name, command, share, options)) is not None:
                rows.append(row)
                print(f"{name}, {share:.0%}: {row['ppl']:.2f} / {row['kl']:.3f}", flush=True)
            (options.out / "fold.json").write_text(json.dumps(rows, indent=1))
    (options.out / "fold.md").write_text(table(rows))
    print(table(rows))


def measure(
    name: str, command: list[str], share: float, options: argparse.Namespace
) -> dict[str, Any] | None:
    """What one way comes to at one share; None if it cannot reach that."""
    target = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{share}"
    given = [*command, options.model, "-o", str(target), "--ratio", str(share)]
    given += ["--dataset", options.dataset, "--nsamples", str(options.samples)]
    if command[2] in SCORED:
        given += ["--score-tokens", str(options.score_tokens)]
    start = time.perf_counter()
    if not run(given):
        return None
    seconds = time.perf_counter() - start
    report = target.with_name(f"{target.name}-eval")
    asked = ["eval", str(target), "-o", str(report), "--dataset", options.text, "--no-speed"]
    asked += ["--nsamples", str(options.windows), "--against", options.model]
    if not run(asked):
        raise SystemExit(f"`compresso {' '.join(asked)}` failed")
    found = json.loads((report / "compresso.json").read_text())["report"]
    original, made = found["rows"]
    return {
        "way": name,
        "share": share,
        "bytes_ratio": made["size"] / original["size"],
        "ppl": made["ppl"],
        "kl": made["kl"],
        "seconds": seconds,
    }


def run(arguments: list[str]) -> bool:
    """Whether a compresso command succeeded; 2, wrong usage, is what it says of a wrong share."""
    done = subprocess.run(
        [sys.executable, "-m", "compresso", *arguments], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode not in (0, 2):
        raise SystemExit(f"`compresso {' '.join(arguments)}` exited with {done.returncode}")
    return done.returncode == 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per way, perplexity / KL and the share of bytes saved."""
    lines = ["| | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    lines.append("|---" * (len(SHARES) + 1) + "|")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for share in SHARES:
            row = next((r for r in rows if r["way"] == way and r["share"] == share), None)
            saved = "" if row is None else f" ({1 - row['bytes_ratio']:.1%})"
            cells.append("-" if row is None else f"{row['ppl']:.2f} / {row['kl']:.3f}{saved}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
