"""The commands that run a model, or look at one, and leave nothing behind. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from compresso.commands import AsJson, Model, choose_model
from compresso.config import build
from compresso.options import runtime_parameters, sort_runtime, with_options
from compresso.settings import RuntimeSettings

Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="What to run it in, such as `transformers` or `llama.cpp`. Repeatable.",
        show_default="all that are installed and take it",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Give the command line these commands, each with the runtime options."""
    commands: tuple[Callable[..., None], ...] = (verify,)
    for command in commands:
        app.command(command.__name__)(with_options(command, runtime_parameters()))


def verify(
    *,
    model: Model = None,
    runtimes: Runtimes = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Load MODEL again, and compare it with what it said when it was made.

    Logits, text with and without a cache, the names and kinds of its tensors, sizes. Fails, with
    exit code 6, if it is not what it was.
    """
    settings = build(RuntimeSettings, sort_runtime(options), where="compresso verify")
    name = model or choose_model()

    from compresso.runtime import make_runtime
    from compresso.stages.verify import check_verification, print_verification
    from compresso.stages.verify import verify as run

    found = run(name, runtimes or [], make_runtime(settings))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_verification(found)
    check_verification(found)
