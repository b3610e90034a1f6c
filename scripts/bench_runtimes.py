"""Measure what loads where: kinds of models, bits and formats, each in the runtime it is for.

    python scripts/bench_runtimes.py --out DIR [--model DIR] [--dataset FILE] [--only NAME ...]

Every model is made and exported by `compresso`, and loaded by the runtime of its format, which has
to say what compresso says of the same tokens; then it is timed beside its original. A cell without
an answer says why. Runs with whatever is installed beside this interpreter: run it once in every
environment (one has llama.cpp, another gptqmodel), and what was not measured before is added.
Everything stays in DIR, so a run that was stopped goes on. Writes runtimes.json and runtimes.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MIXED = "quantize --method gptq --target-bits 3.25 --group-size 64"
STRUCTURES = {
    "dense": [],
    "whole blocks pruned": ["prune --method tail --ratio 0.2"],
    "halves pruned": ["prune --method manual --drop a2,m3"],
    "folded": ["fold --method foldgpt --max-group 2 --ratio 0.2"],
}
BITS = {
    "16 bits": [],
    "8 bits, g32": ["quantize --method rtn --bits 8 --group-size 32"],
    "4 bits, g32": ["quantize --method rtn --bits 4 --group-size 32"],
    "4 bits, g32, asymmetric": ["quantize --method rtn --bits 4 --group-size 32 --asym"],
    "3 bits, g64": ["quantize --method rtn --bits 3 --group-size 64"],
    "3 bits, g256": ["quantize --method rtn --bits 3 --group-size 256"],
    "2 bits, g256": ["quantize --method rtn --bits 2 --group-size 256"],
    "3.25 bits, mixed": [MIXED],
    "2 bits, vectors": ["quantize --method higgs --bits 2"],
    "nf4": ["quantize --method nf4"],
    "4 bits, g32, with adapter": [
        "quantize --method rtn --bits 4 --group-size 32",
        "compensate --method eora --rank 8",
    ],
}
EVERYWHERE = ("16 bits", "4 bits, g32")  # of the kinds that are not plain
FORMATS = {
    "as it is": None,
    "dense": "dense",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "auto-round": "auto-round",
    "bitsandbytes nf4": "bitsandbytes",
    "decilm": "decilm",
    "gguf": "gguf",
    "gguf q4_k_m": "gguf --type q4_k_m",
    "gguf iq2_xs": "gguf --type iq2_xs",
}
READ_TEXT = ("fold", "gptq", "eora", "iq2_xs")
NOTHING = "was not proved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dataset", default="stdlib", help="text, where a method reads any")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="what names of models start with")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "runtimes.json"
    rows: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    for name, steps in models().items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        source = make(name, steps, options)
        for chosen in options.formats:
            key = f"{name} | {chosen}"
            if rows.get(key, {}).get("open", True):
                rows[key] = measure(source, chosen, options)
                print(line(key, rows[key]), flush=True)
                results.write_text(json.dumps(rows, indent=1))
    (options.out / "runtimes.md").write_text(table(rows))


def models() -> dict[str, list[str]]:
    """Name -> the steps that make it."""
    return {
        f"{kind}, {bits}": [*made, *coded]
        for kind, made in STRUCTURES.items()
        for bits, coded in BITS.items()
        if kind == "dense" or bits in EVERYWHERE
    }


def make(name: str, steps: list[str], options: argparse.Namespace) -> str:
    """Where a model is, made if it is not there yet."""
    source: str = options.model
    for number in range(1, len(steps) + 1):
        made = "-".join(" ".join(steps[:number]).replace("--", "").split())
        target = options.out / "models" / made
        if not target.exists():
            stage, *given = steps[number - 1].split()
            done = compresso(stage, source, "-o", str(target), *given, *text(given, stage, options))
            if done.returncode:
                raise SystemExit(f"{name}: {said(done)}")
        source = str(target)
    return source


def measure(source: str, chosen: str, options: argparse.Namespace) -> dict[str, Any]:
    """Export a model in a format, and time it; `open` if this interpreter could not prove it."""
    path = Path(source)
    if FORMATS[chosen] is None:
        if source == options.model:
            return {"refused": "the original", "open": False}
    else:
        method, *given = str(FORMATS[chosen]).split()
        path = options.out / "exports" / f"{path.name}--{chosen.replace(' ', '-')}"
        more = text(given, "export", options)
        done = compresso(
            *("export", source, "--format", method, "-o", str(path)), *given, *more, "--fresh"
        )
        if done.returncode:
            return {"refused": said(done), "open": done.returncode == 5}
    record = json.loads((path / "compresso.json").read_text())
    if not (proof := record.get("proof")):
        return {"refused": NOTHING, "open": True}
    runtime = proof.get("runtime", f"transformers {record['versions']['transformers']}")
    found = {"open": False, "runtime": runtime}
    found |= {key: proof[key] for key in ("difference", "tolerance", "top_agreement")}
    timed = compresso(
        *("bench", str(path), "--runtime", runtime.split()[0], "--json", "--trust-remote-code"),
        *("--rounds", str(options.rounds)),
    )
    if timed.returncode == 0:
        row = json.loads(timed.stdout)["rows"][-1]
        found |= {key: row[key] for key in ("prefill", "decode", "memory", "disk_bytes")}
    return found


def text(given: list[str], stage: str, options: argparse.Namespace) -> list[str]:
    """The options that say what to read, if it reads."""
    reads = any(word in READ_TEXT for word in (stage, *given))
    return ["--dataset", options.dataset, "--seqlen", "512"] if reads else []


def compresso(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compresso", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command, in a line."""
    lines = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else done.stderr.strip()[-300:]


def line(key: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    if "refused" in row:
        return f"| {key} | - | {row['refused']} | | | | |"
    equal = f"{row['difference']:.2g} of {row['tolerance']:.2g}, {row['top_agreement']:.0%}"
    if "decode" not in row:
        return f"| {key} | {row['runtime']} | {equal} | | | | |"
    speed = f"{row['prefill']:.0f} | {row['decode']:.0f} | {row['memory'] / 1e6:.0f}"
    return f"| {key} | {row['runtime']} | {equal} | {row['disk_bytes'] / 1e6:.2f} | {speed} |"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    head = "| model | format | runtime | largest difference of a logit, same top token | MB |"
    lines = [f"{head} reads tokens/s | writes tokens/s | MB in memory |", "|---" * 8 + "|"]
    return "\n".join([*lines, *(line(key, row) for key, row in rows.items())]) + "\n"


if __name__ == "__main__":
    main()
