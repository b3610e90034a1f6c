"""The command `compresso export`, which writes several formats in one run. Imports no torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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
from compresso.report import show_rows
from compresso.settings import CalibrationSettings, RuntimeSettings

STAGE = "export"
ListFormats = Annotated[
    bool,
    typer.Option(
        "--list",
        help="Say which runtimes load which formats, packed or dense, and what they need; stop.",
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
            show_formats(as_json=as_json)
            return
        requests = export_requests(one_model(model, model_option), output, options)
        carry_out(requests, fresh=fresh, as_json=as_json, save_recipe=save_recipe)

    return with_options(command, stage_parameters(STAGE))


def show_formats(*, as_json: bool) -> None:
    """Write to stdout what there is to export to, and which runtimes load that."""
    formats = [
        {"format": name, "is": (inspect.getdoc(entry.settings) or "").splitlines()[0]}
        for name, entry in registry.stage(STAGE).methods.items()
    ]
    known = TOPICS["runtimes"]()
    if as_json:
        typer.echo(json.dumps({"formats": formats, "runtimes": known}, indent=1))
        return
    show_rows(formats, "formats")
    show_rows(known, "which runtimes load them")


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
