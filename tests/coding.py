"""Random codes of every kind, and checkpoints of tiny models whose linears are such codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from restructured import save
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from compresso.checkpoint import coded
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.kernels.grid import Grid, Packed
from compresso.kernels.hadamard import block_size
from compresso.kernels.higgs import VectorCodes
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.vector_grid import VectorGrid
from compresso.models.structure import Structure, restructure, structure_of

Make = Callable[[int, int, torch.dtype, int], coded.Codes]


def scales(shape: tuple[int, int], dtype: torch.dtype, seed: int, levels: int = 4) -> Tensor:
    """Positive values that `dtype` holds, for weights of about 0.2 of so many levels."""
    found = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.25
    return (found / levels).to(dtype).float()


def vector(size: int = 256, dimension: int = 2, most: int = 1024) -> Make:
    """Makes codes of a random grid, in blocks as large as the columns allow."""

    def make(rows: int, columns: int, dtype: torch.dtype, seed: int) -> VectorCodes:
        block = block_size(columns, most)
        grid = VectorGrid(torch.randn(size, dimension, generator=torch.Generator().manual_seed(1)))
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, size, (rows, columns // dimension), generator=generator)
        scale = scales((rows, columns // block), dtype, seed)
        return VectorCodes(codes.to(torch.uint8), scale, grid, block, dtype)

    return make


def affine(
    bits: int = 3,
    group_size: int = 32,
    *,
    zero_bits: int | None = None,
    zeros: torch.dtype | None = None,
) -> Make:
    """Makes codes with zeros that are not whole; group_size: -1 for the whole row.

    zeros: the type they are stored in, if that is another than that of the scales.
    """

    def make(rows: int, columns: int, dtype: torch.dtype, seed: int) -> AffineCodes:
        generator = torch.Generator().manual_seed(seed)
        groups = 1 if group_size == -1 else columns // group_size
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        zero = torch.randn(rows, groups, generator=generator) + 2 ** (bits - 1)
        zero = zero.to(zeros or dtype).float()
        if zero_bits is not None:
            zero = torch.randint(0, 2**zero_bits, (rows, groups), generator=generator)
            zero = zero * 2.0 ** (bits - zero_bits)
        scale = scales((rows, groups), dtype, seed, 2**bits)
        found = AffineCodes(codes.to(torch.uint8), scale, zero, bits, dtype)
        return replace(found, zero_bits=zero_bits, zero_dtype=zeros)

    return make


def uniform(bits: int = 4, group_size: int = 32, *, symmetric: bool = False) -> Make:
    """Makes codes of a uniform grid."""

    def make(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Packed:
        generator = torch.Generator().manual_seed(seed)
        groups = columns // group_size
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
        if symmetric:
            zero[:] = 2 ** (bits - 1)
        scale = scales((rows, groups), dtype, seed, 2**bits)
        return Packed(codes.to(torch.uint8), Grid(scale, zero, bits, dtype))

    return make


def is_symmetric(codes: coded.Codes) -> bool:
    """Whether codes have the zeros that need not be stored."""
    return isinstance(codes, Packed) and bool((codes.grid.zero == 2 ** (codes.grid.bits - 1)).all())


def eight(make: Make) -> Make:
    """Makes the same with scales in 8 bits, of either sign."""

    def made(rows: int, columns: int, dtype: torch.dtype, seed: int) -> coded.Codes:
        codes = make(rows, columns, dtype, seed)
        grid = codes.grid if isinstance(codes, Packed) else codes
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(-127, 128, grid.scale.shape, generator=generator)
        row_scale = scales((rows, 1), dtype, seed)
        changed = replace(grid, scale=numbers * (row_scale / 128), row_scale=row_scale)
        return replace(codes, grid=changed) if isinstance(codes, Packed) else changed

    return made


KINDS: dict[str, Make] = {
    "p1n8": vector(8, 1),
    "p2n256": vector(256, 2),
    "p2n90 in blocks of 16": vector(90, 2, 16),
    "p4n256": vector(256, 4),
    "3 bits": affine(3),
    "8 bits": affine(8, 16),
    "5 bits a row": affine(5, -1),
    "float16 zeros": affine(2, 32, zeros=torch.float16),
    "float32 zeros": affine(4, 32, zeros=torch.float32),
    "uniform": uniform(2),
    "symmetric": uniform(3, symmetric=True),
    "p2n256 s8": eight(vector(256, 2, 16)),
    "3 bits s8": eight(affine(3, 16)),
    "float16 zeros s8": eight(affine(3, 16, zeros=torch.float16)),
    "4 bits z8 s8": eight(affine(4, 16, zero_bits=8)),
    "uniform s8": eight(uniform(2, 8)),
    "symmetric s8": eight(uniform(2, 16, symmetric=True)),
}


@dataclass(frozen=True)
class CodedPair:
    """A coded checkpoint, and the dense one of the weights that it decodes to."""

    coded: Checkpoint
    dense: Checkpoint


def save_coded(
    model: PreTrainedModel,
    path: Path,
    make: Make | list[Make],
    *,
    structure: Structure | None = None,
    head: bool = False,
) -> CodedPair:
    """Both checkpoints of a stock model, restructured, whose linears are random codes.

    make: the kind of codes, or several to take turns. head: whether the head is coded, too.
    """
    family = family_of(model.config.model_type)
    source = save(model, structure or Structure(), path / "source")
    dtype = source.dtype
    makers = make if isinstance(make, list) else [make]
    stored = source.load(source.names())
    dense = dict(stored)
    descriptions = []
    linears = [name for name in stored if name.endswith(tuple(_weights(family.all_linears)))]
    if head:
        linears += [n for n in stored if n in ("lm_head.weight", "embed_out.weight")]
    for index, name in enumerate(linears):
        weight = stored.pop(name)
        rows, columns = weight.shape[::-1] if family.transposed else weight.shape
        codes = makers[index % len(makers)](rows, columns, dtype, index)
        decoded = codes.decode().to(dtype)
        dense[name] = (decoded.T if family.transposed else decoded).contiguous()
        symmetric = is_symmetric(codes)
        stored |= coded.pack(name.removesuffix(".weight"), codes, symmetric=symmetric)
        module = name.removesuffix(".weight").replace("embed_out", "lm_head")
        said = coded.describe({module: codes}, transposed=family.transposed, symmetric=symmetric)
        descriptions.append(said)
    config = restructure(
        source.config, structure_of(source.config), coded=coded.merge(descriptions)
    )
    return CodedPair(
        _write(path / "coded", config, stored), _write(path / "dense", source.config, dense)
    )


def _weights(paths: list[str]) -> list[str]:
    return [f".{path}.weight" for path in paths]


def _write(path: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Checkpoint:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, default=str))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)
