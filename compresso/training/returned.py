"""What blocks return while a model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from compresso.training.model import TrainingModel


@contextmanager
def returned_by(model: TrainingModel, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What some blocks return while the model is run, (B, T, d) each, by block."""
    returned: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            returned[index] = output

        return hook

    handles = [model.adapter.blocks[index].register_forward_hook(keep(index)) for index in blocks]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()
