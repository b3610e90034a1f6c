"""Measure what loads where: kinds of models, bits and formats, each in the runtime it is for.

    python scripts/bench_runtimes.py --out DIR [--model DIR] [--dataset FILE] [--only NAME ...]
    python scripts/bench_runtimes.py --out DIR --families

Every model is made and exported by `compresso`, and loaded by the runtime of its format, which has
to say what compresso says of the same tokens; then it is timed beside its original, by CPU time of
one thread. What is refused says why. `--families` does it with a tiny random model of every family,
without the times, which would say nothing.

Runs with whatever is installed beside this interpreter: run it once in every environment (one has
gptqmodel, another auto-round), and what was not measured before is added. Everything stays in DIR,
so a run that was stopped goes on. Writes runtimes.json and runtimes.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import string
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import compresso as compresso_package
from compresso.families import FAMILIES
from compresso.runtimes.process import apart

REFERENCE = Path(compresso_package.__file__).parent / "reference"
TESTS = Path(__file__).resolve().parents[1] / "tests"
STRUCTURES = {
    "dense": [],
    "whole blocks pruned": ["prune --method tail --ratio 0.2"],
    "halves pruned": ["prune --method manual --drop a2,m3"],
    "folded": ["fold --method foldgpt --max-group 2 --ratio 0.2"],
}
MIXED = "quantize --method gptq --target-bits 3.25 --group-size 64"
FOUR = "quantize --method rtn --bits 4 --group-size 32"
BITS = {
    "16 bits": [],
    "8 bits, g32": ["quantize --method rtn --bits 8 --group-size 32"],
    "4 bits, g32": [FOUR],
    "4 bits, g32, asymmetric": [f"{FOUR} --asym"],
    "3 bits, g64": ["quantize --method rtn --bits 3 --group-size 64"],
    "3 bits, g256": ["quantize --method rtn --bits 3 --group-size 256"],
    "2 bits, g256": ["quantize --method rtn --bits 2 --group-size 256"],
    "mixed, 3.25 bits": [MIXED],
    "mixed, 3.25 bits, asymmetric": [f"{MIXED} --asym"],
    "2 bits, vectors": ["quantize --method higgs --bits 2"],
    "nf4": ["quantize --method nf4"],
    "4 bits, g32, with adapter": [FOUR, "compensate --method eora --rank 8"],
}
EVERYWHERE = ("16 bits", "4 bits, g32")  # of the kinds that are not plain, and the tiny ones
TINY_MIXED = "quantize --method rtn --target-bits 3.25 --group-size 32"  # reads no text
TINY = {name: BITS[name] for name in EVERYWHERE} | {
    "mixed, 3.25 bits": [TINY_MIXED],
    "mixed, 3.25 bits, asymmetric": [f"{TINY_MIXED} --asym"],
}
FORMATS = {
    "as it is": None,
    "dense": "dense",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "auto-round": "auto-round",
    "bitsandbytes nf4": "bitsandbytes",
    "decilm": "decilm",
    "gguf": "gguf",
    "gguf q8_0": "gguf --type q8_0",
    "gguf q4_k_m": "gguf --type q4_k_m",
    "gguf iq2_xs": "gguf --type iq2_xs",
}
ROUNDING = ("gguf q8_0", "gguf q4_k_m", "gguf iq2_xs")  # tried with dense weights alone
# Of a model with codes: weights that are dense, or the same codes again. Proved, but not timed.
REPEATED = ("dense", "compressed-tensors", "decilm")
READ_TEXT = ("fold", "gptq", "eora", "iq2_xs")
TEXT = ("--nsamples", "16", "--seqlen", "512")  # how good the results are is not asked here
RUNTIMES = ("transformers", "llama.cpp")
PROMPT_TOKENS, NEW_TOKENS = 128, 32
NO_PACKAGE, BUG, INTERRUPTED = 5, 70, 130  # exit codes


class Outcome(NamedTuple):
    """Of a command."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Model:
    """name: in the table. base: what it is made of. steps: the commands that make it."""

    name: str
    base: str
    steps: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--families", action="store_true", help="tiny random models instead")
    parser.add_argument("--dataset", default="stdlib", help="text, where a method reads any")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of models; `*` for any end")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--no-speeds", action="store_true", help="leave them for a later run")
    options = parser.parse_args()
    here = str(Path(__file__).parent)  # of what is called in a process of its own
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "runtimes.json"
    rows: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    for model in families(options.out) if options.families else models(options.model):
        if options.only and not any(fnmatch(model.name, one) for one in options.only):
            continue
        found = measure(model, rows, options)
        rows |= found
        for key, row in found.items():
            print(line(key, row), flush=True)
        results.write_text(json.dumps(rows, indent=1))
    (options.out / "runtimes.md").write_text(table(rows))


def models(base: str) -> list[Model]:
    """Kinds of models made of one."""
    return [
        Model(f"{kind}, {bits}", base, [*made, *coded])
        for kind, made in STRUCTURES.items()
        for bits, coded in BITS.items()
        if kind == "dense" or bits in EVERYWHERE
    ]


def families(out: Path) -> list[Model]:
    """A tiny random model of every family, saved if it is not there yet, and its codes."""
    sys.path.insert(0, str(TESTS))
    import torch
    from correcting import calm
    from tiny_models import TINY_MODELS

    for family in TINY_MODELS:
        if not (out / "tiny" / family).exists():
            calm(family, dtype=torch.bfloat16).save_pretrained(out / "tiny" / family)
    return [
        Model(f"{family}, {bits}", str(out / "tiny" / family), steps)
        for family in TINY_MODELS
        for bits, steps in TINY.items()
        if family == "llama" or bits in EVERYWHERE
    ]


def measure(
    model: Model, rows: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Rows of a model that were still open: proved, then timed side by side."""
    wanted = {}
    for chosen in options.formats:
        key = f"{model.name} | {chosen}"
        if chosen in ROUNDING and not model.name.endswith("16 bits"):
            continue
        if FORMATS[chosen] is None and not model.steps:  # the original
            continue
        if rows.get(key, {}).get("open", True) or (
            "refused" not in rows[key]
            and "decode" not in rows[key]
            and timing(model, chosen, options)
        ):
            wanted[key] = chosen
    if not wanted:
        return {}
    source, refused = make(model, options)
    found, paths = {}, {}
    for key, chosen in wanted.items():
        if refused is not None:
            found[key] = {"refused": refused, "open": False}
            continue
        path, found[key] = prove(source, chosen, options)
        if "difference" in found[key] and timing(model, chosen, options):
            paths[key] = path
    for runtime in RUNTIMES:
        here = {k: path for k, path in paths.items() if found[k]["runtime"].startswith(runtime)}
        for key, speed in timed(runtime, here, model.base, options).items():
            found[key] |= speed
    return found


def timing(model: Model, chosen: str, options: argparse.Namespace) -> bool:
    """Whether an export is to be timed."""
    if options.families or options.no_speeds:
        return False
    return model.name.endswith("16 bits") or chosen not in REPEATED


def make(model: Model, options: argparse.Namespace) -> tuple[str, str | None]:
    """Where a model is, made if it is not there yet; and why not, if it cannot be made."""
    source = model.base
    folder = options.out / "models" / (Path(source).name if options.families else "")
    for number in range(1, len(model.steps) + 1):
        made = "-".join(" ".join(model.steps[:number]).replace("--", "").split())
        target = folder / made
        if not target.exists():
            stage, *given = model.steps[number - 1].split()
            done = compresso(stage, source, "-o", str(target), *given, *text(given, stage, options))
            if done.code:
                return source, f"{stage}: {said(done, source)}"
        source = str(target)
    return source, None


def prove(source: str, chosen: str, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Export a model in a format; `open` if this interpreter could not prove it."""
    path = Path(source)
    if FORMATS[chosen] is not None:
        method, *given = str(FORMATS[chosen]).split()
        folder = options.out / "exports" / (path.parent.name if options.families else "")
        path = folder / f"{path.name}--{chosen.replace(' ', '-')}"
        more = text(given, "export", options)
        if options.families and method == "gguf":
            more.append("--no-tokenizer")
        command = ["export", source, "--format", method, "-o", str(path), *given, *more, "--fresh"]
        if not proved(path) and (done := compresso(*command)).code:
            return path, {"refused": said(done, source), "open": done.code in (NO_PACKAGE, BUG)}
    proof, record = proved(path), json.loads((path / "compresso.json").read_text())
    if not proof:
        return path, {"refused": "was not proved", "open": True}
    runtime = proof.get("runtime", f"transformers {record['versions']['transformers']}")
    found = {"open": False, "runtime": " + ".join([runtime, *loaders(path)])}
    found |= {key: proof[key] for key in ("difference", "tolerance", "top_agreement")}
    if "kl_to_model" in (summary := record.get("report", {}).get("summary", {})):
        found["kl"] = summary["kl_to_model"]
    return path, found | claimed(path)


def proved(path: Path) -> dict[str, Any] | None:
    """What the proof found when it was written; None if it was not, or could not be proved."""
    record = path / "compresso.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    return found.get("proof")


def loaders(path: Path) -> list[str]:
    """Packages that transformers loads it with, and their versions."""
    config = json.loads((path / "config.json").read_text()) if gguf_free(path) else {}
    method = config.get("quantization_config", {}).get("quant_method", "")
    packages = [{"gptq": "gptqmodel"}.get(method, method)] * (method != "")
    packages += ["peft"] * (path / "adapter").exists()
    known = [name for name in packages if name != "compresso"]
    return [f"{name} {version(name)}" for name in known] + ["own code"] * ("auto_map" in config)


def claimed(path: Path) -> dict[str, Any]:
    """What `compresso inspect` says of its runtime: loads packed, dense or not at all."""
    done = compresso("inspect", str(path), "--json")
    if done.code:
        return {"inspect": said(done, str(path))}
    return {"inspect": {k: v["loads"] for k, v in json.loads(done.stdout)["runtimes"].items()}}


def gguf_free(path: Path) -> bool:
    return not list(path.glob("*.gguf"))


def timed(
    runtime: str, paths: dict[str, Path], base: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Speeds of exports in a runtime, each beside that of the original."""
    if not paths:
        return {}
    original = Path(base) if base != "reference" else REFERENCE
    if runtime == "llama.cpp":
        original = options.out / "original"
        compresso("export", base, "--format", "gguf", "-o", str(original), "--no-verify")
    first = speed(runtime, original)
    beside = {f"original_{name}": value for name, value in first.items()}
    return {key: speed(runtime, path) | beside for key, path in paths.items()}


def speed(runtime: str, path: Path) -> dict[str, Any]:
    """What is shown of it: tokens per second of CPU time, and bytes in memory and on disk."""
    job = {"runtime": runtime, "path": str(path)}
    found = apart(f"{Path(__file__).stem}:in_process", job, path=path, runtime=runtime)
    memory = found["peak_memory"] - found["base_memory"]
    return {"memory": memory} | {key: found[key] for key in ("prefill", "decode", "disk_bytes")}


def in_process(runtime: str, path: str) -> dict[str, Any]:
    """Time a model with one thread, by CPU time: what other programs take does not count."""
    time.perf_counter = time.process_time
    tokens = [1 + number % 250 for number in range(PROMPT_TOKENS)]
    if runtime == "llama.cpp":
        from compresso.runtimes import llama_cpp

        (model,), corrections = llama_cpp._files(Path(path))
        files = {"path": str(model), "corrections": [str(file) for file in corrections]}
        given = {"prompt": tokens, "sample": tokens, "new": NEW_TOKENS}
        return llama_cpp._speed(**files, **given, threads=1)
    from compresso.runtimes import transformers

    given = {"prompt": [tokens], "sample": [tokens], "new": NEW_TOKENS}
    place = {"path": path, "device": "cpu", "trust_remote_code": True, "threads": 1}
    return transformers._speed(**place, **given)


def text(given: list[str], stage: str, options: argparse.Namespace) -> list[str]:
    """The options that say what to read, if it reads."""
    reads = any(word in READ_TEXT for word in (stage, *given))
    return ["--dataset", options.dataset, *TEXT] if reads else []


def compresso(*words: str) -> Outcome:
    """Run a command here: to import torch for each would take longer than most of them do."""
    from compresso.__main__ import main as run

    out, err, given, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["compresso", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run()
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:
        return Outcome(BUG, "", traceback.format_exc(limit=-2))
    finally:
        sys.argv = given
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return Outcome(code, out.getvalue(), err.getvalue())


def said(done: Outcome, source: str) -> str:
    """The error of a command, in a line that says nothing of one machine, family or linear."""
    found = " ".join(done.stderr.rpartition("error: ")[2].partition("\nhint: ")[0].split())
    found = re.sub(r"`/[^`]*`", "the model", found.replace(f"`{source}`", "the model"))
    found = re.sub(r"`[a-z_]+(\.[a-z_0-9]+){2,}`", "a linear", found)
    for name in (*FAMILIES, *(str(form).partition(" ")[0] for form in FORMATS.values())):
        word = "this family" if name in FAMILIES else "it"
        found = found.replace(f"the format `{name}`", word).replace(f"`{name}`", word)
    return found


def line(key: str, row: dict[str, Any]) -> str:
    """What was timed of an export, with the original in brackets; or the lot, in the log."""
    if "refused" in row:
        return f"| {key} | {row['refused']} |"
    if "decode" not in row:
        equal = f"{row['difference']:.2g} of {row['tolerance']:.2g} | {row['top_agreement']:.1%}"
        return f"| {key} | {row['runtime']} | {equal} | {row.get('untimed', '')} |"
    size = f"{row['disk_bytes'] / 1e6:.1f}"
    reads = f"{row['prefill']:,.0f} ({row['original_prefill']:,.0f})"
    writes = f"{row['decode']:,.0f} ({row['original_decode']:,.0f})"
    memory = f"{row['memory'] / 1e6:.0f} ({row['original_memory'] / 1e6:.0f})"
    return f"| {key} | {size} | {reads} | {writes} | {memory} |"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: what loads and how equal it is, why the rest is refused, and what was timed."""
    names = list(dict.fromkeys(key.split(" | ")[0] for key in rows))
    forms = [form for form in FORMATS if any(key.endswith(f" | {form}") for key in rows)]
    reasons: dict[str, str] = {}
    lines = [f"| | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    for name in names:
        cells = [cell(rows.get(f"{name} | {form}"), reasons) for form in forms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {letter}: {why}" for why, letter in reasons.items())]
    keys = [key for key, row in rows.items() if "decode" in row]
    if keys:
        lines += ["", "| model | format | MB | reads | writes | MB in memory |", "|---" * 6 + "|"]
        lines += [line(key, rows[key]) for key in keys]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None, reasons: dict[str, str]) -> str:
    """Largest difference and same top tokens; or the letter of why not, added to the reasons."""
    if row is None:
        return ""
    if "refused" in row:
        return reasons.setdefault(row["refused"], string.ascii_letters[len(reasons)])
    top = row["top_agreement"]
    return f"{row['difference']:.2g}" + (f", {top:.1%}" if top < 1 else "")


if __name__ == "__main__":
    main()
