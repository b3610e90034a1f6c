"""The model card that goes with every output: what was done, and how to load it.

It is made from what is recorded, and so can be made again. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compresso.config import describe, fields
from compresso.loading import HERE, Output, loading
from compresso.methods import STAGES
from compresso.provenance import history
from compresso.report import EVALUATED
from compresso.runtime import format_bytes

CARD, ORIGINAL_CARD = "README.md", "README-of-the-original.md"
MARK = "<!-- Written by compresso; made again from compresso.json by every stage and by push. -->"
CARRIED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
ORIGIN = "origin"  # of a record: see `Origin`


@dataclass(frozen=True)
class Origin:
    """What the first model of a history was, as every record that follows keeps it.

    name:  on the hub, or None if it was a folder. folder: its name, if not.
    bytes: of its tensors. parameters: how many. front: what its card says that is carried over.
    licence: files of it that hold its licence.
    """

    name: str | None
    folder: str
    bytes: int
    parameters: int
    front: dict[str, Any] = field(default_factory=dict)
    licence: list[str] = field(default_factory=list)


def hub_name(path: Path) -> str | None:
    """The name on the hub of a folder in its cache; None for any other folder."""
    for part in path.parts:
        if found := re.fullmatch(r"models--([^/]+?)--([^/]+)", part):
            return f"{found[1]}/{found[2]}"
    return None


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty if it has none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def is_ours(text: str) -> bool:
    """Whether compresso wrote a card."""
    return MARK in text


def model_card(
    record: dict[str, Any],
    output: Output,
    *,
    name: str = HERE,
    base: str | None = None,
    evaluated: list[dict[str, Any]] | None = None,
) -> str:
    """The text of a README.md.

    record:    the compresso.json of the output. name: what the output is called where it is loaded.
    base:      the model on the hub that it was made from, if the record does not know.
    evaluated: rows of an evaluation, the original's first and the output's last.
    """
    origin = Origin(**record[ORIGIN])
    steps = [entry["step"] for entry in history(record)]
    known = base or origin.name
    sections = [
        f"---\n{_front(origin, output, known)}---",
        MARK,
        f"# {_title(known or origin.folder, steps)}",
        f"{_link(known, origin)}, made with compresso {record['versions']['compresso']}.",
        "## What was done",
        "\n".join(_step(number, step) for number, step in enumerate(steps, start=1)),
        _calibration(record),
        _recipe(known or origin.folder, steps),
        "## Before and after",
        _sizes(origin, output, evaluated or []),
        _proof(record),
        "## How to load it",
        *[loading(runtime, output, name) for runtime in output.runtimes],
        "## Licence",
        _licence(origin),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(origin: Origin, output: Output, base: str | None) -> str:
    values = {key: origin.front[key] for key in CARRIED if origin.front.get(key)}
    if base is not None:
        values["base_model"] = base
    if "base_model" in values and output.kind != "dense":
        values["base_model_relation"] = "quantized"
    values["library_name"] = "gguf" if output.gguf else "transformers"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = list(dict.fromkeys(["compresso", output.kind]))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _title(base: str, steps: list[dict[str, Any]]) -> str:
    done = ", ".join(f"{step['stage']} {step['method']}" for step in steps)
    return f"{base.rpartition('/')[2]}: {done}"


def _link(base: str | None, origin: Origin) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else f"`{origin.folder}`"


def _step(number: int, step: dict[str, Any]) -> str:
    chosen = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in _chosen(step).items()]
    return f"{number}. **{step['stage']} {step['method']}**: {', '.join(chosen) or 'as it comes'}"


def _chosen(step: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded step that are not the method's own; all of an unknown one."""
    given = {key: value for key, value in step.items() if key not in ("stage", "method")}
    methods = STAGES[step["stage"]].methods if step["stage"] in STAGES else {}
    if step["method"] not in methods:
        return given
    record = methods[step["method"]].settings
    usual = {name: describe(record, name)[1] for name in fields(record)}
    return {
        key: value
        for key, value in given.items()
        if _listed(usual.get(key)) != value and value is not None
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(_relative(value))


def _calibration(record: dict[str, Any]) -> str:
    """Where the text came from that was read, by the last step that read any."""
    read = [entry["calibration"] for entry in history(record) if entry["calibration"]]
    if not read:
        return ""
    parts = [f"{k.replace('_', ' ')} {_plain(v)}" for k, v in read[-1].items() if _is_plain(v)]
    return f"Calibration text: {', '.join(parts)}."


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not (isinstance(value, str) and len(value) > 60)


def _recipe(base: str, steps: list[dict[str, Any]]) -> str:
    stages = [
        {"stage": step["stage"], "method": step["method"]}
        | {key: _relative(value) for key, value in _chosen(step).items()}
        for step in steps
    ]
    text = yaml.safe_dump({"model": base, "stages": stages}, sort_keys=False, allow_unicode=True)
    return f"The same again, with `compresso run` on this file:\n\n```yaml\n{text}```"


def _relative(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _sizes(origin: Origin, output: Output, evaluated: list[dict[str, Any]]) -> str:
    rows = [
        ("size", format_bytes(origin.bytes), format_bytes(output.bytes)),
        (
            "parameters",
            f"{origin.parameters:,}",
            f"{output.parameters:,}" if output.parameters else "",
        ),
        (
            "bits per parameter",
            f"{8 * origin.bytes / origin.parameters:.2f}",
            f"{8 * output.bytes / output.parameters:.2f}" if output.parameters else "",
        ),
    ]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        shown = ("ppl", "kl", "top1_agreement", "prefill", "decode", "peak_memory")
        for key, words, form in EVALUATED:
            if key in shown and (key in first or key in last):
                rows.append((words, _value(first, key, form), _value(last, key, form)))
    lines = ["| | original | this |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _value(row: dict[str, Any], key: str, form: Any) -> str:
    if key not in row:
        return ""
    error = row.get(f"{key}_se")
    return form(row[key]) if error is None else f"{form(row[key])} ± {form(error)}"


def _proof(record: dict[str, Any]) -> str:
    proof = record.get("proof")
    if not proof:
        return "It was not loaded and compared with the model in memory when it was written."
    where = f"Loaded again in {proof.get('runtime') or _transformers(record)}"
    if proof.get("generated") is None:  # what generated nothing, was not loaded whole
        where = "Read again by compresso, block by block,"
    return (
        f"{where} when it was written: logits differ by at most"
        f" {proof['difference']:.2g} from the model's in memory (limit {proof['tolerance']:.2g})."
    )


def _transformers(record: dict[str, Any]) -> str:
    return f"transformers {record['versions']['transformers']}"


def _licence(origin: Origin) -> str:
    front, parts = origin.front, []
    if not front and not origin.licence:
        return "The original came without a card, and without a file that names its licence."
    if licence := front.get("license"):
        named = front.get("license_name")
        parts.append(f"That of the original: {licence}{f' ({named})' if named else ''}.")
        if link := front.get("license_link"):
            parts.append(f"Its text: {link}.")
    else:
        parts.append("The original's card names no licence.")
    if origin.licence:
        parts.append(f"Carried over from it: {', '.join(f'`{n}`' for n in origin.licence)}.")
    return " ".join(parts)
