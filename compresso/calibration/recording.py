"""What reaches one linear of a block, kept so that what comes before it runs only once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from compresso.calibration.states import Store


class StandIn(nn.Module):
    """Takes the place of a linear, of attention or of an MLP, and answers by a function."""

    def __init__(self, answer: Callable[[Tensor], Tensor], *, attention: bool = False) -> None:
        """attention: return a tuple, as attention does."""
        super().__init__()
        self._answer = answer
        self._attention = attention

    def forward(
        self, hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor | tuple[Tensor, None]:
        """Answer for `hidden_states`, whatever else is passed."""
        answer = self._answer(hidden_states)
        return (answer, None) if self._attention else answer


def silent(sink: Callable[[Tensor], None], width: int, *, attention: bool = False) -> StandIn:
    """A module that gives its input to `sink` and answers with zeros, (..., width)."""

    def answer(inputs: Tensor) -> Tensor:
        sink(inputs)
        return inputs.new_zeros(1).expand(*inputs.shape[:-1], width)

    return StandIn(answer, attention=attention)


@dataclass(frozen=True)
class Call:
    """What a linear read and answered."""

    input: Tensor
    output: Tensor


@contextmanager
def heard(block: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Call]]:
    """Keep the last call of each of some linears of a block, by path."""
    calls: dict[str, Call] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[path] = Call(inputs[0], output)

        return hook

    handles = [block.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Recording:
    """The input of one linear, batch by batch, and then its output in place of the input.

    It is only true while no weight it depends on changes, which is checked on every use.
    """

    def __init__(self, block: nn.Module, path: str, store: Store, *, later: Iterable[str]) -> None:
        """path: of the linear. later: linears that its input does not depend on."""
        self._block = block
        self._path = path
        self._linear = block.get_submodule(path)
        self._store = store
        later_parameters = tuple(f"{linear}." for linear in later)
        self._seen = {
            name: (parameter, parameter._version)
            for name, parameter in block.named_parameters()
            if not name.startswith(later_parameters)
        }
        self._applied: set[int] = set()

    def put(self, batch: int, inputs: Tensor) -> None:
        """Keep a copy of what reached the linear in one batch."""
        self._store[batch] = inputs

    def check(self) -> None:
        """Raises RuntimeError if a weight has changed that what was recorded depends on."""
        for name, (parameter, version) in self._seen.items():
            now = self._block.get_parameter(name)
            if now is not parameter or now._version != version:
                raise RuntimeError(
                    f"{name} was changed after the input of {self._path} was recorded"
                )

    def settle(self) -> None:
        """From now on the linear's own weights count, too: outputs will be kept."""
        for name, parameter in self._linear.named_parameters():
            self._seen.setdefault(f"{self._path}.{name}", (parameter, parameter._version))
        self.check()

    def output(self, batch: int) -> Tensor:
        """What the linear answers in one batch; kept, so that it is asked once."""
        if batch not in self._applied:
            self._store[batch] = self._linear(self._store[batch])
            self._applied.add(batch)
        return self._store[batch]

    def release(self, batch: int) -> None:
        """Say that a batch is not needed for now."""
        self._store.release(batch)
