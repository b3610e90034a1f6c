"""Immutable, validated records. The only module that knows pydantic."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from compresso.errors import ConfigError

T = TypeVar("T")
limit = Field  # limit(ge=2, le=8, description="...")
checked = model_validator(mode="after")  # decorates a method that raises ValueError


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen record that checks its values and refuses unknown keys."""
    # Building the checks waits until a record is made: help and listings need only the fields.
    config = ConfigDict(extra="forbid", defer_build=True)
    return dataclass(cls, frozen=True, kw_only=True, config=config)  # type: ignore[return-value]


def build(cls: type[T], values: dict[str, Any], *, where: str) -> T:
    """Build a record from plain values, as read from a recipe or the command line.

    where: the place the values come from, named in the error.

    Raises ConfigError naming the first wrong key, what is wrong with it, and for an unknown key
    the nearest known one.
    """
    known = fields(cls)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key `{key}`", hint=hint)
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        place = f"{where}: `{key}`" if key else where
        raise ConfigError(f"{place}: {message[0].lower()}{message[1:]}") from None


def describe(cls: type, field: str) -> tuple[str, Any]:
    """The description and the default of one field."""
    found = cls.__pydantic_fields__[field]  # type: ignore[attr-defined]
    return found.description or "", found.default


def fields(cls: type) -> list[str]:
    """The names of a record's fields, in order."""
    return [field.name for field in dataclasses.fields(cls)]
