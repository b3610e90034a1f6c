"""Text for people, whatever runtime writes it: how it is chosen, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from compresso.errors import ConfigError

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
Show = Callable[[str], None]
"""Is given every piece of a text as it comes."""


@dataclass(frozen=True)
class Style:
    """How text is chosen.

    new:         most tokens to write.
    temperature: that scores are divided by before a token is drawn; 0 takes the most likely.
    top_p:       in (0, 1]: draws from the tokens that together have so much.
    """

    new: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """Text that a model wrote: its token ids, which end with a stop token if it stopped itself."""

    text: str
    tokens: list[int]
    seconds: float


class Writer(Protocol):
    """A whole model in memory, with its tokenizer."""

    def check_chat(self, messages: Sequence[dict[str, str]]) -> None:
        """Raises CheckpointError if it has no chat template, or that does not take the messages."""

    def continue_text(self, prompt: str, style: Style, show: Show) -> Written:
        """What follows a text. Raises ConfigError if the model does not take so long a text."""

    def answer(self, messages: Sequence[dict[str, str]], style: Style, show: Show) -> Written:
        """The next message of a conversation.

        messages: `role` and `content` of each so far.

        Raises as `check_chat`, and ConfigError if the model does not take so long a conversation.
        """


def room_for(tokens: int, style: Style, longest: int | None, name: str) -> int:
    """How many tokens may be written after so many. longest: what the model takes, if known.

    Raises ConfigError if there is none to go on from, or no room.
    """
    room = style.new if longest is None else min(style.new, longest - tokens)
    if room < 1:
        raise ConfigError(
            f"`{name}` takes {longest} tokens, and these are {tokens}", hint="give it less text"
        )
    if not tokens:
        raise ConfigError("there are no tokens to go on from", hint="give it some text")
    return room


class Stream:
    """Takes tokens as they are made, and passes on their text, character by character."""

    def __init__(self, decode: Callable[[list[int]], str], show: Show) -> None:
        """decode: the text of tokens; what ends within a character ends with `UNFINISHED`."""
        self.shown = ""
        self.tokens: list[int] = []
        self._decode, self._show = decode, show

    def take(self, tokens: list[int]) -> None:
        """Show what has become whole with these."""
        self.tokens += tokens
        text = self._decode(self.tokens)
        if not text.endswith(UNFINISHED):
            self._pass_on(text)

    def end(self) -> None:
        """Show what is left, whole or not."""
        self._pass_on(self._decode(self.tokens))

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.shown):
            self._show(text[len(self.shown) :])
            self.shown = text
