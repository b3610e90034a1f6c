"""A checkpoint's tokenizer as llama.cpp has it: tokens, what they are for, and how text is split.

llama.cpp knows two kinds that matter here: `gpt2`, byte pairs of bytes, with one of a fixed set of
ways to split text first; and `llama`, byte pairs of characters with bytes to fall back on, which
has scores of tokens in place of merges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from compresso.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
# What may be done to text before it is split: compose marks, which is warned of where it shows; put
# a space in front, and show spaces as what they are in tokens.
COMPOSED = ("NFC",)
SPACED = ("NFC", "Prepend", "Replace")
SPACES = ({"String": " "}, SPACE)
# Where nothing merges to a token: below the score of every merge.
UNREACHED = -1e9

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2, _DIGITS = "gpt2", "digits"

# How a tokenizer splits text, and whether whole words of the vocabulary skip the merges ->
# llama.cpp's name for that. From its src/llama-vocab.cpp, read in llama-cpp-python 0.3.36.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), False): "dbrx",
    ((rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_CASED}|\p{{N}}|{_CASED_REST}",), True): "tekken",
    (
        (
            rf"{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_UPPER}+{_LOWER}*{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}|{_CASED_REST}",
        ),
        False,
    ): "gpt-4o",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    model: `gpt2` or `llama`. pre: how text is split. tokens, types: by id.
    scores: by id, of the model `llama`. merges: of the model `gpt2`, two parts and a space between.
    space_prefix: whether text is read as if it began with a space; None to leave it unsaid.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool | None = None


def read_vocabulary(tokenizer: dict[str, Any], size: int, *, pre: str | None) -> Vocabulary:
    """The vocabulary of a tokenizer in `tokenizers`' own form, as tokenizer.json holds it.

    size: how many tokens the model has; ids that the tokenizer lacks are padded.
    pre:  llama.cpp's name of how it splits text; None to find out.

    Raises CheckpointError if llama.cpp has nothing like it.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is of the type `{model['type']}`")
    ids = dict(model["vocab"])
    added = {token["content"]: token for token in tokenizer.get("added_tokens", ())}
    ids |= {content: token["id"] for content, token in added.items()}
    if max(ids.values()) >= size:
        raise CheckpointError(
            f"the tokenizer has the token {max(ids.values())}, but the model only {size} tokens",
            hint="take what was added from the tokenizer, or pass `--no-tokenizer` for a file that"
            " takes token ids alone",
        )
    if pre is None:
        _check_normalizer(tokenizer, SPACED if model.get("byte_fallback") else COMPOSED)
    if model.get("byte_fallback"):
        return _characters(tokenizer, ids, added, size)
    found = pre or _pre_tokenizer(tokenizer)
    tokens, types = _pad(size)
    for content, index in ids.items():
        tokens[index] = content
        types[index] = _type(added[content]) if content in added else NORMAL
    merges = [" ".join(_visible(part) for part in pair) for pair in _merges(model)]
    return Vocabulary("gpt2", found, tokens, types, merges=merges)


def _check_normalizer(tokenizer: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises CheckpointError if text is changed, before it is split, as llama.cpp does not."""
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        kind = step["type"]
        replaces = kind == "Replace" and (step["pattern"], step["content"]) != SPACES
        if kind not in known or replaces:
            raise _unknown(f"it changes text by `{kind}`")


def _characters(
    tokenizer: dict[str, Any], ids: dict[str, int], added: dict[str, Any], size: int
) -> Vocabulary:
    """Of a tokenizer with bytes to fall back on: a merge's rank becomes the score of its result."""
    model = tokenizer["model"]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    tokens, types = _pad(size)
    scores = [UNREACHED] * size
    for content, index in ids.items():
        tokens[index], types[index] = content, NORMAL
        scores[index] = -float(ranks[content]) if content in ranks else UNREACHED
        if len(content) == 6 and content.startswith("<0x") and content.endswith(">"):
            types[index] = BYTE
        elif content == model.get("unk_token"):
            types[index] = UNKNOWN
        elif content in added:
            types[index] = _type(added[content])
            if types[index] == USER_DEFINED:
                tokens[index] = content.replace(SPACE, " ")
    return Vocabulary("llama", "default", tokens, types, scores, space_prefix=_prefixed(tokenizer))


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    parts: list[str] = []
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
            parts.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            parts.append(_DIGITS)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            parts += [_GPT2] if step.get("use_regex", True) else []
        else:
            raise _unknown(f"it splits text by `{kind}`")
    found = PRE_TOKENIZERS.get((tuple(parts), bool(tokenizer["model"].get("ignore_merges"))))
    if found is None:
        raise _unknown(f"it splits text in a way that is not known: `{' | '.join(parts)}`")
    return found


def _prefixed(tokenizer: dict[str, Any]) -> bool:
    """Whether a text's first word is read as one after a space."""
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _steps(part: dict[str, Any] | None, list_name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[list_name]) if part["type"] == "Sequence" else [part]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    return [(left, right) for left, right in pairs]


def _visible(part: str) -> str:
    """Spaces as byte-level tokenizers write them, for they separate the parts of a merge."""
    return part.replace(" ", "\u0120")


def _pad(size: int) -> tuple[list[str], list[int]]:
    return [f"[PAD{index}]" for index in range(size)], [UNUSED] * size


def _type(token: dict[str, Any]) -> int:
    return CONTROL if token["special"] else USER_DEFINED


def _unknown(reason: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp has no such tokenizer: {reason}",
        hint="pass `--pre-tokenizer NAME` with llama.cpp's name of one that splits text alike, or"
        " `--no-tokenizer` for a file that takes token ids alone",
    )


def tokenizer_json(inner: Any) -> dict[str, Any]:
    """A transformers tokenizer in `tokenizers`' own form.

    Raises CheckpointError if it is none of `tokenizers`.
    """
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"it is a `{type(inner).__name__}`")
    found: dict[str, Any] = json.loads(backend.to_str())
    return found
