"""The quantize methods, at several widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.levels import Decodable, Groups, Ladder, places, weight_names
from compresso.checkpoint.coded_kinds import Form
from compresso.checkpoint.layout import Scheme, packed_names
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.hadamard import block_size
from compresso.models.adapter import ModelAdapter
from compresso.quantize_for import widths_for
from compresso.quantize_settings import POINT_BITS
from compresso.stages.damping import with_damping_raised
from compresso.stages.quantize_plan import options_of

WIDTHS = (2, 3, 4, 8)
WORD = 4  # bytes of the words that codes are packed into
SHAPE = 16  # bytes of the shape that is stored with every linear


def make_ladder(method: str, settings: Any, dtype: torch.dtype) -> Ladder:
    """A method at all its widths: with uniform grids, packed or coded, or vector grids, coded.

    settings: of the method; its own width has no part. dtype: of the checkpoint, and of scales.
    """
    entry = registry.method("quantize", method)
    code = registry.load(entry.code)
    fields = asdict(settings)
    chosen = options_of(code, {k: v for k, v in fields.items() if k != "bits"})
    rotated = fields["seed"] if fields.get("rotate") else None

    def quantize(weight: Tensor, gram: Tensor | None, bits: int) -> Decodable:
        def damped(damping: float) -> Decodable:
            options = chosen | ({"damping": damping} if damping else {})
            decodable: Decodable = code(weight, gram, bits=bits, scale_dtype=dtype, **options)
            return decodable

        where = f"a group of {len(weight)} rows at {bits} bits"
        return with_damping_raised(damped, chosen.get("damping", 0.0), where=where)[0]

    widths: tuple[int, ...] = widths_for(settings) or WIDTHS
    if hasattr(settings, "dimension"):
        widths = tuple(bits for bits in WIDTHS if bits * (settings.dimension or 1) <= POINT_BITS)
        nbytes = partial(
            vector_bytes, block=settings.block, dtype=dtype, scale_bits=settings.scale_bits
        )
    else:
        uniform = {"group_size": settings.group_size, "symmetric": settings.symmetric}
        eight = settings.scale_bits == 8
        nbytes = partial(eight_bit_bytes if eight else packed_bytes, dtype=dtype, **uniform)
        if hasattr(settings, "rank"):
            nbytes = partial(corrected_bytes, codes=nbytes, rank=settings.rank, dtype=dtype)
    return Ladder(
        bits=widths,
        quantize=quantize,
        nbytes=nbytes,
        calibrated=entry.calibrated,
        key=json.dumps([method, chosen, rotated], sort_keys=True),
    )


def group_bytes(
    ladder: Ladder, adapter: ModelAdapter, source: Checkpoint, groups: Groups
) -> list[list[int]]:
    """Stored bytes of every group, in execution order, at every width of the ladder."""
    turned = adapter.family.transposed
    sizes = []
    for place in places(groups):
        stored = [source.weight_info(name).shape for name in weight_names(adapter, groups, place)]
        shapes = [shape[::-1] if turned else shape for shape in stored]
        sizes.append(
            [sum(ladder.nbytes((s[0], s[1]), bits) for s in shapes) for bits in ladder.bits]
        )
    return sizes


def corrected_bytes(
    shape: tuple[int, int],
    bits: int,
    *,
    codes: Callable[[tuple[int, int], int], int],
    rank: int,
    dtype: torch.dtype,
) -> int:
    """What is stored for a linear of that shape, (rows, columns), with its correction, in bytes.

    codes: without it.
    """
    return codes(shape, bits) + min(rank, *shape) * sum(shape) * dtype.itemsize


def packed_bytes(
    shape: tuple[int, int], bits: int, *, group_size: int, symmetric: bool, dtype: torch.dtype
) -> int:
    """What the packed layout stores for a linear of that shape, (rows, columns), in bytes."""
    rows, columns = shape
    scheme = Scheme(bits, group_size, symmetric)
    groups = scheme.groups(columns)
    stored = {
        "weight_packed": WORD * rows * _words(columns, bits),
        "weight_scale": dtype.itemsize * rows * groups,
        "weight_shape": SHAPE,
        "weight_zero_point": WORD * _words(rows, bits) * groups,
    }
    return sum(stored[name.removeprefix(".")] for name in packed_names("", scheme))


def eight_bit_bytes(
    shape: tuple[int, int], bits: int, *, group_size: int, symmetric: bool, dtype: torch.dtype
) -> int:
    """What is stored for such a linear with scales in 8 bits, in bytes."""
    zero_bits = 0 if symmetric else bits
    return Form(dtype, group_size, 1, bits, scale_bits=8, zero_bits=zero_bits).nbytes(*shape)


def vector_bytes(
    shape: tuple[int, int], bits: int, *, block: int, dtype: torch.dtype, scale_bits: int = 16
) -> int:
    """What a linear of that shape, (rows, columns), on a vector grid is stored in, in bytes.

    bits: of a weight. That those of several are one code changes nothing.
    """
    return Form(dtype, block_size(shape[1], block), 1, bits, scale_bits=scale_bits).nbytes(*shape)


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)
