"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, as the checkpoint's own tokenizer does it."""

    inner: Any
    end: int | None

    @classmethod
    def open(cls, source: Checkpoint, *, trust_remote_code: bool = False) -> Tokenizer:
        """Raises CheckpointError if the checkpoint has no tokenizer that loads from its files."""
        try:
            inner = AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"no tokenizer could be loaded from `{source.path}`: {str(error).splitlines()[0]}",
                hint="add the model's tokenizer files, or pass token ids: `--dataset tokens.npy`",
            ) from error
        return cls(inner, inner.eos_token_id)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """special: add what the tokenizer puts around a text of its own, such as one BOS."""
        # `verbose=False` silences the warning that a long text exceeds the model's context:
        # texts are cut into sequences afterwards.
        encoded = self.inner(text, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation, as the model's template writes it, up to where the next answer begins.

        messages: `role` and `content` of each.

        Raises CheckpointError if there is no template, or it does not take such messages.
        """
        from jinja2 import TemplateError

        place = self.inner.name_or_path
        if not getattr(self.inner, "chat_template", None):
            raise CheckpointError(
                f"`{place}` has no chat template",
                hint="it was not made for conversations: use `compresso generate`",
            )
        try:
            text = self.inner.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise CheckpointError(f"the chat template of `{place}` says: {error}") from None
        # The template has written what goes around a text.
        return self.encode(str(text), special=False)

    def decode(self, tokens: list[int]) -> str:
        return str(self.inner.decode(tokens, skip_special_tokens=True))
