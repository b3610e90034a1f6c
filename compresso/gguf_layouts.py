"""Which uniform codes a GGUF file can hold as they are. Imports no torch.

llama.cpp has a fixed set of types, each with its own size of group. Codes whose groups are whole
multiples of one and whose levels it has are stored as they are: nothing is rounded a second time.
"""

from __future__ import annotations

from dataclasses import dataclass


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
