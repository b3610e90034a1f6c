"""The commands that run a model, or look at one, and leave nothing behind. Imports no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresso.commands import AsJson, Model, choose_model
from compresso.config import build
from compresso.options import runtime_parameters, sort_runtime, with_options
from compresso.recipe import make_step
from compresso.settings import RuntimeSettings
from compresso.text_commands import chat, generate

if TYPE_CHECKING:
    from compresso.runtime import Runtime

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
    """Give the command line these commands, each with the runtime options that it reads."""
    own = {parameter.name: parameter for parameter in runtime_parameters()}
    for command, read in COMMANDS.items():
        parameters = [own[name] for name in read]
        app.command(command.__name__)(with_options(command, parameters))


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


def bench(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Checkpoints, or exports: directories or GGUF files. The original of the first"
            " is measured, too.",
            show_default="the newest in ./compresso-runs, else `reference`",
        ),
    ] = None,
    runtimes: Runtimes = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            min=1,
            help="Tokens to read.",
            show_default="256, or what the models take",
        ),
    ] = None,
    new: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to write.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often all are measured, in turns.")] = 3,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Time MODEL and its original side by side, in transformers and llama.cpp.

    Tokens per second of reading and of writing, time to the first token, memory. Says so where
    there is no gain. If llama.cpp is installed, checkpoints are written as GGUF for it, for the
    time of the measurement; nothing is rounded for that.
    """
    settings = build(RuntimeSettings, sort_runtime(options), where="compresso bench")
    names = models or [choose_model()]

    from compresso.runtime import make_runtime
    from compresso.stages.bench import Plan, print_bench
    from compresso.stages.bench import bench as run

    plan, runtime = Plan(prompt, new, rounds), make_runtime(settings)
    with tempfile.TemporaryDirectory(prefix="compresso-bench-") as folder:
        convert = _gguf_writer(Path(folder), runtime)
        found = run(names, runtimes or [], plan, runtime, convert=convert)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_bench(found)


def _gguf_writer(folder: Path, runtime: Runtime) -> Callable[[Path], Path]:
    """Writes checkpoints as GGUF into `folder`, each once, as their codes are."""
    from compresso.checkpoint.reader import Checkpoint
    from compresso.preflight import check_source
    from compresso.run import run_new

    unproved = replace(runtime, verify=False)

    def write(path: Path) -> Path:
        step = make_step("export", {"format": "gguf"}, where="compresso bench")
        source, target = Checkpoint(path), folder / f"{len(list(folder.iterdir()))}-{path.name}"
        check_source(step, source)
        run_new(step, source, None, target, unproved, fresh=False)  # what it reports is of no use
        return target

    return write


COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    verify: ("device", "dtype", "max_memory", "trust_remote_code"),
    bench: ("device", "trust_remote_code"),
    generate: ("device", "dtype", "trust_remote_code"),
    chat: ("device", "dtype", "trust_remote_code"),
}
