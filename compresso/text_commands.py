"""The commands that let a model write text. Imports no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresso.commands import Model, choose_model
from compresso.config import build
from compresso.errors import ConfigError
from compresso.options import flag, sort_runtime
from compresso.runtime import log
from compresso.settings import RuntimeSettings

if TYPE_CHECKING:
    from compresso.runtimes.text import Writer, Written

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
    """Let MODEL go on from a text; what it writes is shown as it comes.

    A checkpoint runs in transformers, a GGUF file or its directory in llama.cpp.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    _check_drawing(temperature, top_p, "compresso generate")
    opened = _open_text(model, options, "compresso generate")

    from compresso.runtimes.text import Style

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
    """Talk with MODEL, by its chat template: a line in, an answer out.

    A checkpoint runs in transformers, a GGUF file or its directory in llama.cpp.

    `/reset` begins anew; `/exit`, or the end of the input, ends it.
    """
    _check_drawing(temperature, top_p, "compresso chat")
    opened = _open_text(model, options, "compresso chat")

    from compresso.runtimes.text import Style

    style = Style(new, temperature, top_p, seed)
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    opened.check_chat([*begin, {"role": "user", "content": "?"}])  # or fails early
    while (line := _ask()) is not None:
        if line == "/reset":
            messages = list(begin)
        elif line:
            messages.append({"role": "user", "content": line})
            written = opened.answer(messages, style, _show)
            messages.append({"role": "assistant", "content": written.text})
            typer.echo()
            log(_pace(written))


def _open_text(model: str | None, options: dict[str, Any], where: str) -> Writer:
    given = sort_runtime(options)
    settings = build(RuntimeSettings, given, where=where)
    name = model or choose_model()

    from compresso.checkpoint.hub import place_of
    from compresso.runtimes import llama_cpp, transformers

    path = place_of(name)
    if llama_cpp.accepts(path) and not transformers.accepts(path):
        _check_plain(given, where)

        from compresso.runtimes.engine import ready_engine
        from compresso.runtimes.llama_cpp_text import GgufText

        ready_engine(llama_cpp.NAME)
        return GgufText.open(path)

    from compresso.checkpoint.reader import Checkpoint
    from compresso.runtime import make_runtime
    from compresso.runtimes.transformers_text import TextModel

    runtime = make_runtime(settings)
    return TextModel.open(
        Checkpoint(path),
        device=str(runtime.device),
        dtype=runtime.dtype,
        trust_remote_code=runtime.trust_remote_code,
    )


def _check_plain(given: dict[str, Any], where: str) -> None:
    """Raises ConfigError for runtime options that llama.cpp has not."""
    usual = {"device": ("auto", "cpu"), "dtype": ("auto",), "trust_remote_code": (False,)}
    for option, value in given.items():
        if value not in usual[option]:
            raise ConfigError(
                f"{where}: `{flag(option)}` has no meaning for a GGUF file, which llama.cpp runs"
                " on the CPU as it is stored",
                hint=f"leave out `{flag(option)}`",
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
