"""Let a checkpoint write text in transformers, shown as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.reload import blaming, quiet
from compresso.errors import ConfigError, ResourceError
from compresso.models.tokenizer import Tokenizer
from compresso.runtimes.memory import shortage
from compresso.runtimes.transformers import open_model

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


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


@dataclass(frozen=True)
class TextModel:
    """A whole model in memory, with its tokenizer."""

    source: Checkpoint
    model: Any
    tokenizer: Tokenizer

    @classmethod
    def open(
        cls,
        source: Checkpoint,
        *,
        device: str,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
    ) -> Self:
        """Load it. dtype: type of its weights; the one that is stored if None.

        Raises CheckpointError if there is no tokenizer, GateError if it does not load, and
        ResourceError if it does not fit memory.
        """
        if (reason := shortage(source, torch.device(device))) is not None:
            raise ResourceError(f"`{source.path}` cannot be loaded: {reason}")
        tokenizer = Tokenizer.open(source, trust_remote_code=trust_remote_code)
        model = open_model(
            source.path, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls(source, model, tokenizer)

    def continue_text(self, prompt: str, style: Style, show: Callable[[str], None]) -> Written:
        """What follows a text. show: is given every piece of it as it comes.

        Raises ConfigError if the model does not take so long a text.
        """
        return self._write(self.tokenizer.encode(prompt, special=True), style, show)

    def answer(
        self, messages: Sequence[dict[str, str]], style: Style, show: Callable[[str], None]
    ) -> Written:
        """The next message of a conversation.

        messages: `role` and `content` of each so far.

        Raises CheckpointError if the template of the model does not take them, and ConfigError if
        the model does not take so long a conversation.
        """
        return self._write(self.tokenizer.encode_chat(messages), style, show)

    @torch.inference_mode()
    def _write(self, ids: list[int], style: Style, show: Callable[[str], None]) -> Written:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = style.new if longest is None else min(style.new, longest - len(ids))
        if room < 1:
            raise ConfigError(
                f"`{self.source.path}` takes {longest} tokens, and these are {len(ids)}",
                hint="give it less text",
            )
        if not ids:
            raise ConfigError("there are no tokens to go on from", hint="give it some text")
        stream, start = _Stream(self.tokenizer, show), time.perf_counter()
        torch.manual_seed(style.seed)
        prompt = torch.tensor([ids], device=self.model.device)
        chosen: dict[str, Any] = {"do_sample": False}
        if style.temperature > 0:
            chosen = {"do_sample": True, "temperature": style.temperature, "top_p": style.top_p}
        with quiet(), blaming(self.source.path):
            found = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                pad_token_id=0,
                top_k=0,
                streamer=stream,
                **chosen,
            )
        new = found[0, len(ids) :].tolist()
        return Written(stream.shown, new, time.perf_counter() - start)


class _Stream:
    """Takes tokens from `generate` as they are made, and passes on their text."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        self.shown = ""
        self._tokenizer, self._show = tokenizer, show
        self._tokens: list[int] | None = None

    def put(self, tokens: Tensor) -> None:
        if self._tokens is None:  # the first are the prompt
            self._tokens = []
            return
        self._tokens += tokens.flatten().tolist()
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(UNFINISHED):
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(self._tokenizer.decode(self._tokens or []))

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.shown):
            self._show(text[len(self.shown) :])
            self.shown = text
