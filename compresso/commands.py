"""What the stage commands share: from options to a step, to its result. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresso import registry
from compresso.config import build
from compresso.errors import ConfigError, ResourceError
from compresso.options import flag, sort_options, stage_parameters, with_options
from compresso.recipe import Recipe, Step, dump_recipe, make_step
from compresso.runtime import launched, log
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.workspace import REFERENCE, newest_checkpoint, next_target

if TYPE_CHECKING:
    from compresso.run import Outcome

HELP = {
    "analyze": """Measure how much every block, and its attention and MLP, changes the stream.

    Writes a report directory with the numbers; reads MODEL and changes nothing.""",
    "prune": """Drop blocks of MODEL, or halves of blocks, chosen by a method.

    Without whole blocks it loads wherever MODEL does; without halves, with the code it carries.""",
    "fold": """Let blocks of MODEL share weights, as a method says.

    Writes a checkpoint that stores shared weights once, and runs every block as before.""",
    "quantize": """Store the linear weights of MODEL's blocks in few bits.

    Writes a checkpoint of packed weights, that loads in plain transformers.""",
    "compensate": """Correct MODEL's linears by matrices of low rank, to come near its original.

    Writes MODEL with an adapter beside its weights, or with the corrections merged.""",
    "heal": """Train MODEL briefly, to give back what compression took.

    Writes a checkpoint of the same form, or MODEL with an adapter beside its weights.""",
    "export": """Write MODEL in formats that other programs read, and prove it where it will run.

    Each becomes a directory of its own; nothing goes on from it unless told to.""",
    "eval": """Measure MODEL against its original: perplexity, distance, speed and size.

    Writes a report directory. With `--assert`, fails if a limit is not kept.""",
}

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory, hub name (`org/name` or `org/name@revision`), or `reference` for the"
        " bundled model.",
        show_default="the newest in ./compresso-runs, else `reference`",
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", hidden=True)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Directory to create.",
        show_default="./compresso-runs/NN-stage-method",
        rich_help_panel="Output",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Discard what an unfinished run left in the output, instead of going on from it.",
        rich_help_panel="Output",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Write these options as a recipe for `compresso run`, and stop.",
        rich_help_panel="Output",
    ),
]


@dataclass(frozen=True)
class Request:
    """A stage command's step, and all that is needed to run it."""

    step: Step
    model: str
    calibration: CalibrationSettings
    runtime: RuntimeSettings
    output: Path | None


def stage_command(stage: str) -> Callable[..., None]:
    """The function behind `compresso STAGE`, with a parameter for every option."""

    def command(
        *,
        model: Model = None,
        model_option: ModelOption = None,
        output: Output = None,
        fresh: Fresh = False,
        as_json: AsJson = False,
        save_recipe: SaveRecipe = None,
        **options: Any,
    ) -> None:
        request = make_request(stage, one_model(model, model_option), output, options)
        carry_out([request], fresh=fresh, as_json=as_json, save_recipe=save_recipe)

    return with_options(command, stage_parameters(stage))


def one_model(model: str | None, option: str | None) -> str | None:
    """What is named, by argument or by `--model`. Raises ConfigError if both name one."""
    if model is not None and option is not None:
        raise ConfigError(f"two models are given: `{model}` and `{option}`")
    return model or option


def carry_out(
    requests: list[Request], *, fresh: bool, as_json: bool, save_recipe: Path | None
) -> None:
    """Run requests, or write them as a recipe; say on stdout where the results are."""
    if save_recipe is not None:
        save_as_recipe(requests, save_recipe)
        typer.echo(save_recipe)
        return
    outcomes = [run_request(request, fresh=fresh) for request in requests]
    if launched().index:  # one process speaks for all
        return
    if as_json:
        print_json(outcomes)
        return
    for outcome in outcomes:
        typer.echo(outcome.path)


def make_request(
    stage: str, model: str | None, output: Path | None, options: dict[str, Any]
) -> Request:
    """Check the options, and choose what to read if the user did not; opens nothing.

    Raises ConfigError naming the wrong option.
    """
    where = f"compresso {stage}"
    given = sort_options(stage, options)
    step = make_step(stage, given.step, where=where)
    reads = registry.reads_text(stage, step.method, step.settings)
    unread = [name for name in given.calibration if name not in given.step]
    if unread and not reads:
        name, kind = flag(unread[0]), registry.stage(stage).named
        way = " with these options" if registry.method(stage, step.method).calibrated else ""
        raise ConfigError(
            f"{where}: {kind} `{step.method}`{way} reads no text, so `{name}` would do nothing",
            hint=f"leave out `{name}`",
        )
    return Request(
        step=step,
        calibration=build(CalibrationSettings, given.calibration if reads else {}, where=where),
        runtime=build(RuntimeSettings, given.runtime, where=where),
        model=model or choose_model(),
        output=output,
    )


def choose_model() -> str:
    """What a bare command reads: the newest checkpoint of `./compresso-runs`, or `reference`."""
    if (newest := newest_checkpoint()) is not None:
        log(f"reading `{newest}`, the newest checkpoint; pass a MODEL for another")
        return str(newest)
    log("reading the bundled model `reference`; pass a MODEL for another")
    return REFERENCE


def run_request(request: Request, *, fresh: bool) -> Outcome:
    """Run the step of a stage command. Raises what `run_step` raises."""
    # Heavy imports wait until the options are known to be right.
    from compresso.checkpoint.reader import open_checkpoint
    from compresso.run import run_step
    from compresso.runtime import make_runtime

    if request.output is None and launched().count > 1:
        raise ConfigError("several processes need to be told where to write", hint="pass `-o`")
    runtime = make_runtime(request.runtime)
    source = open_checkpoint(request.model)
    target = request.output or next_target(request.step.name)
    return run_step(request.step, source, request.calibration, target, runtime, fresh=fresh)


def print_json(outcomes: list[Outcome]) -> None:
    """Write all there is to know about the outcomes to stdout."""
    values = [
        {
            "path": str(outcome.path),
            "stage": outcome.step.stage,
            "method": outcome.step.method,
            "key": outcome.key,
            "reused": outcome.reused,
            "report": outcome.report.to_json(),
        }
        for outcome in outcomes
    ]
    typer.echo(json.dumps(values, indent=1))


def save_as_recipe(requests: list[Request], path: Path) -> None:
    """Write the steps of requests, which are alike in all else, as a recipe.

    Raises ConfigError if the file exists, ResourceError if it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"`{path}` exists", hint="choose another name for the recipe")
    first = requests[0]
    steps = tuple(request.step for request in requests)
    recipe = Recipe(first.model, first.calibration, first.runtime, steps)
    try:
        path.write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write `{path}`: {error.strerror}") from error
