"""Codes in GGUF's layouts decode, with the `gguf` package, to just what they stand for."""

from dataclasses import dataclass, replace
from itertools import product

import gguf
import numpy as np
import pytest
import torch

from compresso.formats.gguf_blocks import repack
from compresso.kernels.grid import Grid, Packed, fit_grid, round_to_grid
from compresso.kernels.hqq import AffineCodes
from compresso.runtimes.table import table

ROWS, COLUMNS = 5, 1024


@dataclass(frozen=True)
class Layout:
    """A GGUF type that holds codes of some kind unchanged.

    type:      as llama.cpp calls it. block: weights that share its scale; groups must be multiples.
    bits:      of file per weight.
    codes:     bits of the codes that it holds. symmetric: with zeros in the middle; None for any.
    """

    type: str
    block: int
    bits: float
    codes: int
    symmetric: bool | None


LAYOUTS = (
    Layout("tq2_0", 256, 2.0625, 2, True),
    Layout("q2_k", 256, 2.625, 2, False),
    Layout("q4_0", 32, 4.5, 2, None),
    Layout("q3_k", 256, 3.4375, 3, True),
    Layout("q4_0", 32, 4.5, 3, None),
    Layout("q4_0", 32, 4.5, 4, True),
    Layout("q4_k", 256, 4.5, 4, False),
    Layout("q5_0", 32, 5.5, 4, False),
    Layout("q8_0", 32, 8.5, 8, True),
)
"""The smallest first among those for the same codes."""


def layout_for(*, bits: int, group_size: int, symmetric: bool, columns: int) -> Layout | None:
    """The smallest type that holds such codes unchanged; None if there is none.

    group_size: columns sharing a scale; -1 for the row. columns: of the linear.

    Scales must be exact in float16, as those of float16 models are, and of bfloat16 models that
    are not very near zero.
    """
    size = columns if group_size == -1 else group_size
    for layout in LAYOUTS:
        fits = layout.codes == bits and layout.symmetric in (None, symmetric)
        if fits and size % layout.block == 0 and columns % size == 0:
            return layout
    return None


def packed(bits, group_size, symmetric, *, dtype=torch.float16, columns=COLUMNS):
    """Codes of random weights that use every level."""
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(bits)) * 0.1
    weight[:, ::7] += 0.05
    grid = fit_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype
    )
    codes = round_to_grid(weight, grid).codes
    codes[:, :: max(1, columns // 300)] = 0
    codes[:, 1 :: max(1, columns // 300)] = grid.max_code
    return Packed(codes, grid)


def decoded(blocks):
    kind = gguf.GGMLQuantizationType[blocks.type.upper()]
    return gguf.quants.dequantize(blocks.data, kind)


def meant(codes):
    """What the codes stand for, in float64."""
    grid = codes.grid if isinstance(codes, Packed) else codes
    size = codes.codes.shape[1] // grid.scale.shape[1]
    scale, zero = (t.double().repeat_interleave(size, 1) for t in (grid.scale, grid.zero))
    return ((codes.codes.double() - zero) * scale).numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 512, -1])
def test_codes_keep_their_values_in_the_type_that_the_table_says(bits, group_size, symmetric):
    columns = 768 if group_size == 96 else COLUMNS
    codes = packed(bits, group_size, symmetric, columns=columns)
    layout = layout_for(bits=bits, group_size=group_size, symmetric=symmetric, columns=columns)
    blocks = repack(codes)
    if layout is None:
        assert (bits, symmetric) == (8, False)
        assert blocks is None
        return
    assert blocks.type == layout.type
    assert blocks.exact
    assert blocks.data.nbytes * 8 / codes.codes.numel() == layout.bits
    np.testing.assert_array_equal(decoded(blocks), meant(codes).astype(np.float32))


def test_the_table_has_the_smallest_first():
    for codes in {layout.codes for layout in LAYOUTS}:
        for symmetric in (True, False):
            own = [x for x in LAYOUTS if x.codes == codes and x.symmetric in (None, symmetric)]
            assert [x.bits for x in own] == sorted(x.bits for x in own)


def test_what_quantize_writes_for_llama_cpp_has_a_type_of_that_width():
    """At most what a scale for every 16 weights and a minimum come to on top of the codes."""
    for row in table()["fast"]["llama.cpp"]:
        for bits, size in product(row.bits, row.groups):
            symmetric = bool(row.symmetric)
            found = layout_for(bits=bits, group_size=size, symmetric=symmetric, columns=6 * size)
            assert found is not None and found.bits <= bits + 0.7


@pytest.mark.parametrize(("bits", "group_size"), [(2, 256), (4, 64), (3, 256)])
def test_negative_scales_stay(bits, group_size):
    codes = packed(bits, group_size, True)
    grid = codes.grid
    turned = Packed(codes.codes, Grid(-grid.scale, grid.zero, bits, grid.dtype))
    np.testing.assert_array_equal(decoded(repack(turned)), meant(turned).astype(np.float32))


@pytest.mark.parametrize("group_size", [8, 16, 48])
def test_groups_that_no_type_has_are_not_repacked(group_size):
    assert repack(packed(4, group_size, True, columns=768)) is None
    found = layout_for(bits=4, group_size=group_size, symmetric=True, columns=768)
    assert found is None


def test_scales_that_float16_cannot_hold_are_not_rounded():
    codes = packed(4, 32, True, dtype=torch.float32)
    assert repack(codes) is None


def test_scales_of_float32_are_rounded_if_that_is_wanted():
    codes = packed(4, 32, True, dtype=torch.float32)
    blocks = repack(codes, rescale=True)
    assert (blocks.type, blocks.rounded, blocks.exact) == ("q4_0", "scales", False)
    np.testing.assert_allclose(decoded(blocks), meant(codes), rtol=2**-11)
    tiny = replace(codes.grid, scale=codes.grid.scale * 1e-5)
    assert repack(Packed(codes.codes, tiny), rescale=True) is None


def test_scales_of_bfloat16_are_exact():
    codes = packed(4, 64, False, dtype=torch.bfloat16)
    blocks = repack(codes)
    np.testing.assert_array_equal(decoded(blocks), meant(codes).astype(np.float32))


@pytest.mark.parametrize(("bits", "kind"), [(2, "q4_1"), (3, "q4_1"), (4, "q4_1"), (5, "q5_1")])
def test_zeros_between_levels_become_offsets_in_float16(bits, kind):
    codes = torch.randint(0, 2**bits, (ROWS, 256), dtype=torch.uint8)
    scale = (torch.rand(ROWS, 4) + 0.5).half().float()
    zero = torch.rand(ROWS, 4) * 2**bits
    affine = AffineCodes(codes, scale, zero, bits, torch.bfloat16)
    blocks = repack(affine)
    assert (blocks.type, blocks.exact) == (kind, False)
    rounded = 2.0**-11 * (scale * zero).abs().max().item()
    assert np.abs(decoded(blocks) - meant(affine)).max() <= rounded


def test_eight_bits_with_such_zeros_have_no_type():
    codes = torch.randint(0, 256, (ROWS, 64), dtype=torch.uint8)
    ones = torch.ones(ROWS, 1)
    assert repack(AffineCodes(codes, ones, ones * 0.5, 8, torch.float16)) is None
