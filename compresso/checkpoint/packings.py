"""The linears of a checkpoint that are stored as codes, whichever tool packed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from compresso.checkpoint.coded import CODED, ENDING, KEY, Coded, coding_of
from compresso.checkpoint.directory import Load, TensorInfo
from compresso.checkpoint.gptq_layout import METHODS, Gptq
from compresso.checkpoint.layout import CODES, module_of, packed_names, schemes, unpack
from compresso.errors import CheckpointError, NumericalError
from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.lowrank import LowRank
from compresso.kernels.pooled import merge_pooled

BITSANDBYTES = "bitsandbytes"


class Packing(Protocol):
    """How a checkpoint stores its packed linears.

    shapes: of the dense weight of each, by path in the checkpoint, the way round that a dense
            checkpoint stores it.
    """

    shapes: dict[str, tuple[int, int]]

    def names(self, path: str) -> list[str]:
        """Names of the tensors that store the linear `path`, at least one."""
        ...

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """Its dense weight, float32. parts: the tensors of `names`. Not modified."""
        ...

    def uniform(self, path: str, parts: dict[str, Tensor]) -> Packed | AffineCodes | None:
        """Its codes, of (out, in) weights, if a weight is (code - zero) * scale; None if not.

        parts: the tensors of `names`. Not modified.
        """
        ...

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values that are the same for linears stored alike."""
        ...


def is_packed(config: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether some linears are stored as codes that `packing_of` knows.

    config: a parsed config.json. names: of the stored tensors.
    """
    return (
        method_of(config) in (BITSANDBYTES, *METHODS)
        or coding_of(config) is not None
        or any(name.endswith(CODES) for name in names)
    )


def packing_of(config: dict[str, Any], infos: Mapping[str, TensorInfo], load: Load) -> Packing:
    """How a checkpoint stores its packed linears, if it has any.

    config: a parsed config.json. infos: every stored tensor. load: reads some of them.

    Raises CheckpointError if they are stored in a way that cannot be decoded, or a tensor of one
    is absent or does not fit.
    """
    if coding_of(config) is not None:
        return Coded(config, infos, load)
    if method_of(config) == BITSANDBYTES:
        from compresso.checkpoint.bitsandbytes_layout import BitsAndBytes

        return BitsAndBytes(config, infos, load)
    if method_of(config) in METHODS:
        return Gptq(config, infos, load)
    return CompressedTensors(config, infos, load)


def decoded(
    tensors: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same tensors with every packed linear as its dense weight, in `dtype`.

    tensors: some of a checkpoint's by name, of each linear all or none. Not modified.
    config:  its config.json, which may name further linears.

    Raises CheckpointError as `packing_of`.
    """
    config = about(config, tensors)
    if not is_packed(config, tensors):
        return dict(tensors)
    infos = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.nbytes, "")
        for name, tensor in tensors.items()
    }
    packing = packing_of(config, infos, lambda names: {name: tensors[name] for name in names})
    stored = {name for path in packing.shapes for name in packing.names(path)}
    dense = {name: tensor for name, tensor in tensors.items() if name not in stored}
    for path in packing.shapes:
        dense[f"{path}.weight"] = packing.decode(path, tensors).to(dtype)
    return dense


def merged_codes(
    packing: Packing, path: str, parts: dict[str, Tensor], factor: LowRank | None
) -> Packed | AffineCodes:
    """The codes of a packed linear with a pooled correction in their zeros.

    path:   of the linear. parts: the tensors of `packing.names`. Not modified.
    factor: up (rows, rank), and down (rank, groups), which acts on the sum of the inputs of each
            group; None for no correction.

    Zeros are stored as float16 where they fit, also beside bfloat16 scales: of a correction at 2
    to 4 bits that loses a 200th to a 20th, but bfloat16 a 20th to two fifths, and what is lost is
    the same for all weights of a group. Where decoded weights are float32, so are zeros.

    Raises CheckpointError if the linear has no such zeros, ValueError if the factors do not fit.
    """
    codes = packing.uniform(path, parts)
    if codes is None:
        raise CheckpointError(
            f"a correction of `{path}` cannot be merged: its codes have no zeros",
            hint="store it as an adapter, or start from uniform codes",
        )
    if factor is None:
        return codes
    grid = codes.grid if isinstance(codes, Packed) else codes
    if grid.dtype == torch.float32:
        return merge_pooled(codes, factor.up, factor.down)
    try:
        return merge_pooled(codes, factor.up, factor.down, zero_dtype=torch.float16)
    except NumericalError:  # zeros are far away where all weights of a group are nearly alike
        return merge_pooled(codes, factor.up, factor.down)


def about(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A config.json that of coded linears names only those among some tensors. Not modified."""
    if (plan := coding_of(config)) is None:
        return config
    stored = {name.removesuffix(ENDING) for name in names if name.endswith(ENDING)}
    held = {module_of(path, plan[CODED]) for path in stored}
    kept = {module: kind for module, kind in plan[CODED].items() if module in held}
    return {**config, KEY: {**config[KEY], CODED: kept}}


def method_of(config: dict[str, Any]) -> str | None:
    """The `quant_method` of a parsed config.json."""
    entry = config.get("quantization_config")
    return entry.get("quant_method") if isinstance(entry, dict) else None


class CompressedTensors:
    """Linears in the `pack-quantized` layout of compressed-tensors: see layout.py."""

    def __init__(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        load: Load,
    ) -> None:
        """config: a parsed config.json. infos: every stored tensor. load: reads some of them.

        Raises CheckpointError if the checkpoint is quantized in a way that cannot be decoded, or a
        tensor is absent.
        """
        paths = [name.removesuffix(CODES) for name in infos if name.endswith(CODES)]
        self.schemes = schemes(config, paths)
        load(name for path in paths for name in self.names(path) if name not in infos)  # refuses
        sizes = load(f"{path}.weight_shape" for path in paths)
        self.shapes: dict[str, tuple[int, int]] = {}
        for path in paths:
            rows, columns = sizes[f"{path}.weight_shape"].tolist()
            self.shapes[path] = (rows, columns)

    def names(self, path: str) -> list[str]:
        """Names of the tensors that store the linear `path`."""
        return packed_names(path, self.schemes[path])

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """Its weight, (rows, columns) float32. parts: the tensors of `names`. Not modified."""
        return self.uniform(path, parts).decode()

    def uniform(self, path: str, parts: dict[str, Tensor]) -> Packed:
        """Its codes. parts: as `decode` takes them."""
        return unpack(path, parts, self.schemes[path])

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values."""
        return asdict(self.schemes[path])
