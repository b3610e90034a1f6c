"""Store a packed checkpoint with pooled corrections in the zeros of its codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from compresso.checkpoint import coded
from compresso.checkpoint.packings import merged_codes
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError
from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules
from compresso.models.structure import restructure, structure_of


def merge_zeros(
    source: Checkpoint,
    adapter: ModelAdapter,
    names: Iterable[str],
    factors: Mapping[str, LowRank],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part of a checkpoint in compresso's own layout of codes, which has room for any zeros.

    source:  packed, uniform codes where it is corrected.
    adapter: of the source.
    names:   of dense tensors: a block's, or those of no block.
    factors: corrections by the linear's path in the checkpoint; `down` is (rank, groups) and acts
             on the sum of the inputs of each group. Not modified.

    Returns all that is stored of the part, by name, and what config.json has to say about it, for
    `merged_config`. Linears without a correction are stored in that layout, too, as a checkpoint
    has one layout. Codes are those of the source, and so are scales and tensors that are no codes.

    Raises CheckpointError if a correction cannot be merged, as `merged_codes` does, or something
    else than a linear is packed.
    """
    modules = linear_modules(adapter.model, adapter.family, source)
    known = coded.coding_of(source.config)
    tensors: dict[str, Tensor] = {}
    described = []
    for name in names:
        path = name.removesuffix(".weight")
        if path == name or path not in source.packing.shapes:
            tensors |= source.load([name])
            continue
        if path not in modules:
            raise CheckpointError(f"`{path}` is packed, but is no linear that can be coded")
        parts, module = source.load(source.packing.names(path)), modules[path]
        if path not in factors and known is not None:
            tensors |= parts
            kind = known[coded.CODED][module]
            entry = {coded.CODED: {module: kind}, coded.KINDS: {kind: known[coded.KINDS][kind]}}
        else:
            codes = merged_codes(source.packing, path, parts, factors.get(path))
            form = {"symmetric": _symmetric(codes)}
            tensors |= coded.pack(path, codes, **form)
            entry = coded.describe({module: codes}, transposed=adapter.family.transposed, **form)
        described.append(entry)
    return tensors, coded.merge(described)


def merged_config(config: Mapping[str, Any], described: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The config.json of what `merge_zeros` made of all parts. config: the source's."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return restructure(plain, structure_of(plain), coded=coded.merge(described))


def _symmetric(codes: Packed | AffineCodes) -> bool:
    """Whether no zeros need be stored, as all are in the middle."""
    if not isinstance(codes, Packed):
        return False
    return bool((codes.grid.zero == 2 ** (codes.grid.bits - 1)).all())
