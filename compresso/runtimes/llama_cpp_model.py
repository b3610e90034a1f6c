"""What runs GGUF files in llama.cpp: the part that is done in a process of its own."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from compresso.errors import GateError, ResourceError

NAME = "llama.cpp"
MOST_AT_ONCE = 512  # tokens of one llama_decode, as in llama.cpp's own programs
ERROR, CONTINUED = 4, 5  # ggml_log_level; the second goes on with the line before
FLOAT32 = 0  # ggml_type


class Said:
    """What llama.cpp says of what goes wrong."""

    def __init__(self) -> None:
        self._text = ""
        self._bad = False

    def take(self, level: int, text: bytes, _: object) -> None:
        """What llama.cpp calls with every piece of a line."""
        self._bad = level == ERROR if level != CONTINUED else self._bad
        if self._bad:
            self._text += text.decode("utf-8", "replace")

    def reason(self) -> str:
        """Its first complaint: what follows is that it could not go on."""
        lines = [line.strip() for line in self._text.splitlines() if line.strip(" =")]
        return lines[0] if lines else "it does not say why"


def open_library() -> tuple[Any, Said]:
    """llama.cpp in this process, which it may end. Raises ResourceError if it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ResourceError(
            "llama.cpp needs the package `llama-cpp-python`",
            hint="pip install 'compresso-llm[gguf]'",
        ) from error
    said = Said()
    callback = llama_cpp.llama_log_callback(said.take)
    said.callback = callback  # type: ignore[attr-defined]  # it must live as long as it is called
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, said


class Model:
    """A loaded model, and room for a text."""

    def __init__(self, path: str, corrections: list[str], *, vocabulary: bool = False) -> None:
        """path: of a file. corrections: files of those. vocabulary: load nothing else.

        Raises GateError if one does not load, ResourceError if llama.cpp is not installed.
        """
        self._library, self._said = library, said = open_library()
        settings = library.llama_model_default_params()
        settings.vocab_only = vocabulary
        settings.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(path.encode(), settings)
        if not self._model:
            raise GateError(f"`{path}` does not load in {NAME}: {said.reason()}")
        self._corrections = []
        for file in corrections:
            if not (found := library.llama_adapter_lora_init(self._model, file.encode())):
                raise GateError(f"`{file}` does not load in {NAME}: {said.reason()}")
            self._corrections.append(found)
        self._words = library.llama_model_get_vocab(self._model)
        self._vocabulary: int = library.llama_vocab_n_tokens(self._words)
        self._context: Any = None

    def make_room(self, tokens: int, threads: int, *, exact: bool = False) -> None:
        """For a new text of so many tokens. exact: with keys and values in float32."""
        library = self._library
        if self._context:
            library.llama_free(self._context)
        settings = library.llama_context_default_params()
        settings.n_ctx = -(-tokens // 256) * 256
        settings.n_batch = settings.n_ubatch = MOST_AT_ONCE
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = FLOAT32
            settings.flash_attn_type = 0
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise GateError(f"{NAME} has no room for {tokens} tokens: {self._said.reason()}")
        for correction in self._corrections:
            self._put(correction)

    def _put(self, correction: Any) -> None:
        adapters = (type(correction) * 1)(correction)
        scales = (ctypes.c_float * 1)(1.0)
        self._library.llama_set_adapters_lora(self._context, adapters, 1, scales)

    def forget(self) -> None:
        """Begin a text anew."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def run(self, tokens: list[int], start: int, *, every: bool = False) -> Tensor:
        """What it says of tokens from place `start` on, the last or every one: (n, V) float32."""
        library, rows = self._library, []
        for first in range(0, len(tokens), MOST_AT_ONCE):
            part = tokens[first : first + MOST_AT_ONCE]
            batch = library.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for place, token in enumerate(part):
                batch.token[place] = token
                batch.pos[place] = start + first + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = every or first + place == len(tokens) - 1
            failed = library.llama_decode(self._context, batch)
            library.llama_batch_free(batch)
            if failed:
                raise GateError(f"{NAME} fails to run the model: {self._said.reason()}")
            for place in range(len(part)):
                if every or first + place == len(tokens) - 1:
                    rows.append(self._row(place))
        return torch.stack(rows)

    @property
    def longest(self) -> int | None:
        """Most tokens that it was made for; None if it does not say."""
        return self._library.llama_model_n_ctx_train(self._model) or None

    def chat_template(self) -> str | None:
        """How it writes conversations, in Jinja; None if it has none."""
        found: bytes | None = self._library.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode("utf-8", "replace")

    def marks(self) -> dict[str, str]:
        """What chat templates call its first and last token: `bos_token` and `eos_token`."""
        tokens = {
            "bos_token": self._library.llama_vocab_bos(self._words),
            "eos_token": self._library.llama_vocab_eos(self._words),
        }
        pieces = {name: self.piece(token, special=True) for name, token in tokens.items()}
        return {name: piece.decode("utf-8", "replace") for name, piece in pieces.items()}

    def ends(self, token: int) -> bool:
        """Whether a text is over with it."""
        return bool(self._library.llama_vocab_is_eog(self._words, token))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for. special: also of those that stand for no text."""
        if token < 0:  # there is no such
            return b""
        room = 64
        while True:
            data = ctypes.create_string_buffer(room)
            count = self._library.llama_token_to_piece(self._words, token, data, room, 0, special)
            if count >= 0:
                return data.raw[:count]
            room = -count

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of a text. special: with what goes around a text of its own."""
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._words, data, len(data), tokens, room, special, True
        )
        return list(tokens[: max(count, 0)])

    def _row(self, place: int) -> Tensor:
        found = self._library.llama_get_logits_ith(self._context, place)
        array = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * self._vocabulary)).contents
        return torch.frombuffer(array, dtype=torch.float32).clone()

    def follow(self, tokens: list[int], new: int, *, cache: bool = True) -> list[int]:
        """The `new` likeliest tokens, one after another."""
        self.forget()
        text, done = list(tokens), 0
        for _ in range(new):
            if not cache:
                self.forget()
                done = 0
            row = self.run(text[done:], done)
            done = len(text)
            text.append(int(row[-1].argmax()))
        return text[len(tokens) :]
