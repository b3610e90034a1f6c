"""What is stored of the linears that were quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compresso.kernels.decomposition import Decomposed
from compresso.stages.compensate_forms import factor_tensors
from compresso.stages.quantize_layouts import Codes, Dense, Described, Layout


@dataclass(frozen=True)
class Done:
    """What is stored of a block, or of what is in none.

    tensors: by name. rows: one for each quantized linear. described: what config.json has to say.
    beside:  corrections, as `compensate_forms.factors_of` reads them.
    """

    tensors: dict[str, Tensor]
    rows: list[dict[str, Any]] = field(default_factory=list)
    described: list[Described] = field(default_factory=list)
    beside: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Linear:
    """A quantized linear.

    name: in the checkpoint. module: in transformers. path: in its block. weights: how many it has.
    codes: with a correction beside them, if the method finds one.
    """

    name: str
    module: str
    path: str
    weights: int
    codes: Codes | Decomposed[Any]
    row: dict[str, Any]


def stored(
    tensors: Mapping[str, Tensor], linears: list[Linear], layout: Layout, row: dict[str, Any]
) -> Done:
    """Everything that is stored: tensors that stayed as they were, and quantized linears.

    row: what begins the row of every linear.
    """
    done = Done(dict(tensors))
    for linear in linears:
        codes, factors = linear.codes, {}
        if isinstance(codes, Decomposed) and not isinstance(layout, Dense):
            # They are exact in the type of the scales, which is the model's.
            factors = factor_tensors({linear.name: codes.factors}, codes.codes.grid.dtype)
            codes = codes.codes
        packed, described = layout.pack(linear.name, linear.module, codes)
        done.tensors.update(packed)
        done.beside.update(factors)
        size = sum(tensor.nbytes for tensor in (*packed.values(), *factors.values()))
        held = {"stored_bits": 8 * size / linear.weights, "parameters": linear.weights}
        done.rows.append({**row, **linear.row, **held})
        done.described.append(described)
    return done
