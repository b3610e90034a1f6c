"""The errors a user can meet, each with the exit code the command returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CompressoError(Exception):
    """Base of every error compresso raises on purpose.

    The message is one line that names the thing at fault in backticks; the hint, if any, is one
    line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CompressoError):
    """A command, recipe or setting that cannot be right, whatever the data."""

    exit_code = 2


class CheckpointError(CompressoError):
    """A checkpoint or dataset that is missing, damaged, or not what it claims to be."""

    exit_code = 3


class NumericalError(CompressoError):
    """Data that the maths cannot handle, such as a gram that is not positive definite."""

    exit_code = 4


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Let a numerical error begin with where it happened, such as a linear in backticks."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{where}: {error}", hint=error.hint) from error


class ResourceError(CompressoError):
    """Not enough memory or disk, no permission, or a package that is not installed."""

    exit_code = 5


class GateError(CompressoError):
    """A result that fails the limits its user set, or an output that fails its proof."""

    exit_code = 6


class Interrupted(CompressoError):
    """The user, or the system, asked the run to stop; what was finished is kept."""

    exit_code = 130
