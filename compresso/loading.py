"""How an output is loaded in each runtime, as its card says it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compresso.runtimes.table import table

HERE = "path/to/this/folder"  # where it is, for a card that does not know


@dataclass(frozen=True)
class Output:
    """What an output holds, as its card has it.

    bytes, parameters: as in `Origin`. runtimes: as `runtimes_for` has it. kind: how its linears are
    stored. adapter: whether corrections lie beside it. gguf: its GGUF file, if it is one; of such
    parameters are not counted, and 0.
    """

    bytes: int
    parameters: int
    kind: str
    runtimes: dict[str, dict[str, Any]]
    adapter: bool = False
    gguf: str | None = None


def loading(runtime: str, output: Output, name: str) -> str:
    """The section of a runtime. name: what the output is called where it is loaded."""
    known = output.runtimes[runtime]
    version = known.get("version") or table()["versions"].get(runtime, "")
    head = f"### {runtime} ({version})"
    if known["loads"] in ("no", "unknown"):
        return f"{head}\n\nDoes not load: {known['note']}."
    notes = [f"{known['note'][:1].upper()}{known['note'][1:]}."] if known["note"] else []
    if known.get("checked", "").startswith("source"):
        notes.append("Read in its source, not run.")
    if output.adapter and runtime != "peft":
        notes.append("This runs without the corrections in `adapter/`.")
    code = _code(runtime, output, name, known)
    return "\n\n".join(part for part in (head, " ".join(notes), code) if part)


def _code(runtime: str, output: Output, name: str, known: dict[str, Any]) -> str:
    if runtime == "vllm":
        return _fenced("sh", [f"vllm serve {name}"])
    if runtime == "llama.cpp":
        place = f"-m {output.gguf}" if name == HERE else f"-hf {name} -hff {output.gguf}"
        return _fenced("sh", [f"llama-cli {place} -p 'Once upon a time'"])
    if runtime == "peft":
        return _adapter_code(output, name, known)
    needs = " ".join(("transformers", *known["needs"]))
    option = ", trust_remote_code=True" if "trust_remote_code" in known["note"] else ""
    if output.gguf:
        option = f', gguf_file="{output.gguf}"'
    return _fenced(
        "python",
        [
            f"# pip install {needs}",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{option})',
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{option})',
        ],
    )


def _adapter_code(output: Output, name: str, known: dict[str, Any]) -> str:
    """How its corrections are put on the model that the code for transformers has loaded."""
    if not output.adapter:
        return "An adapter of yours goes on the model that transformers has loaded."
    lines = ["# pip install peft", "from peft import PeftModel", ""]
    if "has run once" in known["note"]:
        lines[1:1] = ["import torch"]
        lines.append("model(torch.zeros(1, 1, dtype=torch.long))")
    lines.append(f'model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter")')
    return "Goes on the model that transformers has loaded:\n\n" + _fenced("python", lines)


def _fenced(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
