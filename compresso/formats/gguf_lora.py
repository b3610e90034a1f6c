"""The corrections of an adapter as llama.cpp reads them, in a file beside that of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compresso.formats.gguf_families import Plan
from compresso.formats.gguf_file import GgufFile
from compresso.formats.gguf_tensors import Encoded, change
from compresso.formats.gguf_types import gguf_package
from compresso.kernels.lowrank import LowRank

LORA_FILE = "lora.gguf"
DOWN, UP = ".lora_a", ".lora_b"


def write_lora(folder: Path, plan: Plan, corrections: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Write the corrections of linears, by path in the checkpoint.

    Returns the products by name of tensor in the model's file, as they are added to what is there.
    """
    keys = gguf_package().Keys
    pieces = {piece.stored: piece for piece in plan.pieces if piece.stored is not None}
    products: dict[str, Tensor] = {}
    with GgufFile(folder / LORA_FILE, plan.arch) as file:
        file.header.add_type("adapter")
        file.header.add_string(keys.Adapter.TYPE, "lora")
        file.header.add_float32(keys.Adapter.LORA_ALPHA, 0.0)  # the product, whatever its rank
        for path, factors in corrections.items():
            piece = pieces[f"{path}.weight"]
            up = change(factors.up.float(), piece)
            for tensor, ending in ((factors.down.float(), DOWN), (up, UP)):
                file.add(_kept(f"{piece.name}{ending}", tensor))
            products[piece.name] = up @ factors.down.float()
        file.finish()
    return products


def _kept(name: str, tensor: Tensor) -> Encoded:
    data: Any = tensor.contiguous().numpy()
    return Encoded(name, "f32", tuple(tensor.shape), data, "kept")
