"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

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

    def decode(self, tokens: list[int]) -> str:
        return str(self.inner.decode(tokens, skip_special_tokens=True))
