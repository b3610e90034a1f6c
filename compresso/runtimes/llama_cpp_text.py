"""Let a GGUF file write text in llama.cpp, shown as it comes.

It runs in this process, unlike in `llama_cpp`: text comes token by token, and a conversation goes
on with the loaded model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from compresso.errors import CheckpointError
from compresso.runtimes.llama_cpp import the_files
from compresso.runtimes.llama_cpp_model import Model
from compresso.runtimes.text import Show, Stream, Style, Written, room_for


@dataclass(frozen=True)
class GgufText:
    """A GGUF file in memory, with its own tokenizer and chat template."""

    path: Path
    model: Model

    @classmethod
    def open(cls, path: Path) -> Self:
        """Load a GGUF file, or the one in a directory, with corrections beside it.

        Raises CheckpointError if there are several, GateError if it does not load, ResourceError
        if llama.cpp is not installed.
        """
        file, corrections = the_files(path)
        return cls(path, Model(str(file), [str(one) for one in corrections]))

    def check_chat(self, messages: Sequence[dict[str, str]]) -> None:
        """As `Writer` has it, as all that follows."""
        self._chat(messages)

    def continue_text(self, prompt: str, style: Style, show: Show) -> Written:
        return self._write(self.model.tokenize(prompt, special=True), style, show)

    def answer(self, messages: Sequence[dict[str, str]], style: Style, show: Show) -> Written:
        # The template has written what goes around a text.
        return self._write(self.model.tokenize(self._chat(messages)), style, show)

    def _chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the template writes it, up to where the next answer begins."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if (template := self.model.chat_template()) is None:
            raise CheckpointError(
                f"`{self.path}` has no chat template",
                hint="it was not made for conversations: use `compresso generate`",
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        values: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True}
        try:
            return environment.from_string(template).render(**values, **self.model.marks())
        except TemplateError as error:
            raise CheckpointError(f"the chat template of `{self.path}` says: {error}") from None

    def _write(self, ids: list[int], style: Style, show: Show) -> Written:
        room = room_for(len(ids), style, self.model.longest, str(self.path))
        self.model.make_room(len(ids) + room, torch.get_num_threads())
        stream, start = Stream(self._decode, show), time.perf_counter()
        generator = torch.Generator().manual_seed(style.seed)
        done, text = 0, list(ids)
        for _ in range(room):
            scores = self.model.run(text[done:], done)[-1]
            done = len(text)
            text.append(choose(scores, style, generator))
            stream.take(text[-1:])
            if self.model.ends(text[-1]):
                break
        stream.end()
        return Written(stream.shown, stream.tokens, time.perf_counter() - start)

    def _decode(self, tokens: list[int]) -> str:
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")


def choose(scores: Tensor, style: Style, generator: torch.Generator) -> int:
    """The next token, by its scores: (V,) float32."""
    if style.temperature == 0:
        return int(scores.argmax())
    shares, order = (scores / style.temperature).softmax(-1).sort(descending=True)
    shares[shares.cumsum(-1) - shares >= style.top_p] = 0  # the first stays, however likely
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
