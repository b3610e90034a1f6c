"""Decide which linears a run quantizes, and refuse what cannot be, before any work starts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compresso.errors import ConfigError
from compresso.kernels.hadamard import block_size
from compresso.models.adapter import ModelAdapter
from compresso.quantize_settings import DEFAULT_BITS, LinearChoice, Nf4Settings

COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True)
class Plan:
    """What to quantize and how, decided for a whole run.

    groups: the linears of each input group of a block that are quantized, by path in the block,
            for every block. A linear that several blocks use is quantized once, in the block that
            has it, and to that block's input alone: the gram of no other is taken.
    bits:   of the codes of each such group; None for a method with one width.
    kept:   full names of the linears that stay dense.
    head:   whether the output head is quantized as well. head_bits: of its codes.
    """

    groups: list[list[tuple[str, ...]]]
    bits: Sequence[Sequence[int | None]]
    kept: list[str]
    head: bool
    head_bits: int | None

    @property
    def mixed(self) -> bool:
        """Whether some codes are wider than others."""
        widths = {bits for own in self.bits for bits in own}
        return len(widths | {self.head_bits} if self.head else widths) > 1


def make_plan(adapter: ModelAdapter, settings: LinearChoice, *, packed_as: str) -> Plan:
    """Decide what is quantized, and refuse what cannot be.

    packed_as: the layout of packed linears, as the registry names it.

    Raises ConfigError if a linear's columns do not divide into groups, or have one scale where
    several are to share one, an `ignore` pattern matches no linear, nothing is left, or the
    family's linears have no packed form.
    """
    if settings.pack and adapter.family.transposed and packed_as == COMPRESSED_TENSORS:
        raise ConfigError(
            f"the linears of `{adapter.config.model_type}` are stored transposed, which the"
            " packed layout cannot express",
            hint="pass `--no-pack` to store the rounded weights dense",
        )
    unused = set(settings.ignore)
    groups: list[list[tuple[str, ...]]] = []
    kept: list[str] = []
    for index in range(adapter.count):
        prefix = adapter.module_prefix(index)
        groups.append([])
        own = set(adapter.block_tensors(index))
        for linears in adapter.family.linears:
            group = [
                path for path in linears if f"{adapter.block_prefix(index)}{path}.weight" in own
            ]
            matches = {path: _matching(prefix + path, path, settings.ignore) for path in group}
            unused -= {pattern for pattern in matches.values() if pattern}
            kept += [prefix + path for path in group if matches[path]]
            if chosen := tuple(path for path in group if not matches[path]):
                groups[-1].append(chosen)
                _check_block(adapter, index, chosen, settings)
    example = f"{adapter.module_prefix(0)}{adapter.family.linears[0][0]}"
    if unused:
        raise ConfigError(
            f"`ignore` pattern `{sorted(unused)[0]}` matches no linear",
            hint=f"a linear's name is like `{example}`",
        )
    if not any(groups) and not settings.lm_head:
        raise ConfigError("`ignore` leaves no linear to quantize")
    if settings.lm_head:
        _check_head(adapter, settings)
    else:
        kept.append(adapter.family.head)
    bits = getattr(settings, "bits", None)
    if bits is None and hasattr(settings, "bits"):
        bits = DEFAULT_BITS
    return Plan(groups, [[bits] * len(own) for own in groups], kept, settings.lm_head, bits)


def options_of(quantizer: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a quantizer takes, by the names of its parameters."""
    known = inspect.signature(quantizer).parameters
    return {name: value for name, value in values.items() if name in known}


def _matching(name: str, path: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that names a linear by its full name, its path or its last word."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern.removeprefix("re:"), name):
                return pattern
        elif pattern in (name, path, path.rpartition(".")[2]):
            return pattern
    return None


def _check_block(
    adapter: ModelAdapter, index: int, paths: tuple[str, ...], settings: LinearChoice
) -> None:
    for path in paths:
        columns = adapter.weight(adapter.blocks[index], path).shape[1]
        _check_columns(f"{adapter.module_prefix(index)}{path}", columns, settings)


def _check_columns(name: str, columns: int, settings: LinearChoice) -> None:
    """Raises ConfigError if the columns of a linear cannot be grouped as the settings say."""
    size: int = getattr(settings, "group_size", -1)
    divisor = (getattr(settings, "dimension", None) or 1) if size == -1 else size
    if columns % divisor:
        raise ConfigError(
            f"`{name}` has {columns} columns, which do not divide into groups of {divisor}",
            hint="choose a `--group-size` that divides, -1 for whole rows, or `--ignore` it",
        )
    block = getattr(settings, "block", None)
    group = block_size(columns, block) if block else columns if size == -1 else size
    shared = getattr(settings, "scale_bits", None) == 8 and not isinstance(settings, Nf4Settings)
    if shared and group == columns:
        raise ConfigError(
            f"`{name}` has one scale for each row, which 8 bits would only make larger",
            hint="choose smaller groups (`--group-size`, `--hadamard`) or leave out `--scale-bits`",
        )


def _check_head(adapter: ModelAdapter, settings: LinearChoice) -> None:
    if adapter.tied:
        raise ConfigError(
            "the output head shares its weights with the embedding, which stays dense",
            hint="leave out `--lm-head`",
        )
    if adapter.family.transposed:
        raise ConfigError(
            f"the output head of `{adapter.config.model_type}` cannot be quantized",
            hint="leave out `--lm-head`",
        )
    columns = adapter.model.get_output_embeddings().weight.shape[1]
    _check_columns(adapter.family.head, columns, settings)
