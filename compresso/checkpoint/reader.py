"""Read a checkpoint: a directory in Hugging Face safetensors form."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.adapter_folder import AdapterFolder, read_adapter
from compresso.checkpoint.checksums import digests
from compresso.checkpoint.decilm_config import as_our_own
from compresso.checkpoint.directory import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    RECORD,
    TRANSPOSED,
    TensorInfo,
    carried_and_left_out,
    has_adapter,
    open_shard,
    read_infos,
    read_json,
)
from compresso.checkpoint.hub import resolve
from compresso.checkpoint.packings import Packing, is_packed, packing_of
from compresso.errors import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def open_checkpoint(name: str, *, revision: str | None = None) -> Checkpoint:
    """Open a local directory, a hub model or the bundled `reference`.

    name:     a path, `org/name`, `org/name@revision` or `reference`.
    revision: branch, tag or commit of a hub model.

    Raises CheckpointError if there is none, or the hub cannot be reached.
    """
    return Checkpoint(resolve(name, revision=revision))


class Checkpoint:
    """A directory of safetensors shards that is never loaded as a whole.

    `names`, `info` and `load` see the tensors as they are stored. `weight_names`, `weight_info`
    and `load_weights` see a dense model: a packed linear appears as its `<path>.weight`, and one
    that an adapter corrects has the corrected weight.

    config: the parsed config.json; of one in the config of Nemotron-NAS (`decilm`), what
            compresso's own would be.
    """

    def __init__(self, path: Path) -> None:
        """Check the directory and read the headers of its shards, but no weights.

        Raises CheckpointError if it is not a whole checkpoint.
        """
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint directory `{path}`")
        if (path / ADAPTER_CONFIG).is_file():
            beside = has_adapter(path.parent) and path.name == ADAPTER
            hint = f"pass `{path.parent}`, which it is part of" if beside else "merge it first"
            raise CheckpointError(f"`{path}` holds a PEFT adapter", hint=hint)
        self.path = path
        self._infos = read_infos(path)
        stored = read_json(path / CONFIG)
        if not isinstance(stored.get("model_type"), str):
            raise CheckpointError(f"`{path / CONFIG}` has no `model_type`")
        self.config: dict[str, Any] = as_our_own(stored)
        self.decilm = self.config is not stored

    def names(self) -> list[str]:
        """Names of the stored tensors, sorted."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and place of a stored tensor. Raises CheckpointError if there is none."""
        if name not in self._infos:
            raise CheckpointError(f"`{self.path}` has no tensor `{name}`")
        return self._infos[name]

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as they are stored, on the CPU, mapped from the files.

        Each has a map of its own, so that its memory is given back with it and not with the last
        tensor of its shard.

        Raises CheckpointError if one is absent.
        """
        loaded: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            with open_shard(self.path / self.info(name).shard) as shard:
                loaded[name] = shard.get_tensor(name)
        return loaded

    def weight_names(self) -> list[str]:
        """Names of the dense model's tensors, sorted. Raises CheckpointError as load_weights."""
        packing = self.packing
        hidden = {name for path in packing.shapes for name in packing.names(path)}
        dense = [f"{path}.weight" for path in packing.shapes]
        return sorted([name for name in self._infos if name not in hidden] + dense)

    def weight_info(self, name: str) -> TensorInfo:
        """Shape of a dense tensor, and its type without corrections.

        nbytes is what is stored for it, in all its parts and with its correction.
        """
        info, correction = self._dense_info(name), 0
        if self.adapter is not None:
            correction = self.adapter.sizes.get(name.removesuffix(".weight"), 0)
        return replace(info, nbytes=info.nbytes + correction)

    def load_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named dense tensors, on the CPU: packed ones decoded to `dtype`, others as stored.

        A correction is added to that, in float32; such a tensor is float32, whatever its `dtype`.

        Raises CheckpointError if one is absent, is not float32, bfloat16 or float16, holds NaN
        or infinity, or is stored in a quantized form that compresso cannot decode.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            dtype = self.weight_info(name).dtype
            if dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"`{name}` in `{self.path}` is stored as {_word(dtype)}",
                    hint="weights must be float32, bfloat16 or float16",
                )
        stored = self.load(part for name in wanted for part in self._stored(name))
        adapter = self.adapter
        corrections = adapter.load(n.removesuffix(".weight") for n in wanted) if adapter else {}
        weights: dict[str, Tensor] = {}
        for name in wanted:
            parts = {part: stored.pop(part) for part in self._stored(name)}
            path = self._packed_path(name)
            if path is None:
                weight = parts[name]
            else:
                weight = self.packing.decode(path, parts).to(self.dtype)
            if (correction := corrections.get(name.removesuffix(".weight"))) is not None:
                product = correction.product()
                weight = weight.float() + (product.T if self._transposed else product)
            if not _finite(weight):
                raise CheckpointError(f"`{name}` in `{self.path}` holds NaN or infinity")
            weights[name] = weight
        return weights

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's floating type: the config's, else that of most weights."""
        for holder in (self.config, self.config.get("text_config") or {}):
            word = str(holder.get("dtype") or holder.get("torch_dtype")).removeprefix("torch.")
            found = getattr(torch, word, None)
            if found in WEIGHT_DTYPES:
                return found
        sizes: Counter[torch.dtype] = Counter()
        for info in self._infos.values():
            if info.dtype in WEIGHT_DTYPES:
                sizes[info.dtype] += prod(info.shape)
        if not sizes:
            raise CheckpointError(f"`{self.path}` holds no float32, bfloat16 or float16 tensor")
        return sizes.most_common(1)[0][0]

    @cached_property
    def packed(self) -> bool:
        """Whether some linears are stored as codes that `load_weights` decodes."""
        return is_packed(self.config, self._infos)

    @cached_property
    def packing(self) -> Packing:
        """How the linears are stored that are stored as codes.

        Raises CheckpointError if they are stored in a way that compresso cannot decode.
        """
        return packing_of(self.config, self._infos, self.load)

    @cached_property
    def adapter(self) -> AdapterFolder | None:
        """The corrections beside it; None if there are none.

        Raises CheckpointError if they cannot be read, or are another checkpoint's.
        """
        return read_adapter(self.path, self._linear_shape)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How compresso made this checkpoint; empty if it did not."""
        path = self.path / RECORD
        return read_json(path) if path.is_file() else {}

    @cached_property
    def key(self) -> str:
        """Identifies the contents: the recorded key, else a SHA-256 of config and shards.

        Of an adapter, too: the recorded key is that of the one that it was made with, if any.
        """
        adapter = self.adapter.key if self.adapter else None
        recorded = self.provenance.get("key")
        if isinstance(recorded, str):
            if adapter == self.provenance.get(ADAPTER):
                return recorded
            return hashlib.sha256(f"{recorded} with adapter {adapter}".encode()).hexdigest()
        digest = hashlib.sha256(adapter.encode() if adapter else b"")
        names = (CONFIG, *sorted({info.shard for info in self._infos.values()}))
        for one in digests(self.path / name for name in names):
            digest.update(one)
        return digest.hexdigest()

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors: codes, scales, an adapter's factors and everything else."""
        stored = sum(info.nbytes for info in self._infos.values())
        return stored + (self.adapter.nbytes if self.adapter else 0)

    @cached_property
    def parameters(self) -> int:
        """Elements of all floating tensors of the dense model; a tied head is not counted."""
        names = set(self.weight_names())
        if self.config.get("tie_word_embeddings") and any(n.endswith(EMBEDDINGS) for n in names):
            names -= {name for name in names if name.endswith(HEADS)}
        infos = [self.weight_info(name) for name in names]
        return sum(prod(info.shape) for info in infos if info.dtype.is_floating_point)

    def side_files(self) -> dict[str, Path]:
        """Every file to carry byte for byte, tokenizer and all: name within the directory -> file.

        All but weights in any format, an adapter, and what every stage writes anew (config.json,
        the index, compresso.json).
        """
        return carried_and_left_out(self.path)[0]

    def left_out_files(self) -> list[str]:
        """Files that hold weights but are not part of the checkpoint, such as other formats."""
        return carried_and_left_out(self.path)[1]

    @property
    def _transposed(self) -> bool:
        return self.config["model_type"] in TRANSPOSED

    def _linear_shape(self, path: str) -> tuple[int, int] | None:
        """(out, in) of the linear that is stored under `path`; None if there is none."""
        name = f"{path}.weight"
        if name not in self._infos and self._packed_path(name) is None:
            return None
        shape = self._dense_info(name).shape
        if len(shape) != 2:
            return None
        return (shape[1], shape[0]) if self._transposed else (shape[0], shape[1])

    def _dense_info(self, name: str) -> TensorInfo:
        path = self._packed_path(name)
        if path is None:
            return self.info(name)
        stored = [self.info(part) for part in self.packing.names(path)]
        return TensorInfo(
            shape=self.packing.shapes[path],
            dtype=self.dtype,
            nbytes=sum(part.nbytes for part in stored),
            shard=stored[0].shard,
        )

    def _packed_path(self, name: str) -> str | None:
        """The linear whose weight a dense tensor is, if that is stored as codes."""
        path = name.removesuffix(".weight")
        return path if path != name and path in self.packing.shapes else None

    def _stored(self, name: str) -> list[str]:
        path = self._packed_path(name)
        return [name] if path is None else self.packing.names(path)


def _finite(weight: Tensor) -> bool:
    if weight.numel() == 0:
        return True
    low, high = torch.aminmax(weight)  # NaN survives both, and no mask is allocated
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
