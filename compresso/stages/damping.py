"""What is done about a gram that is not positive definite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from compresso.errors import NumericalError
from compresso.runtime import warn

T = TypeVar("T")

RETRIES = 3
STEPS_OF_DAMPING = 10


def with_damping_raised(
    quantize: Callable[[float], T], damping: float, *, where: str
) -> tuple[T, float]:
    """What a quantizer finds, with ten times the damping where the gram needs it; and the damping.

    quantize: takes the damping; one that knows none is called with 0.0, and fails at once.
    where:    what is quantized, named in warnings and in the error.

    Raises NumericalError if that was not enough three times.
    """
    for attempt in range(RETRIES + 1):
        try:
            return quantize(damping), damping
        except NumericalError as error:
            if attempt == RETRIES or not damping:
                raise NumericalError(f"{where}: {error}", hint=error.hint) from error
            damping *= STEPS_OF_DAMPING
            warn(f"{where}: {error}; trying {damping:g}")
    raise AssertionError("the last attempt returns or raises")
