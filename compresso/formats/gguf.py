"""GGUF, the files of llama.cpp: codes as they are where it has a layout for them, or its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError
from compresso.formats.checking import check_weights
from compresso.formats.gguf_families import Plan, family_for, plan_for
from compresso.formats.gguf_file import (
    GgufFile,
    describe_model,
    describe_no_tokens,
    describe_rope,
    describe_tokens,
)
from compresso.formats.gguf_importance import mean_squares
from compresso.formats.gguf_lora import write_lora
from compresso.formats.gguf_quantizer import quantize_file
from compresso.formats.gguf_stored import GgufWeights
from compresso.formats.gguf_tensors import Encoded, encode
from compresso.formats.gguf_types import DENSE, FILE_TYPES, GUESSED, gguf_package, tensor_type
from compresso.formats.matrices import matrices
from compresso.formats.parts import tally
from compresso.formats.writing import Export, Written
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import structure_of
from compresso.models.tokenizer import Tokenizer
from compresso.models.unfolded import unfolded
from compresso.runtime import track
from compresso.runtimes import llama_cpp

# Shares of the largest logit. llama.cpp rounds what it multiplies by codes to 8 bits, and what it
# multiplies by float16 or bfloat16 to that.
DENSE_TOLERANCE, CODES_TOLERANCE = 0.01, 0.06
OUTER = ("token_embd.weight", "output.weight")
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "tekken", "spiece", "sentencepiece")
# What a tokenizer can get wrong: spaces, lines, numbers, contractions, code, accents, scripts.
SAMPLES = (
    "Hello, world! It's 3 o'clock; we'll see 12345 things.",
    "def f(x):\n    return x  # two  spaces\n\n\tand a tab\n",
    "na\u00efve caf\u00e9 \u2014 \u00fcber 3.14 1,000 \u20ac",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \u3053\u3093\u306b\u3061\u306f",
    "  leading, trailing  ",
)
# Marks that combine with a letter: llama.cpp does not compose them, and in some of its splits takes
# them for no part of a word.
RARE = (
    "\U0001f600\u200d\U0001f525 \u2211\u221e e\u0301 DON'T don't",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
)


def write(export: Export) -> Written:
    """Write one file, and say how it can be proved.

    Raises ConfigError for a model that llama.cpp cannot run, CheckpointError for a tokenizer that
    it does not have, ResourceError if a package is missing.
    """
    gguf_package()
    settings, kind = export.settings, export.settings.type
    model, adapter, plan = _plan(export)
    export.report.warnings += plan.warnings
    folder = export.writer.partial
    target = folder / ("model.gguf" if kind == "auto" else f"model-{kind}.gguf")
    quantized = kind not in ("auto", *DENSE) or settings.outer not in (None, *DENSE)
    first = folder / "dense.gguf" if quantized else target
    has_tokens = settings.tokenizer and _has_tokenizer(export)
    encoded = _write_dense(export, model, adapter, plan, first, has_tokens=has_tokens)
    if quantized:
        _quantize(export, plan, encoded, first, target)
        first.unlink()
    if export.runtime.verify:
        _check_weights(model, plan, target, encoded)
    added = {}
    if export.beside:
        added = write_lora(folder, plan, _corrections(export))
    weights = GgufWeights(target, plan, model, added=added)
    if has_tokens and export.runtime.verify and llama_cpp.missing() is None:
        _prove_tokens(export, target)
    export.report.warnings += _inexact(encoded, kind)
    rows = _rows(weights, encoded)
    codes = any(row["as"] not in ("f32", "f16", "bf16") for row in rows)
    return Written(
        runtime=llama_cpp.NAME,
        rows=rows,
        tolerance=CODES_TOLERANCE if codes else DENSE_TOLERANCE,
        longest=plan.context,
        model=weights,
        corrected=bool(added),
    )


def _plan(export: Export) -> tuple[Checkpoint, ModelAdapter, Plan]:
    """How the model is laid out, and which of its views has what that needs."""
    family, model = family_for(export.own), export.unshared
    structure = structure_of(model.config)
    if not structure.plain and family.removed is None:
        model = export.stock
        export.report.warnings.append(
            f"llama.cpp runs no `{family.arch}` without some attentions or MLPs: zeros stand in for"
            " what was removed, which saves room in the file but no time"
        )
    adapter = export.open(model)
    gguf = gguf_package()
    removed = structure_of(model.config)
    arch = family.arch if removed.plain else family.removed
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], adapter.count)
    blocks = adapter.family.blocks

    def rename(place: int, name: str) -> str:
        if place >= 0:
            _, _, path = name.removeprefix(f"{blocks}.").partition(".")
            name = f"{blocks}.{place}.{path}"
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    return model, adapter, plan_for(model, adapter, rename)


def _write_dense(
    export: Export,
    model: Checkpoint,
    adapter: ModelAdapter,
    plan: Plan,
    path: Path,
    *,
    has_tokens: bool,
) -> dict[str, Encoded]:
    """Write what needs no quantizer; what is to be known of each tensor, without its bytes."""
    settings, config = export.settings, adapter.config.get_text_config()
    by_name = {matrix.name: matrix for matrix in matrices(model, adapter)}
    kind = settings.type
    wanted = None if kind == "auto" else tensor_type(kind)
    dense = kind if kind in DENSE else None
    encoded: dict[str, Encoded] = {}
    with GgufFile(path, plan.arch) as file:
        describe_model(file, plan, config, export.source)
        file.header.add_file_type(FILE_TYPES.get(kind, GUESSED))
        if has_tokens:
            describe_tokens(
                file,
                export.source,
                config.vocab_size,
                pre=settings.pre_tokenizer,
                trust_remote_code=export.runtime.trust_remote_code,
            )
        else:
            describe_no_tokens(file)
        describe_rope(file, plan, config, _frequencies(adapter))
        for piece in track(plan.pieces, len(plan.pieces), "export"):
            own = settings.outer if piece.name in OUTER and settings.outer in DENSE else dense
            keeps = None if piece.name not in OUTER or settings.outer is None else settings.outer
            found = encode(
                model,
                piece,
                by_name.get(piece.stored or ""),
                wanted=keeps or wanted,
                dense=own,
            )
            file.add(found)
            encoded[piece.name] = Encoded(
                found.name, found.type, found.shape, found.data[:0], found.how, found.offset
            )
        file.finish()
    return encoded


def _corrections(export: Export) -> dict[str, LowRank]:
    """Those of the adapter beside the source, of every block that uses a shared linear."""
    adapter = unfolded(export.source, fill=False).adapter
    assert adapter is not None
    return adapter.load(adapter.paths)


def _has_tokenizer(export: Export) -> bool:
    """Whether there is one; if not, the user is told what that means.

    By its files: without any, transformers makes an empty one for some architectures.
    """
    found = any(name.startswith(TOKENIZER_FILES) for name in export.source.side_files())
    if not found:
        export.report.warnings.append(
            f"`{export.source.path}` has no tokenizer: the file takes token ids alone"
        )
    return found


def _frequencies(adapter: ModelAdapter) -> Tensor | None:
    """Of the rotary embedding: radians per token of each pair."""
    for name, buffer in adapter.model.named_buffers():
        if name.endswith("rotary_emb.inv_freq"):
            return buffer
    return None


def _quantize(
    export: Export, plan: Plan, encoded: dict[str, Encoded], first: Path, target: Path
) -> None:
    """Let llama.cpp round what is dense, but for what is to stay that."""
    settings, gguf = export.settings, gguf_package()
    numbers = gguf.GGMLQuantizationType
    stays = {"repacked", "rescaled", "zeros"}
    automatic = settings.type in ("auto", *DENSE)
    kept = {
        name: int(numbers[tensor.type.upper()])
        for name, tensor in encoded.items()
        if len(tensor.shape) == 2 and (tensor.how in stays or automatic)
    }
    outer = settings.outer
    if outer is not None:
        kept = {name: number for name, number in kept.items() if name not in OUTER}
    importance = mean_squares(export, plan, encoded) if settings.reads_text else {}
    quantize_file(
        first,
        target,
        "q8_0" if automatic else settings.type,
        kept=kept,
        outer=None if outer is None else int(numbers[outer.upper()]),
        importance=importance,
    )


def _check_weights(
    model: Checkpoint, plan: Plan, target: Path, encoded: dict[str, Encoded]
) -> None:
    """Raises GateError if the file holds another weight than it should."""
    stored = GgufWeights(target, plan, model, added={})
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in stored.tensors.items()}
    rounded = {
        piece.stored
        for piece in plan.pieces
        if piece.stored is not None and kinds[piece.name] != encoded[piece.name].type
    }
    check_weights(model, stored, rounded=rounded, carried=())


def _prove_tokens(export: Export, target: Path) -> None:
    """Raises GateError if llama.cpp makes other tokens of usual texts than the tokenizer does."""
    trust = export.runtime.trust_remote_code
    tokenizer = Tokenizer.open(export.source, trust_remote_code=trust)
    found = llama_cpp.tokenize(target, [*SAMPLES, *RARE])
    for text, tokens in zip([*SAMPLES, *RARE], found, strict=True):
        expected = tokenizer.encode(text, special=False)
        if tokens == expected:
            continue
        message = f"llama.cpp makes other tokens of {text!r} than the tokenizer of the source"
        if text in SAMPLES:
            raise GateError(f"{message}: {tokens}, not {expected}")
        export.report.warnings.append(f"{message}, as it reads marks that combine in its own way")


def _inexact(encoded: dict[str, Encoded], kind: str) -> list[str]:
    """What became of codes that no type holds as they are."""
    found = []
    if scales := sum(tensor.how == "rescaled" for tensor in encoded.values()):
        found.append(
            f"{scales} linears have scales that were rounded to float16, which is all that GGUF has"
        )
    if offsets := sum(tensor.offset for tensor in encoded.values()):
        found.append(
            f"{offsets} linears have zeros between levels, which GGUF stores as offsets: these were"
            " rounded to float16"
        )
    dense = sum(tensor.how == "decoded" for tensor in encoded.values())
    if dense and kind == "auto":
        found.append(
            f"{dense} linears are stored dense, as no GGUF type has their codes: give a `--type` to"
            " round them once more, or quantize the original with `--for llama.cpp`"
        )
    return found


def _rows(weights: GgufWeights, encoded: dict[str, Encoded]) -> list[dict[str, Any]]:
    """What the file holds, by type, and how that came about."""
    entries = []
    for name, tensor in weights.tensors.items():
        kind = tensor.tensor_type.name.lower()
        before = encoded.get(name)
        how = before.how if before is not None else "kept"
        if before is not None and before.type != kind:
            how = "rounded"
        entry = {"how": how, "form": kind, "weights": int(tensor.n_elements)}
        entries.append(entry | {"bytes": int(tensor.n_bytes)})
    return tally(entries)
