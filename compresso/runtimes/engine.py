"""What compresso asks of a runtime, and which runtimes there are.

A runtime is a module with the functions of `Engine`. Each runs the model in a process of its own:
a bad model can end the process it runs in, and memory is measured of one process.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from compresso.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

# The name users give -> the module.
ENGINES = {
    "transformers": "compresso.runtimes.transformers",
    "llama.cpp": "compresso.runtimes.llama_cpp",
}


@dataclass(frozen=True)
class Speed:
    """Measured in a process of its own, which loads the model as its users would.

    prefill:      tokens per second of one forward pass over the prompt; best of three.
    decode:       tokens per second of greedy generation after the prompt; best of three.
    first_token:  seconds from a prompt to the first new token, of a loaded model; best of three.
    load:         seconds from opening the files until a first forward pass of one token is done,
                  with which some formats unpack their weights.
    peak_memory:  bytes. On the CPU, resident memory of the whole process, interpreter and
                  libraries included; on CUDA, allocated device memory.
    base_memory:  bytes of that before the model was opened, with the libraries that run it.
    disk_bytes:   bytes of the weights on disk.
    continuation: token ids generated greedily after the prompt.
    """

    prefill: float
    decode: float
    first_token: float
    load: float
    peak_memory: int
    base_memory: int
    disk_bytes: int
    continuation: list[int]


class Engine(Protocol):
    """A runtime: a module with these names.

    All three that run a model raise GateError if it does not load and run there, and ResourceError
    if memory or a package is short.
    """

    NAME: str

    def missing(self) -> str | None:
        """What to install, such as "package `x`: pip install 'compresso-llm[x]'"; None if ready."""

    def version(self) -> str:
        """The version of what runs the models."""

    def accepts(self, path: Path) -> bool:
        """Whether what lies at `path` is of its kind; reads no weights."""

    def logits(self, path: Path, tokens: Tensor, *, trust_remote_code: bool = False) -> Tensor:
        """What the model says of tokens: (1, T) int64 -> (1, T, vocabulary) float32."""

    def generate(
        self,
        path: Path,
        tokens: Tensor,
        new: int,
        *,
        cache: bool = True,
        trust_remote_code: bool = False,
    ) -> list[int]:
        """The `new` token ids that follow tokens, (1, T) int64, greedily; no token ends them.

        cache: keep the keys and values of earlier tokens, instead of running all for each new one.
        """

    def speed(
        self, path: Path, prompt: Tensor, new: int, *, trust_remote_code: bool = False
    ) -> Speed:
        """Time the model on a prompt, (1, T) int64, and `new` tokens after it."""


def engine(name: str) -> Engine:
    """The runtime of that name, which may not be installed. Raises ConfigError if none has it."""
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(ENGINES)}"
        raise ConfigError(f"unknown runtime `{name}`", hint=hint)
    return cast(Engine, import_module(ENGINES[name]))


def ready_engine(name: str) -> Engine:
    """The runtime of that name. Raises as `engine`, and ResourceError if it is not installed."""
    found = engine(name)
    if (missing := found.missing()) is not None:
        what, _, how = missing.partition(": ")
        raise ResourceError(f"runtime `{name}` needs {what}", hint=how)
    return found


def all_engines() -> list[Engine]:
    """Every runtime, installed or not."""
    return [engine(name) for name in ENGINES]


def engines_for(path: Path) -> list[Engine]:
    """Every runtime, installed or not, that runs what lies at `path`."""
    return [found for found in all_engines() if found.accepts(path)]
