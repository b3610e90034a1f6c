"""A written GGUF file, read as the checkpoint that it was made from: to hold llama.cpp against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.adapter_folder import AdapterFolder
from compresso.checkpoint.directory import TensorInfo
from compresso.checkpoint.reader import Checkpoint
from compresso.formats.gguf_families import Plan
from compresso.formats.gguf_tensors import change_back, decode
from compresso.formats.gguf_types import gguf_package
from compresso.formats.parts import dense_config


class GgufWeights(Checkpoint):
    """The weights that a file holds, dense, in float32, by their names in the checkpoint.

    Reading them is all by the `gguf` package, writing them was partly our own.
    """

    def __init__(
        self, path: Path, plan: Plan, model: Checkpoint, *, added: Mapping[str, Tensor]
    ) -> None:
        """path: of the file. plan: what it was written by. model: of what checkpoint.

        added: what another file adds to tensors of this one, by their names in it.
        """
        super().__init__(model.path)
        self._file, self._model, self._added = path, model, added
        self.config = {**dense_config(model), "dtype": "float32"}
        self.config.pop("torch_dtype", None)
        self._pieces = {piece.stored: piece for piece in plan.pieces if piece.stored is not None}
        self._infos = {
            name: TensorInfo(piece.shape, torch.float32, 4 * torch.Size(piece.shape).numel(), "")
            for name, piece in sorted(self._pieces.items())
        }

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """What the file holds, by name in it: `gguf.ReaderTensor`, mapped from the file."""
        return {tensor.name: tensor for tensor in gguf_package().GGUFReader(self._file).tensors}

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, float32. Raises CheckpointError if one is absent."""
        found = {}
        for name in dict.fromkeys(names):
            self.info(name)
            piece = self._pieces[name]
            stored = self.tensors[piece.name]
            weight = decode(stored.data, stored.tensor_type)
            if piece.name in self._added:
                weight = weight + self._added[piece.name]
            found[name] = change_back(weight, piece)
        return found

    @cached_property
    def packed(self) -> bool:
        """No: everything is shown decoded."""
        return False

    @cached_property
    def adapter(self) -> AdapterFolder | None:
        """Corrections lie in the file, or in another that llama.cpp reads."""
        return None

    @cached_property
    def key(self) -> str:
        """Identifies the checkpoint that the file was made from."""
        return self._model.key
