"""Corrections of low rank beside a checkpoint: a PEFT adapter in its folder `adapter`.

    adapter/adapter_config.json         ranks, scalings and which linears
    adapter/adapter_model.safetensors   of the linear at `<module>` in transformers

        base_model.model.<module>.lora_A.weight  (rank, in): down
        base_model.model.<module>.lora_B.weight  (out, rank): up, less the scaling

The linear then has the weight W + up @ down, W being what the checkpoint stores. Adapters that
compresso writes have the scaling 1. It also reads those that PEFT saved, if they are plain.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compresso.checkpoint.directory import ADAPTER as FOLDER
from compresso.checkpoint.directory import ADAPTER_CONFIG as CONFIG
from compresso.checkpoint.directory import ADAPTER_WEIGHTS as WEIGHTS
from compresso.checkpoint.directory import has_adapter, open_shard, read_json
from compresso.checkpoint.layout import HEAD, OLD_HEAD
from compresso.checkpoint.shard_file import flush_directory, write_safetensors
from compresso.errors import CheckpointError, ResourceError
from compresso.kernels.lowrank import LowRank

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PREFIX = "base_model.model."
HINT = "fold it into the weights with PEFT, or take the folder away"
# What makes an adapter mean more than its factors say.
FURTHER = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class AdapterFolder:
    """The adapter of a checkpoint, none of whose factors is read before `load`.

    directory: the folder. ranks: of every correction, by the linear's path in the checkpoint,
    sorted. sizes: stored bytes of each.
    """

    directory: Path
    ranks: dict[str, int]
    sizes: dict[str, int]
    _modules: dict[str, str]  # in transformers
    _scalings: dict[str, float]

    @property
    def paths(self) -> list[str]:
        """The corrected linears, by path in the checkpoint."""
        return list(self.ranks)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all factors."""
        return sum(self.sizes.values())

    @cached_property
    def key(self) -> str:
        """Identifies its contents, wherever the base is."""
        config = read_json(self.directory / CONFIG)
        config.pop("base_model_name_or_path", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        with (self.directory / WEIGHTS).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def load(self, paths: Iterable[str]) -> dict[str, LowRank]:
        """The corrections of those of the linears that have one, their scaling folded in."""
        found: dict[str, LowRank] = {}
        with open_shard(self.directory / WEIGHTS) as shard:
            for path in dict.fromkeys(paths):
                if path in self.ranks:
                    stored = f"{PREFIX}{self._modules[path]}"
                    up = shard.get_tensor(f"{stored}{UP}").float() * self._scalings[path]
                    found[path] = LowRank(up, shard.get_tensor(f"{stored}{DOWN}").float())
        return found


def read_adapter(
    directory: Path, shape_of: Callable[[str], tuple[int, int] | None]
) -> AdapterFolder | None:
    """The adapter beside a checkpoint; None if there is none.

    directory: the checkpoint's.
    shape_of:  (out, in) of the linear that the checkpoint has under a path; None if it has none.

    Raises CheckpointError if it is not whole, is for other linears, or is more than plain factors.
    """
    if not has_adapter(directory):
        return None
    folder = directory / FOLDER
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"`{folder}` is no LoRA adapter", hint=HINT)
    for name in FURTHER:
        if config.get(name):
            raise CheckpointError(f"`{folder}` has `{name}`, which cannot be read", hint=HINT)
    shapes, sizes = _stored(folder)
    found = AdapterFolder(folder, {}, {}, {}, {})
    for module in sorted({name.removesuffix(DOWN).removesuffix(UP) for name in shapes}):
        path, shape = _place(module.removeprefix(PREFIX), shape_of)
        down, up = shapes.get(f"{module}{DOWN}", (0, 0)), shapes.get(f"{module}{UP}", (0, 0))
        rank = down[0]
        if shape is None or up != (shape[0], rank) or down != (rank, shape[1]) or not rank:
            raise CheckpointError(
                f"`{folder}` corrects `{path}`, but the checkpoint has no linear of that shape",
                hint="it belongs to another checkpoint: take the folder away",
            )
        found.ranks[path] = rank
        found.sizes[path] = sizes[f"{module}{DOWN}"] + sizes[f"{module}{UP}"]
        found._modules[path] = module.removeprefix(PREFIX)
        found._scalings[path] = _scaling(config, found._modules[path], rank)
    return replace(found, ranks=dict(sorted(found.ranks.items())))


def write_adapter(
    directory: Path,
    factors: Mapping[str, LowRank],
    *,
    modules: Mapping[str, str],
    base: Path,
    dtype: torch.dtype,
    fan_in_fan_out: bool = False,
) -> None:
    """Put an adapter beside the checkpoint in `directory`; nothing where all ranks are 0.

    factors: by the linear's path in the checkpoint. Not modified. What makes them as they are asked
             for is asked in that order, and one is held at a time.
    modules: path in the checkpoint -> path in transformers, at least of these.
    base:    where the checkpoint will be, for those who open the adapter alone.
    dtype:   type the factors are stored in.
    fan_in_fan_out: the linears are modules whose own weight is (in, out).

    Raises ValueError if a factor is not exact in `dtype`, ResourceError if the disk is full.
    """
    ranks: dict[str, int] = {}
    places: dict[str, tuple[str, str]] = {}
    for path in sorted(factors):
        if not (rank := _check_exact(path, factors[path], dtype)):
            continue
        ranks[modules[path]] = rank
        places |= {f"{PREFIX}{modules[path]}{ending}": (path, ending) for ending in (DOWN, UP)}
    if not ranks:
        return
    folder = directory / FOLDER
    config = json.dumps(_config(ranks, base, fan_in_fan_out=fan_in_fan_out), indent=2) + "\n"
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        with _flushed(folder / CONFIG) as file:
            file.write(config.encode())
        with _flushed(folder / WEIGHTS) as file:
            write_safetensors(file, _Stored(factors, places, dtype), {"format": "pt"})
        flush_directory(folder)


@dataclass(frozen=True)
class _Stored(Mapping[str, Tensor]):
    """What is stored of corrections, made as it is asked for.

    places: of every stored tensor, the path of its correction, and which factor it is.
    """

    factors: Mapping[str, LowRank]
    places: Mapping[str, tuple[str, str]]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        path, ending = self.places[name]
        found = self.factors[path]
        return (found.down if ending == DOWN else found.up).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _check_exact(path: str, factor: LowRank, dtype: torch.dtype) -> int:
    """The rank of a correction. Raises ValueError if it is not exact in `dtype`."""
    for values in (factor.down, factor.up):
        if not torch.equal(values.to(dtype).float(), values.float()):
            raise ValueError(f"the correction of `{path}` is not exact in {dtype}")
    return len(factor.down)


def _config(ranks: Mapping[str, int], base: Path, *, fan_in_fan_out: bool) -> dict[str, Any]:
    """What PEFT is to read. ranks: by path in transformers."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Whole paths: a part of one would fit other linears, too.
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
    }


def _stored(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shape and bytes of every stored factor."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    with open_shard(folder / WEIGHTS) as shard:
        for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
            if not (name.startswith(PREFIX) and name.endswith((DOWN, UP))):
                raise CheckpointError(f"`{folder}` holds `{name}`, which cannot be read", hint=HINT)
            tensor = shard.get_tensor(name)
            shapes[name], sizes[name] = tuple(tensor.shape), tensor.nbytes
    if not shapes:
        raise CheckpointError(f"`{folder}` holds no corrections", hint="take the folder away")
    return shapes, sizes


def _place(
    module: str, shape_of: Callable[[str], tuple[int, int] | None]
) -> tuple[str, tuple[int, int] | None]:
    """What the checkpoint calls the linear at `module`, and its shape; the inverse of module_of."""
    names = [module, *([OLD_HEAD] if module == HEAD else []), module.partition(".")[2]]
    for name in names:
        if name and (shape := shape_of(name)) is not None:
            return name, shape
    return module, None


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the correction of a module by."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@contextmanager
def _flushed(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write `{path}`: {error.strerror}") from error
