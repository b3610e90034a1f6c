"""Where computing happens and how the user hears about it: devices, memory, stderr, progress.

The only module that reads or sets environment variables, or PyTorch's global switches. torch is
imported inside the functions that need it, so that messages cost nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.text import Text

from compresso.errors import ConfigError, ResourceError
from compresso.heap import return_freed_memory
from compresso.settings import RuntimeSettings

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("KMGT", start=1)},
    **{f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)},
}
_SECONDS_BETWEEN_LINES = 10.0
# Options of `accelerate launch` that do nothing here, by the variables they become.
_IGNORED = {
    "ACCELERATE_MIXED_PRECISION": "--mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps",
    "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend",
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing",
}
_AS_IF_UNSAID = ("", "no", "false", "1")


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes.

    dtype:      floating type blocks are run in; None lets each checkpoint decide.
    max_memory: bytes of hidden states kept in RAM; more goes to disk.
    verify:     whether results are proved before they are published.
    """

    device: torch.device
    dtype: torch.dtype | None
    max_memory: int
    trust_remote_code: bool
    verify: bool = True

    def compute_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The type to run a checkpoint of this dtype in.

        On a GPU that is the checkpoint's own. On a CPU it is bfloat16 where the checkpoint has it
        and the processor computes with it, and float32 everywhere else.
        """
        import torch

        if self.dtype is not None:
            return self.dtype
        if self.device.type == "cuda":
            return checkpoint_dtype
        if checkpoint_dtype == torch.bfloat16 and _computes_bfloat16():
            return torch.bfloat16
        return torch.float32


@dataclass(frozen=True)
class Launched:
    """How `accelerate launch` or `torchrun` started this process.

    index: of this process. local: among those of this machine. count: of all. sharded: they are to
    split what is trained among them (FSDP).
    """

    index: int = 0
    local: int = 0
    count: int = 1
    sharded: bool = False


def launched() -> Launched:
    """How this process was started; alone, if neither launcher did it.

    Raises ConfigError for a way of distribution that is not supported.
    """
    if "MASTER_ADDR" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Launched()
    for way in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise ConfigError(
                f"`accelerate launch` with {way} is not supported",
                hint="use `--multi_gpu` or `--use_fsdp`",
            )
    return Launched(
        index=int(os.environ["RANK"]),
        local=int(os.environ.get("LOCAL_RANK", "0")),
        count=int(os.environ["WORLD_SIZE"]),
        sharded=os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
    )


def make_runtime(settings: RuntimeSettings) -> Runtime:
    """Choose the device and prepare PyTorch and its libraries for it.

    float32 products are computed in full float32 from here on, never in TF32.

    Raises ConfigError if a setting cannot be read, ResourceError if this machine lacks the device.
    """
    import torch
    from transformers.utils import logging

    device = _device(settings.device)
    _warn_of_ignored()
    return_freed_memory()
    if device.type == "cuda" and launched().count > 1:
        torch.cuda.set_device(device)  # what is not told where to be is on this process's own, too
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return Runtime(
        device=device,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        max_memory=parse_bytes(settings.max_memory),
        trust_remote_code=settings.trust_remote_code,
        verify=settings.verify,
    )


def _warn_of_ignored() -> None:
    for variable, option in _IGNORED.items():
        value = os.environ.get(variable, "").lower()
        if value not in _AS_IF_UNSAID:
            warn(f"`{option} {value}` of `accelerate launch` does nothing here")


def _device(name: str) -> torch.device:
    import torch

    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not forced else "cpu"
    if name == "cuda" and launched().count > 1:
        name = f"cuda:{launched().local}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"unknown device `{name}`", hint="known: auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ResourceError(
            f"no device `{name}`: PyTorch finds {found} CUDA device{'s' * (found != 1)}",
            hint="pass `--device cpu`, or install a PyTorch build for this GPU",
        )
    return device


def _computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, rather than by way of float32."""
    import torch

    # PyTorch has had this function only lately; before, there is no public way to ask.
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `2GB` (10**9), `2GiB` (2**30), `1.5G` or `4096`.

    Raises ConfigError if it is not one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"`{text}` is not a size", hint="write it like `4GB` or `500MiB`")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """A size for people, in decimal units: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def peak_memory() -> int:
    """Most bytes of RAM this process has held at once so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not `ru_maxrss`: a new program starts with that of the process that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes of RAM that programs can still take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def quiet_libraries() -> None:
    """Silence the logs and bars of the libraries underneath, unless the user set them.

    Takes effect on libraries that are imported later. Download bars stay on a terminal. Threads
    that wait let other programs have the core: spinning ones make a busy machine many times slower.
    Large tensors are asked for in huge pages, as a large tensor is fresh memory each time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


def log(message: str) -> None:
    """Tell the user something, on stderr; of several processes, the first does."""
    if launched().index == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Tell the user about something they may want to act on, likewise."""
    if launched().index == 0:
        say("warning", message, style="yellow")


def say(kind: str, message: str, *, style: str) -> None:
    """Write `kind: message` to stderr, the kind in colour where the terminal and user have it."""
    line = Text.assemble((kind, style), ": ", message)
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield the items while showing how many of `total` are done and how long the rest may take.

    A bar on a terminal; otherwise a line now and then, and one at the end.
    """
    console = Console(stderr=True)
    if console.is_terminal and launched().index == 0:
        yield from _bar(items, total, description, console)
    else:
        yield from _lines(items, total, description, time.monotonic)


def _bar(items: Iterable[T], total: int, description: str, console: Console) -> Iterator[T]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        yield from bar.track(items, total=total, description=description)


def _lines(
    items: Iterable[T], total: int, description: str, clock: Callable[[], float]
) -> Iterator[T]:
    started = written = clock()
    for done, item in enumerate(items, start=1):
        yield item
        now = clock()
        if done == total:
            log(f"{description}: {done}/{total} in {now - started:.0f} s")
        elif now - written >= _SECONDS_BETWEEN_LINES:
            left = (now - started) / done * (total - done)
            log(f"{description}: {done}/{total}, about {left:.0f} s left")
            written = now
