"""The commands that run a model, or look at one, and leave nothing behind. Imports no torch."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresso.commands import AsJson, Model, choose_model
from compresso.config import build
from compresso.errors import ConfigError
from compresso.options import runtime_parameters, sort_runtime, with_options
from compresso.recipe import make_step
from compresso.runtime import log
from compresso.settings import RuntimeSettings

if TYPE_CHECKING:
    from compresso.runtime import Runtime
    from compresso.runtimes.transformers_text import TextModel, Written

Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="What to run it in, such as `transformers` or `llama.cpp`. Repeatable.",
        show_default="all that are installed and take it",
    ),
]


NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to write.")
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="What scores are divided by; 0 takes the most likely token."),
]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Draw from the tokens that together have so much probability."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")]


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


def generate(
    *,
    model: Model = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to go on from; `-` reads it from stdin.")
    ],
    new: NewTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    **options: Any,
) -> None:
    """Let MODEL go on from a text, in transformers; what it writes is shown as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    _check_drawing(temperature, top_p, "compresso generate")
    opened = _open_text(model, options, "compresso generate")

    from compresso.runtimes.transformers_text import Style

    written = opened.continue_text(text, Style(new, temperature, top_p, seed), _show)
    typer.echo()
    log(_pace(written))


def chat(
    *,
    model: Model = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    new: NewTokens = 1000,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    **options: Any,
) -> None:
    """Talk with MODEL, in transformers, by its chat template: a line in, an answer out.

    `/reset` begins anew; `/exit`, or the end of the input, ends it.
    """
    _check_drawing(temperature, top_p, "compresso chat")
    opened = _open_text(model, options, "compresso chat")

    from compresso.runtimes.transformers_text import Style

    style = Style(new, temperature, top_p, seed)
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    opened.tokenizer.encode_chat([*begin, {"role": "user", "content": "?"}])  # or fails early
    while (line := _ask()) is not None:
        if line == "/reset":
            messages = list(begin)
        elif line:
            messages.append({"role": "user", "content": line})
            written = opened.answer(messages, style, _show)
            messages.append({"role": "assistant", "content": written.text})
            typer.echo()
            log(_pace(written))


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


def _open_text(model: str | None, options: dict[str, Any], where: str) -> TextModel:
    settings = build(RuntimeSettings, sort_runtime(options), where=where)
    name = model or choose_model()

    from compresso.checkpoint.reader import open_checkpoint
    from compresso.runtime import make_runtime
    from compresso.runtimes.transformers_text import TextModel

    runtime = make_runtime(settings)
    return TextModel.open(
        open_checkpoint(name),
        device=str(runtime.device),
        dtype=runtime.dtype,
        trust_remote_code=runtime.trust_remote_code,
    )


def _check_drawing(temperature: float, top_p: float, where: str) -> None:
    if top_p == 0:
        raise ConfigError(f"{where}: `--top-p` must be above 0")
    if top_p < 1 and temperature == 0:
        raise ConfigError(
            f"{where}: `--top-p` draws, but `--temperature` 0 takes the most likely token",
            hint="pass a `--temperature`, too",
        )


def _ask() -> str | None:
    """The next line of the user's; None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return None if not line or line.strip() == "/exit" else line.strip()


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _pace(written: Written) -> str:
    tokens = len(written.tokens)
    return f"{tokens} tokens in {written.seconds:.1f} s, {tokens / written.seconds:.1f} per second"


COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    verify: ("device", "dtype", "max_memory", "trust_remote_code"),
    bench: ("device", "trust_remote_code"),
    generate: ("device", "dtype", "trust_remote_code"),
    chat: ("device", "dtype", "trust_remote_code"),
}
