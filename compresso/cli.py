"""The `compresso` command. Imports nothing heavy until a command runs."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compresso import __version__, registry
from compresso.commands import HELP, AsJson, Fresh, Model, choose_model, print_json, stage_command
from compresso.config import build
from compresso.errors import ConfigError
from compresso.export_command import STAGE as EXPORT
from compresso.export_command import export_command
from compresso.listing import TOPICS
from compresso.model_commands import add_commands
from compresso.options import option_name, runtime_parameters, sort_runtime, with_options
from compresso.push_command import push_command
from compresso.recipe import load_recipe, locate
from compresso.report import show_report, show_rows
from compresso.runtime import launched, log
from compresso.settings import RuntimeSettings
from compresso.workspace import RUNS


def make_app() -> typer.Typer:
    """The command line: one command per stage of the registry, and those around them."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "token_normalize_func": option_name,
            "help_option_names": ["-h", "--help"],
        },
    )
    app.callback()(compresso)
    for stage in registry.STAGES:
        command = export_command() if stage == EXPORT else stage_command(stage)
        app.command(stage, help=HELP[stage])(command)
    app.command("run")(with_options(run, runtime_parameters()))
    add_commands(app)
    app.command("inspect")(inspect)
    app.command("push")(push_command)
    app.command("list")(list_topics)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compresso {__version__}")
        raise typer.Exit


def compresso(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compress language models: prune and quantize them, and measure what that did.

    Each command reads what the one before it wrote to ./compresso-runs, unless told otherwise.
    """


def run(
    *,
    recipe: Annotated[Path, typer.Argument(help="Recipe, as YAML.", metavar="FILE")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory of the run.",
            show_default="./compresso-runs/NAME-OF-FILE",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the recipe and stop.")] = False,
    keep_last: Annotated[
        bool,
        typer.Option(
            "--keep-last", help="At the end, delete the checkpoints of this run but the last."
        ),
    ] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Run every stage of a recipe; what was finished before is recognised and skipped.

    The runtime options replace those of the recipe.
    """
    checked = load_recipe(recipe)
    values = asdict(checked.runtime) | sort_runtime(options)
    settings = build(RuntimeSettings, values, where="compresso run")
    if check:
        log(f"{recipe}: no mistakes in {len(checked.steps)} stages")
        return
    located, notes = locate(checked, recipe.parent)
    for note in notes:
        log(note)

    from compresso.pipeline import run_recipe
    from compresso.runtime import make_runtime

    directory = output or RUNS / recipe.stem
    runtime = make_runtime(settings)
    outcomes = run_recipe(located, directory, runtime, fresh=fresh, keep_last=keep_last)
    if launched().index:  # one process speaks for all
        return
    evaluations = [outcome for outcome in outcomes if outcome.step.stage == "eval"]
    if evaluations and evaluations[-1] is not outcomes[-1]:
        show_report(evaluations[-1].report, evaluations[-1].step.name)
    if as_json:
        print_json(outcomes)
    else:
        stages = {name for name, stage in registry.STAGES.items() if stage.leaves or stage.exports}
        made = [outcome for outcome in outcomes if outcome.step.stage in stages]
        typer.echo((made or outcomes)[-1].path)


def inspect(
    *,
    model: Model = None,
    as_json: AsJson = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run model code that comes with it.", rich_help_panel="Dangerous")
    ] = False,
) -> None:
    """Say what MODEL is: its parts, its size, how it is stored, what loads it, how it was made.

    It may be an export, too: its directory, or its GGUF file.
    """
    name = model or choose_model()

    from compresso.stages.inspect import inspect_model, print_inspection

    found = inspect_model(name, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_inspection(found)


def list_topics(
    *,
    topic: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(TOPICS)}.", show_default="all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what there is to choose from."""
    if topic is not None and topic not in TOPICS:
        near = difflib.get_close_matches(topic, TOPICS)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(TOPICS)}"
        raise ConfigError(f"nothing is listed under `{topic}`", hint=hint)
    found = {name: TOPICS[name]() for name in ([topic] if topic else TOPICS)}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, rows in found.items():
        show_rows(rows, name)
