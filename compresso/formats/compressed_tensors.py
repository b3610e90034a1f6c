"""Codes in the `pack-quantized` layout of compressed-tensors, which transformers and vLLM read.

What loads depends on the versions (each case was run with compressed-tensors 0.17.0 and 0.20.0):

- Codes in one form, symmetric or not: `"dequantize": true`, which makes transformers decode while
  it loads. Only so can it have an adapter put on at once, and an embedding of codes.
- Symmetric codes in several forms: without it, decoded at the first forward pass.
- Asymmetric codes in several forms load with no version from 0.18 on. They are refused, unless
  `uniform` says to store all in one form that holds them all.
- 2, 4 and 8 bits are the same bytes for every version; 3 bits need 0.18 or later.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import gcd
from typing import Any

from torch import Tensor

from compresso.checkpoint import layout
from compresso.checkpoint.layout import METHOD, Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import CompressedTensorsSettings
from compresso.formats.matrices import Matrix, codes, matrices, scheme_of, weight
from compresso.formats.parts import (
    How,
    Stored,
    corrections,
    dense_config,
    refuse_inexact_merge,
    write_parts,
)
from compresso.formats.writing import Export, Written
from compresso.kernels.grid import Packed, quantize
from compresso.kernels.recast import exact_in, recast
from compresso.models.adapter import ModelAdapter
from compresso.models.unfolded import ENTRY

PACKAGES = {"compressed_tensors": "'compresso-llm[packed]'"}
SAME_IN_ALL = (2, 4, 8)  # bits


def write(export: Export) -> Written:
    """The codes that the model has where the layout holds them exactly, others rounded if asked."""
    settings: CompressedTensorsSettings = export.settings
    model = export.stock if settings.structure == "stock" else export.own
    adapter = export.open(model)
    _check_family(adapter)
    found = matrices(model, adapter)
    refuse_inexact_merge(model, found)
    schemes = _resolve(_wanted(model, adapter, found, settings), found, settings)
    pack = partial(_pack, model, adapter, schemes)
    parts = write_parts(export, model, adapter, pack)
    factors = corrections(export, model, adapter)
    config = dense_config(model)
    config[ENTRY] = _entry(adapter, found, schemes)
    dequantize = bool(config[ENTRY].get("dequantize"))
    if factors and not dequantize:
        export.report.warnings.append(
            "PEFT can put the adapter on only after the loaded model has run once, on any token:"
            " with codes of several forms, its weights come with the first forward pass"
        )
    dense = sum(row["weights"] for row in parts.rows if row["stored"] == "decoded")
    if dense:
        export.report.warnings.append(
            f"{dense:,} weights are stored dense, as `{METHOD}` has no form for their codes:"
            " `--bits` rounds them anew"
        )
    narrow = all(scheme.bits in SAME_IN_ALL for scheme in schemes.values())
    oldest = "0.15" if narrow else "0.18"
    export.report.summary["loads_with"] = f"{METHOD} {oldest} or later"
    return Written(
        config=config,
        expected=parts.expected,
        carried=adapter.unmapped_tensors(),
        rows=parts.rows,
        packages=PACKAGES,
        reread=any(row["stored"] in ("rounded", "rescaled") for row in parts.rows),
        adapter=factors,
    )


def _check_family(adapter: ModelAdapter) -> None:
    if adapter.family.transposed:
        raise ConfigError(
            f"the linears of `{adapter.config.model_type}` are stored transposed, which"
            f" `{METHOD}` cannot express",
            hint="pass `--format dense`",
        )


def _wanted(
    model: Checkpoint,
    adapter: ModelAdapter,
    found: list[Matrix],
    settings: CompressedTensorsSettings,
) -> dict[str, Scheme]:
    """How every matrix that is to be codes is stored best, by path in the checkpoint."""
    asked = {
        "linear": settings.bits,
        "head": settings.lm_head_bits,
        "embedding": settings.embedding_bits,
    }
    if settings.lm_head_bits is not None and adapter.tied:
        raise ConfigError(
            "the output head shares its weights with the embedding",
            hint="pass `--embedding-bits` in place of `--lm-head-bits`",
        )
    wanted: dict[str, Scheme] = {}
    for matrix in found:
        scheme, bits = scheme_of(model, matrix.path), asked[matrix.part]
        if scheme is None and bits is not None:
            scheme = Scheme(bits, settings.group_size, settings.symmetric)
            if settings.group_size != -1 and matrix.columns % settings.group_size:
                raise ConfigError(
                    f"`{matrix.path}` has {matrix.columns} columns, which do not divide into"
                    f" groups of {settings.group_size}",
                    hint="choose a `--group-size` that divides, or -1 for whole rows",
                )
        if scheme is not None:
            wanted[matrix.path] = scheme
    if not wanted:
        raise ConfigError(
            f"no linear of `{model.path}` has codes that `{METHOD}` can hold",
            hint="`--bits 4` rounds its weights to nearest levels; `quantize` does it better",
        )
    return wanted


def _resolve(
    wanted: Mapping[str, Scheme], found: list[Matrix], settings: CompressedTensorsSettings
) -> dict[str, Scheme]:
    """The schemes that are stored: such that the checkpoint loads. Raises ConfigError if none do.

    Symmetric codes are stored with their zeros where that is all that sets them apart.
    """
    forms = {*wanted.values()}
    alike = len({(scheme.bits, scheme.group_size) for scheme in forms}) == 1
    if alike or settings.uniform:
        columns = {matrix.path: matrix.columns for matrix in found}
        groups = {
            columns[path] if scheme.group_size == -1 else scheme.group_size
            for path, scheme in wanted.items()
        }
        rows = all(scheme.group_size == -1 for scheme in forms)
        one = Scheme(
            max(scheme.bits for scheme in forms),
            -1 if rows else gcd(*groups),
            all(scheme.symmetric for scheme in forms),
        )
        return dict.fromkeys(wanted, one)
    several = f"the codes come in {len(forms)} forms"
    if not all(scheme.symmetric for scheme in forms):
        raise ConfigError(
            f"{several}, some of them asymmetric, which `{METHOD}` 0.18 and later cannot load",
            hint="`--uniform` stores all in the widest; or export `auto-round`",
        )
    if any(matrix.part == "embedding" and matrix.path in wanted for matrix in found):
        raise ConfigError(
            f"{several}, and so the embedding cannot be stored as codes",
            hint="`--uniform` stores all in the widest; or leave out `--embedding-bits`",
        )
    return dict(wanted)


def _pack(
    model: Checkpoint, adapter: ModelAdapter, schemes: Mapping[str, Scheme], matrix: Matrix
) -> Stored | None:
    scheme = schemes.get(matrix.path)
    if scheme is None:
        return None
    how: How = "rounded"
    if scheme_of(model, matrix.path) is not None:
        own = codes(model, matrix.path)
        assert own is not None
        how = "repacked" if exact_in(own, model.dtype) else "rescaled"
    else:
        own = _rounded(weight(model, matrix, transposed=adapter.family.transposed), model, scheme)
    packed = recast(
        own,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        dtype=model.dtype,
    )
    tensors = layout.pack(matrix.path, packed, model.dtype, symmetric=scheme.symmetric)
    return Stored(tensors, _words(scheme), how)


def _rounded(dense: Tensor, model: Checkpoint, scheme: Scheme) -> Packed:
    return quantize(
        dense.float(),
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        grid="mse",
        scale_dtype=model.dtype,
    )


def _entry(
    adapter: ModelAdapter, found: list[Matrix], schemes: Mapping[str, Scheme]
) -> dict[str, Any]:
    """The `quantization_config` of the config.json."""
    by_module = {m.module: schemes[m.path] for m in found if m.path in schemes}
    kept = {m.module for m in found if m.part != "embedding" and m.path not in schemes}
    if adapter.tied:
        kept.add(adapter.family.head)
    entry = layout.quantization_config(by_module, ignore=kept)
    # Neither is of the class `Linear` for every reader.
    named = [m.module for m in found if m.part != "linear" and m.path in schemes]
    if entry.get("dequantize"):
        entry["config_groups"]["group_0"]["targets"] += named
    return entry


def _words(scheme: Scheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    group = "row" if scheme.group_size == -1 else str(scheme.group_size)
    return f"int{scheme.bits} {kind} g{group}"
