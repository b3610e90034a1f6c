"""Find a stage or a method by its name, and the code of one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from compresso.errors import ConfigError
from compresso.methods import STAGES, Method, Stage

__all__ = [
    "STAGES",
    "Method",
    "Stage",
    "load",
    "method",
    "packed_as",
    "reads_text",
    "stage",
    "with_preset",
]

T = TypeVar("T")


def stage(name: str, *, where: str = "") -> Stage:
    """Raises ConfigError, with the nearest name, if there is none."""
    return _find("stage", name, STAGES, where)


def method(stage_name: str, name: str, *, where: str = "") -> Method:
    """Raises ConfigError, with the nearest name, if there is none."""
    found = stage(stage_name)
    return _find(f"{stage_name} {found.named}", name, found.methods, where)


def reads_text(stage_name: str, name: str, settings: Any) -> bool:
    """Whether a method with these settings reads calibration text."""
    calibrated = method(stage_name, name).calibrated
    return calibrated and bool(getattr(settings, "reads_text", True))


def packed_as(name: str, settings: Any) -> str:
    """The layout in which a quantize method with these settings stores what it packs.

    compressed-tensors has no form for scales in 8 bits: where these are asked for, it is ours.
    """
    layout = method("quantize", name).packed_as
    eight = getattr(settings, "scale_bits", None) == 8
    return "coded" if eight and layout == "compressed-tensors" else layout


def with_preset(stage_name: str, values: dict[str, Any], *, where: str = "") -> dict[str, Any]:
    """The values of a step with those of its `preset` in place of that.

    Raises ConfigError, with the nearest name, if there is none, or a method is named besides.
    """
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    if "method" in values:
        raise ConfigError(f"{where}: give only one of `preset`, `method`")
    presets = stage(stage_name, where=where).presets
    return _find(f"{stage_name} preset", name, presets, where) | values


def load(code: str) -> Callable[..., Any]:
    """Import the function a table entry points to."""
    module, _, function = code.partition(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def _find(kind: str, name: str, table: dict[str, T], where: str) -> T:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(table)}"
    place = f"{where}: " if where else ""
    raise ConfigError(f"{place}unknown {kind} `{name}`", hint=hint)
