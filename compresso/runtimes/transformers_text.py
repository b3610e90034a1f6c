"""Let a checkpoint write text in transformers, shown as it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.reload import blaming, quiet
from compresso.errors import ResourceError
from compresso.models.tokenizer import Tokenizer
from compresso.runtimes.memory import shortage
from compresso.runtimes.text import Show, Stream, Style, Written, room_for
from compresso.runtimes.transformers import open_model


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

    def check_chat(self, messages: Sequence[dict[str, str]]) -> None:
        """As `Writer` has it, as all that follows."""
        self.tokenizer.encode_chat(messages)

    def continue_text(self, prompt: str, style: Style, show: Show) -> Written:
        return self._write(self.tokenizer.encode(prompt, special=True), style, show)

    def answer(self, messages: Sequence[dict[str, str]], style: Style, show: Show) -> Written:
        return self._write(self.tokenizer.encode_chat(messages), style, show)

    @torch.inference_mode()
    def _write(self, ids: list[int], style: Style, show: Show) -> Written:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = room_for(len(ids), style, longest, str(self.source.path))
        stream, start = Stream(self.tokenizer.decode, show), time.perf_counter()
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
                streamer=_Streamer(stream),
                **chosen,
            )
        new = found[0, len(ids) :].tolist()
        return Written(stream.shown, new, time.perf_counter() - start)


class _Streamer:
    """What `generate` gives its tokens to, those of the prompt first."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._begun = stream, False

    def put(self, tokens: Tensor) -> None:
        if self._begun:
            self._stream.take(tokens.flatten().tolist())
        self._begun = True

    def end(self) -> None:
        self._stream.end()
