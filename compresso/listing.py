"""What there is to choose from, for `compresso list`. Imports no torch until families are asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from compresso import registry
from compresso.config import fields

Rows = list[dict[str, str]]


def _stages() -> Rows:
    return [
        {"name": name, "reads": stage.takes, "writes": stage.leaves or _other(stage)}
        for name, stage in registry.STAGES.items()
    ]


def _other(stage: registry.Stage) -> str:
    return "another format" if stage.exports else "a report"


def _methods() -> Rows:
    return [
        {
            "name": name,
            "stage": stage_name,
            "does": (inspect.getdoc(method.settings) or "").splitlines()[0],
            "settings": ", ".join(fields(method.settings)),
            "follows": method.follows,
        }
        for stage_name, stage in registry.STAGES.items()
        for name, method in stage.methods.items()
    ]


def _families() -> Rows:
    from compresso.families import FAMILIES

    return [{"name": name} for name in sorted(FAMILIES)]


def _datasets() -> Rows:
    return [
        {"name": "stdlib", "is": "the Python standard library's source on this machine"},
        {"name": "self", "is": "what the original of the model writes itself"},
        {"name": "wikitext2", "is": "Salesforce/wikitext, wikitext-2-raw-v1, from the hub"},
        {"name": "c4", "is": "the first English shards of allenai/c4, from the hub"},
        {"name": "PATH", "is": ".txt, .md, .py, .rst, .jsonl, .json, .parquet, or a directory"},
        {"name": "PATH.npy", "is": "token ids, integers of shape (sequences, tokens)"},
        {"name": "OWNER/NAME", "is": "a hub dataset with a `text` column"},
    ]


def _formats() -> Rows:
    return [
        {
            "name": "safetensors",
            "is": "dense weights, as transformers saves them",
            "read": "yes",
            "written by": "prune, quantize --no-pack, export: dense",
        },
        {
            "name": "pack-quantized",
            "is": "packed weights of compressed-tensors, 2, 3, 4 or 8 bits, also mixed",
            "read": "by analyze, eval and inspect",
            "written by": "quantize: gptq, rtn, rsq, autoround; export: compressed-tensors",
        },
        {
            "name": "bitsandbytes",
            "is": "nf4, fp4 and int8 as transformers saves them",
            "read": "by analyze, eval and inspect",
            "written by": "quantize: nf4, int8; export: bitsandbytes",
        },
        {
            "name": "gptq",
            "is": "codes of 2, 3, 4 or 8 bits as GPTQ packs them",
            "read": "by analyze, eval and inspect",
            "written by": "export: gptq",
        },
        {
            "name": "auto-round",
            "is": "the same in auto-round's form, also mixed",
            "read": "by analyze, eval and inspect",
            "written by": "export: auto-round",
        },
        {
            "name": "gguf",
            "is": "one file for llama.cpp, with its tokenizer",
            "read": "by inspect, verify, bench, generate and chat",
            "written by": "export: gguf",
        },
        {
            "name": "decilm",
            "is": "Llamas without some attentions or MLPs, as Nemotron-NAS has them",
            "read": "no",
            "written by": "export: decilm",
        },
        {
            "name": "coded",
            "is": "compresso's own: vector grids, and groups with any zeros",
            "read": "by analyze, eval and inspect",
            "written by": "quantize: higgs, gptq+higgs, hqq, mixed bits with --asym",
        },
    ]


def _runtimes() -> Rows:
    from compresso.runtimes.table import table

    known = table()
    return [
        {
            "format": row.kind,
            "when": row.when,
            "runtime": f"{row.runtime} {known['versions'][row.runtime]}",
            "in memory": {"no": "does not load"}.get(row.loads, row.loads),
            "needs": "; ".join(row.install),
            "note": row.note,
            "checked": row.checked.partition(":")[0],
        }
        for row in sorted(known["rows"], key=lambda row: row.kind)
    ]


TOPICS: dict[str, Callable[[], Rows]] = {
    "stages": _stages,
    "methods": _methods,
    "families": _families,
    "datasets": _datasets,
    "formats": _formats,
    "runtimes": _runtimes,
}
