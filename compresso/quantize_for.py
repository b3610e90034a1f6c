"""Keep to codes that a runtime runs fast: `quantize --for`. Imports no torch."""

from __future__ import annotations

from typing import Any

from compresso import registry
from compresso.config import describe, fields
from compresso.errors import ConfigError
from compresso.quantize_settings import DEFAULT_BITS
from compresso.runtimes.table import Fast, table

FIELD = "for_runtime"
RUN_BY = {"gguf": "llama.cpp"}  # a format that only one runtime runs


def restricted(method: str, values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The values of a quantize step, with what its `for_runtime` decides of what was not given.

    Raises ConfigError if that runtime does not run fast what they ask for.
    """
    named = values.get(FIELD)
    runtime = RUN_BY.get(str(named), named)
    known = table()["fast"]
    if runtime is None or runtime not in known:  # what is no runtime is refused with the settings
        return values
    values = {**values, FIELD: runtime}
    if values.get("pack") is False:
        raise ConfigError(
            f"{where}: `pack` is off, so `for` would do nothing", hint="leave out one of the two"
        )
    asked = _asked(method, values)
    rows: list[Fast] = known[runtime]
    row = next((row for row in rows if _fits(row, asked)), None)
    if row is None:
        raise ConfigError(
            f"{where}: `{runtime}` does not run fast {_words(method, asked)}",
            hint=f"it runs fast: {'; '.join(row.why for row in rows)}",
        )
    if row.groups and "group_size" not in values:
        return {**values, "group_size": row.groups[0]}
    return values


def widths_for(settings: Any) -> tuple[int, ...] | None:
    """The widths that a target may mix for the runtime that settings name; None for any."""
    runtime = getattr(settings, FIELD, None)
    if runtime is None:
        return None
    asked = {
        "layout": "compressed-tensors",
        "mixed": True,
        "symmetric": settings.symmetric,
        "group_size": settings.group_size,
    }
    rows: list[Fast] = table()["fast"][runtime]
    return next((row.bits for row in rows if _fits(row, asked)), None)


def _asked(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, with defaults for all but the groups."""
    entry = registry.method("quantize", method)
    layout = "coded" if values.get("scale_bits") == 8 else entry.packed_as
    if entry.packed_as == "bitsandbytes":
        layout = entry.packed_as
    has = fields(entry.settings)
    return {
        "layout": layout,
        "mixed": any(values.get(name) is not None for name in ("target_bits", "size")),
        "bits": (values.get("bits") or DEFAULT_BITS) if "bits" in has else None,
        "group_size": values.get("group_size"),
        "symmetric": values.get("symmetric", describe(entry.settings, "symmetric")[1])
        if "symmetric" in has
        else None,
    }


def _fits(row: Fast, asked: dict[str, Any]) -> bool:
    bits, size = asked.get("bits"), asked["group_size"]
    return (
        row.layout == asked["layout"]
        and (row.mixed or not asked["mixed"])
        and (asked["mixed"] or not row.bits or bits in row.bits)
        and (size is None or not row.groups or size in row.groups)
        and row.symmetric in (None, asked["symmetric"])
    )


def _words(method: str, asked: dict[str, Any]) -> str:
    if asked["layout"] != "compressed-tensors":
        return f"what `{method}` writes with these settings"
    kind = "symmetric" if asked["symmetric"] else "asymmetric"
    bits = "several widths" if asked["mixed"] else f"{asked['bits']} bits"
    size = asked["group_size"]
    groups = "" if size is None else " by row" if size == -1 else f" in groups of {size}"
    return f"{kind} codes of {bits}{groups}"
