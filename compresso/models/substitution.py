"""Put other modules and parameters into a model, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


@dataclass(frozen=True)
class BlockArguments:
    """What the model passes to a block besides the hidden states: masks, rotary tables."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class Recorder(nn.Module):
    """Stands in for a module: keeps what it is given and returns its input."""

    hidden: Tensor
    arguments: BlockArguments

    def forward(self, hidden_states: Tensor, *positional: object, **named: object) -> Tensor:
        """The same `hidden_states`."""
        self.hidden = hidden_states
        self.arguments = BlockArguments(positional, named)
        return hidden_states


class Player(nn.Module):
    """Stands in for a block: returns the same hidden states, whatever its input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: object, **__: object) -> Tensor:
        """What it was made with."""
        return self.hidden


class Answer(nn.Module):
    """Stands in for the body of a model: returns the same final states, whatever its input."""

    def __init__(self, hidden: Tensor) -> None:
        """hidden: what the head is to read, (B, T, d)."""
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPastAndCrossAttentions:
        """What it was made with, as a body returns it."""
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)  # type: ignore[arg-type]


@contextmanager
def replaced(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let other modules stand in for those at the given paths below `root`."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            _put(root, path, module)
        yield
    finally:
        for path, module in originals.items():
            _put(root, path, module)


def put_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` itself, not a copy, the parameter of that name below `root`."""
    frozen = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    _put(root, name, frozen)


def empty_parameter(root: nn.Module, name: str) -> None:
    """Free the parameter of that name below `root`: only its shape and type remain."""
    put_parameter(root, name, torch.empty_like(root.get_parameter(name), device="meta"))


def _put(root: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, value)
