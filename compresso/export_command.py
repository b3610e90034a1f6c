"""The command `compresso export`, which writes several formats in one run. Imports no torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from compresso import registry
from compresso.commands import (
    AsJson,
    Fresh,
    Model,
    ModelOption,
    Output,
    Request,
    SaveRecipe,
    carry_out,
    choose_model,
    make_request,
    one_model,
)
from compresso.config import fields
from compresso.errors import ConfigError
from compresso.listing import TOPICS
from compresso.options import flag, stage_parameters, with_options
from compresso.report import rows_table, summary_table
from compresso.runtimes.table import Row, sentence, table
from compresso.settings import CalibrationSettings, RuntimeSettings

STAGE = "export"
ListFormats = Annotated[
    bool,
    typer.Option(
        "--list",
        help="Say which runtimes load which formats, packed or dense, and what they need, and"
        " which load MODEL as it is, if that is given; stop.",
        rich_help_panel="Output",
    ),
]


def export_command() -> Callable[..., None]:
    """The function behind it, with a parameter for every option of every format."""

    def command(
        *,
        model: Model = None,
        model_option: ModelOption = None,
        output: Output = None,
        fresh: Fresh = False,
        as_json: AsJson = False,
        save_recipe: SaveRecipe = None,
        list_formats: ListFormats = False,
        **options: Any,
    ) -> None:
        if list_formats:
            show_formats(one_model(model, model_option), as_json=as_json)
            return
        requests = export_requests(one_model(model, model_option), output, options)
        carry_out(requests, fresh=fresh, as_json=as_json, save_recipe=save_recipe)

    return with_options(command, stage_parameters(STAGE))


def show_formats(model: str | None, *, as_json: bool) -> None:
    """Write to stdout what there is to export to, and which runtimes load that.

    model: if it is given, which load that as it is comes first.
    """
    formats = [
        {"format": name, "is": (inspect.getdoc(entry.settings) or "").splitlines()[0]}
        for name, entry in registry.stage(STAGE).methods.items()
    ]
    own = {} if model is None else _own_runtimes(model)
    if as_json:
        found = {"formats": formats, "runtimes": TOPICS["runtimes"]()}
        typer.echo(json.dumps(found | ({"model": own} if own else {}), indent=1))
        return
    console = Console(highlight=False)
    if own:
        console.print(summary_table(_sentences(own), f"`{model}` as it is"))
    console.print(rows_table(formats, "formats"))
    rows: list[Row] = table()["rows"]
    for kind in sorted({row.kind for row in rows}):
        known = [
            {
                "runtime": f"{row.runtime} {table()['versions'][row.runtime]}",
                "for": row.when or "any",
                "what it does": sentence(row.known()),
            }
            for row in rows
            if row.kind == kind
        ]
        console.print(rows_table(known, f"stored as `{kind}`: the first line that fits counts"))


def _own_runtimes(model: str) -> dict[str, dict[str, Any]]:
    from compresso.checkpoint.reader import open_checkpoint
    from compresso.runtimes.traits import runtimes_for

    return runtimes_for(open_checkpoint(model))


def _sentences(known: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {runtime: sentence(one) for runtime, one in known.items()}


def export_requests(
    model: str | None, output: Path | None, options: dict[str, Any]
) -> list[Request]:
    """One request for every format, each with those of the options that it has.

    Several formats are written to directories in `output` that have their names; one to `output`.

    Raises ConfigError if no format is named, one twice, or an option is none of any of them.
    """
    where = f"compresso {STAGE}"
    formats: list[str] = list(options.pop("format") or [])
    given = {name: value for name, value in options.items() if value is not None and value != []}
    settings = {name: registry.method(STAGE, name, where=where).settings for name in formats}
    if len(settings) != len(formats):
        raise ConfigError(f"{where}: a format is named twice")
    if not formats:
        return [make_request(STAGE, model, output, given)]
    known = {name: {*fields(record), *fields(RuntimeSettings)} for name, record in settings.items()}
    for name in formats:
        if registry.method(STAGE, name).calibrated:
            known[name] |= {*fields(CalibrationSettings)}
    for option in given:
        if not any(option in names for names in known.values()):
            raise ConfigError(
                f"{where}: `{flag(option)}` is no option of {_listed(formats)}",
                hint="`compresso export --help` says which format has it",
            )
    model = model or choose_model()
    requests = []
    for name in formats:
        own = {option: value for option, value in given.items() if option in known[name]}
        place = output / name if output is not None and len(formats) > 1 else output
        requests.append(make_request(STAGE, model, place, {"method": name, **own}))
    return requests


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
