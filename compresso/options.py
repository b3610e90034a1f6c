"""The options of every stage command, made from the settings of its methods. Imports no torch.

A field of a settings class is an option: its description is the help, its default the default
shown. So a setting cannot be forgotten on the command line, or mean something else there.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from compresso import registry
from compresso.config import describe, fields
from compresso.gates import split_limits
from compresso.settings import CalibrationSettings, RuntimeSettings

# Fields whose option has another name than the field.
FLAGS = {
    "samples": "--nsamples",
    "length": "--seqlen",
    "symmetric": "--sym/--asym",
    "block": "--hadamard",
    "task_limit": "--limit",
    "for_runtime": "--for",
}
DANGEROUS = ("trust_remote_code",)
BLOCK_LISTS = {"drop": "3,4,a7", "protect": "first,last", "keep": "3,4"}  # and how they are written
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--assert",
        metavar="LIMIT",
        help="Fail, with exit code 6, unless it holds, such as 'ppl_ratio<1.3'. Repeatable.",
        rich_help_panel="Method",
    ),
]
# What other tools call these options: accepted, not shown.
ALIASES = {
    "output": "output-dir output-path out-path export-path save-model save-dir mlx-path",
    "model": "model-name model-name-or-path model-path base-model pyt-ckpt-path in-dir hf-path",
    "bits": "q-bits wbits",
    "group-size": "q-group-size groupsize",
    "sym": "symmetric",
    "asym": "asymmetric",
    "dataset": "calibration-data calibration-dataset calib-dataset data",
    "nsamples": "nsample n-samples samples num-samples max-samples calib-size"
    " num-calibration-samples n-calibration-samples",
    "seqlen": "seq-len seq-length length max-seq-len max-seq-length max-length calib-seq cutoff-len"
    " sequence-length calibration-sequence-length",
    "device": "devices device-map",
    "ignore": "ignore-layers fp-layers exclude",
    "ratio": "sparsity pruning-ratio prune-ratio",
    "blocks": "drop-n layers-to-skip",
    "drop-count": "num-drop",
    "unit": "target-layer",
    "drop": "drop-layers prune-layers",
    "damping": "damp percdamp damp-percent dampening-frac",
    "act-order": "actorder desc-act",
    "no-act-order": "no-desc-act",
    "eval": "evaluate",
}
_OPTION_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}


def option_name(text: str) -> str:
    """The option, without dashes in front, that a spelling of it stands for."""
    dashed = text.replace("_", "-") if len(text) > 1 else text
    return _OPTION_OF.get(dashed, dashed)


def flag(field: str) -> str:
    """How a field is written on the command line, such as `--group-size`."""
    return FLAGS.get(field, f"--{field.replace('_', '-')}").partition("/")[0]


@dataclass(frozen=True)
class Given:
    """What the user gave to a stage command, sorted by the record it belongs to."""

    step: dict[str, Any]
    calibration: dict[str, Any]
    runtime: dict[str, Any]


def with_options(
    command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """The command, which takes `**options`, with these parameters in their place.

    Typer reads the options of a command off its signature and annotations.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(command)
    def with_all(**values: Any) -> None:
        command(**values)

    all_of_them = [*parameters, *own]
    with_all.__signature__ = inspect.Signature(all_of_them)  # type: ignore[attr-defined]
    with_all.__annotations__ = {p.name: p.annotation for p in all_of_them}
    return with_all


def sort_options(stage: str, values: dict[str, Any]) -> Given:
    """Sort values by record, without the options that were not given."""
    given = {name: value for name, value in values.items() if value is not None and value != []}
    given = registry.with_preset(stage, given, where=f"compresso {stage}")
    calibrated = set(_calibration_fields(stage))
    runtime = set(fields(RuntimeSettings))
    method = registry.stage(stage).methods.get(given.get("method", ""))
    # The seed of a method is that of its text, too.
    own = calibrated.intersection(fields(method.settings)) if method else set()
    # `assert` is no name for a parameter in Python.
    limits = {"assert": split_limits(given.pop("limits"))} if "limits" in given else {}
    step = {k: _parse(k, v) for k, v in given.items() if k not in (calibrated - own) | runtime}
    return Given(
        step=step | limits,
        calibration={k: v for k, v in given.items() if k in calibrated},
        runtime={k: v for k, v in given.items() if k in runtime},
    )


def sort_runtime(values: dict[str, Any]) -> dict[str, Any]:
    """The runtime options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def stage_parameters(stage: str) -> list[inspect.Parameter]:
    """One parameter for every setting of a stage's methods, its calibration and the runtime."""
    methods = registry.stage(stage).methods
    parameters = []
    if registry.stage(stage).named == "format":
        parameters.append(_format_parameter(methods))
    elif len(methods) > 1:
        parameters.append(_method_parameter(methods))
    if presets := registry.stage(stage).presets:
        parameters.append(_preset_parameter(presets))
    calibration = _calibration_fields(stage)
    own = dict.fromkeys(f for entry in methods.values() for f in fields(entry.settings))
    for field in [field for field in own if field not in calibration]:
        having = {name: m for name, m in methods.items() if field in fields(m.settings)}
        note = "" if len(having) == len(methods) else f"Only for {_listed(list(having))}."
        records = {name: entry.settings for name, entry in having.items()}
        parameters.append(_parameter(records, field, note, "Method"))
    if stage == "eval":
        parameters.append(_keyword("limits", Limits))
    for field in calibration:
        parameters.append(_parameter({"": CalibrationSettings}, field, "", "Calibration"))
    entry = registry.stage(stage)
    writes = entry.leaves is not None or entry.exports
    return parameters + [p for p in runtime_parameters() if writes or p.name != "verify"]


def runtime_parameters() -> list[inspect.Parameter]:
    """One parameter for every runtime setting; those that can do harm in a panel of their own."""
    return [
        _parameter(
            {"": RuntimeSettings}, field, "", "Dangerous" if field in DANGEROUS else "Runtime"
        )
        for field in fields(RuntimeSettings)
    ]


def _calibration_fields(stage: str) -> list[str]:
    methods = registry.stage(stage).methods.values()
    calibrated = any(method.calibrated for method in methods)
    return fields(CalibrationSettings) if calibrated else []


def _method_parameter(methods: dict[str, registry.Method]) -> inspect.Parameter:
    lines = [f"`{name}`: {_first_line(entry.settings)}" for name, entry in methods.items()]
    option = typer.Option(
        "--method",
        help=" ".join(lines),
        show_default="the first that has the options given",
        metavar="|".join(methods),
        rich_help_panel="Method",
    )
    return _keyword("method", Annotated[str | None, option])


def _format_parameter(methods: dict[str, registry.Method]) -> inspect.Parameter:
    lines = [f"`{name}`: {_first_line(entry.settings)}" for name, entry in methods.items()]
    option = typer.Option(
        "--format",
        "-f",
        help=f"Repeatable. {' '.join(lines)}",
        show_default=False,
        metavar="|".join(methods),
        rich_help_panel="Method",
    )
    return _keyword("format", Annotated[list[str] | None, option])


def _preset_parameter(presets: dict[str, dict[str, Any]]) -> inspect.Parameter:
    lines = []
    for name, values in presets.items():
        settings = [f"{flag(key)} {value}" for key, value in values.items() if key != "method"]
        lines.append(f"`{name}`: {' '.join([values['method'], *settings])}.")
    option = typer.Option(
        "--preset",
        help=f"A method and its settings. {' '.join(lines)}",
        show_default=False,
        metavar="|".join(presets),
        rich_help_panel="Method",
    )
    return _keyword("preset", Annotated[str | None, option])


def _parameter(records: dict[str, type], field: str, note: str, panel: str) -> inspect.Parameter:
    """The option for a field of settings classes, by method; described as the first does."""
    record = next(iter(records.values()))
    description, default = describe(record, field)
    kind, choices = _plain_type(get_type_hints(record)[field])
    declared = FLAGS.get(field, flag(field))
    if kind is bool and default is not False and "/" not in declared:
        declared = f"{declared}/--no-{declared.removeprefix('--')}"
    option = typer.Option(
        declared,
        help=f"{description} {note}".strip(),
        show_default=_defaults(records, field) or False,
        metavar="|".join(choices) or BLOCK_LISTS.get(field),
        rich_help_panel=panel,
    )
    read_as: Any = {tuple: list[str], list: list[str]}.get(kind, kind)
    return _keyword(field, Annotated[read_as | None, option])


def _defaults(records: dict[str, type], field: str) -> str:
    """The default of a field, and of which methods it is another; empty if it has none."""
    methods: dict[str, list[str]] = {}
    for method, record in records.items():
        default = describe(record, field)[1]
        if isinstance(default, bool | int | float | str):
            word = str(default).lower() if isinstance(default, bool) else str(default)
            methods.setdefault(word, []).append(method)
    alike = len(methods) == 1 and [*records] == next(iter(methods.values()))
    words = [word if alike else f"{word} for {_listed(methods[word])}" for word in methods]
    return "; ".join(words)


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _plain_type(hint: Any) -> tuple[Any, list[str]]:
    """The type a field's option reads, and its choices if it has such."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return type(choices[0]), [str(choice) for choice in choices]
    return get_origin(hint) or hint, []


def _parse(field: str, value: Any) -> Any:
    """Read what the command line cannot: `--drop 3,4,7`."""
    if field == "ignore":
        return tuple(value)
    if field == "tasks":
        return tuple(part.strip() for text in value for part in text.split(","))
    if field not in BLOCK_LISTS:
        return value
    parts = [part.strip() for text in value for part in text.split(",")]
    return [int(part) if part.isdecimal() else part for part in parts]


def _first_line(record: type) -> str:
    return (inspect.getdoc(record) or "").splitlines()[0]


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
