"""Compare all ways to drop blocks or halves of blocks on one model.

    python scripts/bench_depth.py --out DIR --text tests/data/heldout_tokens.npy \\
        --dataset tests/data/calibration_tokens.npy

For every ratio and method: what is removed, the seconds and block forwards that choosing took (for
the largest ratio), and perplexity and KL(original || pruned) on held-out windows. All methods
read the same calibration text. Writes depth.json, depth.md and depth.png.
"""

from __future__ import annotations

import argparse
import json
import time
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from compresso.calibration.candidates import Candidate
from compresso.calibration.data import load_calibration, load_heldout
from compresso.calibration.streams import Streams
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.models.adapter import ModelAdapter
from compresso.recipe import make_step
from compresso.runtime import Runtime, make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.stages.prune_choice import Choice, choose
from compresso.stages.prune_units import Decision, cost_of, unit_of

RATIOS = (0.1, 0.2, 0.3, 0.4)
SEEDS = {"random": 5, "foldgpt": 3}  # how many; the table shows the median by KL
# Name in the table -> method and settings.
METHODS: dict[str, dict[str, Any]] = {
    "random blocks": {"method": "random"},
    "random halves": {"method": "random", "unit": "sub-block"},
    "magnitude": {"method": "magnitude"},
    "taylor": {"method": "taylor"},
    "taylor halves": {"method": "taylor", "unit": "sub-block"},
    "tail": {"method": "tail"},
    "contiguous": {"method": "contiguous"},
    "shortgpt": {"method": "shortgpt"},
    "llm-drop joint": {"method": "llm-drop"},
    "llm-drop iterative": {"method": "llm-drop", "iterative": True},
    "blockpruner blocks": {"method": "blockpruner", "unit": "block"},
    "blockpruner": {"method": "blockpruner"},
    "blockpruner kl": {"method": "blockpruner", "metric": "kl"},
    "evopress": {"method": "evopress", "first_tokens": 1024},
    "foldgpt blocks": {"method": "foldgpt", "steps": 100},
    "foldgpt halves": {"method": "foldgpt", "unit": "sub-block", "steps": 100},
}
ANEW = ("tail", "contiguous", "evopress")  # the others rank units, whatever the ratio
RANKED_AT = 0.4
SCORED = ("taylor", "blockpruner", "evopress")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="stdlib", help="held-out text, or .npy of windows")
    parser.add_argument("--dataset", default="stdlib", help="calibration text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--score-tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="methods, by their names in the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runtime = make_runtime(RuntimeSettings())
    source = open_checkpoint(options.model)
    rows: list[dict[str, Any]] = []
    for name, settings in METHODS.items():
        if options.only and name not in options.only:
            continue
        rows += run_method(name, settings, source, runtime, options)
        print(f"{name}: {rows[-1]['seconds']:.0f} s", flush=True)
        (options.out / "choices.json").write_text(json.dumps(rows, indent=1))
    evaluate(rows, source, runtime, options)
    rows = with_medians(rows)
    (options.out / "depth.json").write_text(json.dumps(rows, indent=1))
    (options.out / "depth.md").write_text(table(rows))
    draw(rows, options.out / "depth.png", title=source.path.name)
    print(table(rows))


def run_method(
    name: str,
    settings: dict[str, Any],
    source: Checkpoint,
    runtime: Runtime,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each ratio and seed.

    What ranks units is asked once, and the ranking is cut at every ratio.
    """
    given = dict(settings)
    if settings["method"] in SCORED:
        given["score_tokens"] = options.score_tokens
    rows = []
    for seed in range(SEEDS.get(settings["method"], 1)):
        if settings["method"] in ("random", "evopress", "foldgpt"):
            given["seed"] = seed
        for ratio in RATIOS if settings["method"] in ANEW else (RANKED_AT,):
            start = time.perf_counter()
            decision = decide(given | {"ratio": ratio}, source, runtime, options)
            facts = {"seed": seed, "seconds": time.perf_counter() - start, **decision.facts}
            for cut in (ratio,) if settings["method"] in ANEW else RATIOS:
                removed = decision.removed
                if settings["method"] not in ANEW:
                    removed = cut_at(cut, decision, source.parameters)
                share = cost_of(removed, decision.costs) / source.parameters
                row = {"method": name, "ratio": cut, "removed": removed, "share": share}
                rows.append(row | facts)
    return rows


def cut_at(ratio: float, decision: Decision, total: int) -> list[int]:
    """The first units of a ranking whose share is nearest the ratio."""
    names = decision.order or sorted(decision.values, key=lambda name: decision.values[name])
    prefixes: list[list[int]] = [[]]
    for name in names:
        prefixes.append([*prefixes[-1], *unit_of(name)])
    shares = [cost_of(prefix, decision.costs) / total for prefix in prefixes]
    best = min(range(len(shares)), key=lambda place: abs(shares[place] - ratio))
    return sorted(prefixes[best])


def decide(
    given: dict[str, Any], source: Checkpoint, runtime: Runtime, options: argparse.Namespace
) -> Decision:
    """What the method removes, chosen as `compresso prune` chooses it."""
    step = make_step("prune", given, where="bench_depth")
    text = CalibrationSettings(
        dataset=options.dataset, samples=options.samples, length=options.length
    )
    calibration = load_calibration(text, source, trust_remote_code=False)
    dtype = runtime.compute_dtype(source.dtype)
    adapter = ModelAdapter.open(source, dtype=dtype, device=runtime.device)
    with (
        TemporaryDirectory() as work,
        CheckpointWriter(Path(work) / "out", key="bench", parts=adapter.count + 1) as writer,
        torch.no_grad(),
    ):
        return choose(Choice(step, adapter, source, calibration, writer, runtime))


def evaluate(
    rows: list[dict[str, Any]], source: Checkpoint, runtime: Runtime, options: argparse.Namespace
) -> None:
    """Add perplexity and KL on the held-out windows to every row, in float32."""
    text = CalibrationSettings(dataset=options.text, samples=options.windows, length=options.length)
    batches = load_heldout(text, source, whole=False, trust_remote_code=False).batches
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=runtime.device)
    with TemporaryDirectory() as work:
        streams = Streams(
            adapter,
            source,
            batches,
            budget=runtime.max_memory,
            spill_dir=Path(work),
        )
        sets = list({tuple(row["removed"]) for row in rows})
        candidates = [Candidate(frozenset(removed)) for removed in [(), *sets]]
        found = streams.measure(candidates, ("loss", "kl"))
    scores = dict(zip(sets, found[1:], strict=True))
    tokens = sum(batch.numel() for batch in batches)
    print(f"original: perplexity {exp(found[0]['loss']):.3f} on {tokens} tokens")
    for row in rows:
        score = scores[tuple(row["removed"])]
        row |= {"ppl": exp(score["loss"]), "kl": score["kl"]}


def with_medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows that differ only in their seed, the middle one by KL, with the range."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["ratio"]), []).append(row)
    kept = []
    for group in groups.values():
        ordered = sorted(group, key=lambda row: row["kl"])
        middle = dict(ordered[len(ordered) // 2])
        if len(ordered) > 1:
            middle["kl_range"] = [ordered[0]["kl"], ordered[-1]["kl"]]
        kept.append(middle)
    return kept


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per method, perplexity / KL per ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " | seconds | forwards |",
        "|---" * (len(ratios) + 3) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {row["ratio"]: row for row in rows if row["method"] == method}
        cells = [
            f"{mine[r]['ppl']:.2f} / {mine[r]['kl']:.3f} ({mine[r]['share']:.1%})" for r in ratios
        ]
        last = mine[ratios[-1]]
        forwards = f"{last['block_forwards']:.0f}" if "block_forwards" in last else ""
        lines.append(
            f"| {method} | " + " | ".join(cells) + f" | {last['seconds']:.0f} | {forwards} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """KL against the share of parameters removed, a line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        style = ("-", "--", ":")[number % 3]
        places = [100 * row["share"] for row in mine]
        axes.plot(places, [row["kl"] for row in mine], style, marker="o", ms=4, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("parameters removed, %")
    axes.set_ylabel("KL(original || pruned), nats per token")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
