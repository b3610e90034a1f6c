"""The types that a GGUF file can be written in, and what llama.cpp's quantizer makes of them."""

from __future__ import annotations

from typing import Any

import torch

from compresso.errors import ResourceError

# Types of whole files, with llama.cpp's number of each: llama_ftype in its include/llama.h.
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "tq1_0": 36,
    "tq2_0": 37,
    "iq1_s": 24,
    "iq1_m": 31,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq3_xxs": 23,
    "iq3_xs": 22,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq4_nl": 25,
    "iq4_xs": 30,
}
GUESSED = 1024  # a file whose type is to be read off its tensors
DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def tensor_type(file_type: str) -> str:
    """The type that most tensors of a file have, as `gguf` calls it, in lower case."""
    for ending in ("_s", "_m", "_l"):
        if file_type.startswith(("q2_k", "q3_k", "q4_k", "q5_k")) and file_type.endswith(ending):
            return file_type.removesuffix(ending)
    return {"iq2_m": "iq2_s", "iq2_s": "iq2_xs", "iq3_m": "iq3_s", "iq3_xs": "iq3_s"}.get(
        file_type, file_type
    )


def gguf_package() -> Any:
    """The `gguf` package. Raises ResourceError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ResourceError(
            "the format `gguf` needs the package `gguf`", hint="pip install 'compresso-llm[gguf]'"
        ) from error
    return gguf
