"""Load a checkpoint with plain transformers, as its users do, and tell what it lacks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compresso.checkpoint.directory import ADAPTER
from compresso.errors import ConfigError, GateError, ResourceError

OUT_OF_MEMORY = "DefaultCPUAllocator"  # begins what torch says then


def reload(
    path: Path,
    carried: Collection[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model in a checkpoint, on the CPU, without its adapter.

    carried: stored tensors that no module takes; None if it does not matter which there are.
    dtype:   type of its weights; the one that is stored if not given.

    Raises GateError if tensors are missing, left over or of the wrong shape, all of which
    transformers only warns about.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, info = loaded
    problems = {
        "missing": info["missing_keys"],
        "left over": set() if carried is None else set(info["unexpected_keys"]) - set(carried),
        "of the wrong shape": {mismatch[0] for mismatch in info["mismatched_keys"]},
    }
    for what, names in problems.items():
        if names:
            raise GateError(
                f"`{path}` does not load as it is: {len(names)} tensors are {what}, "
                f"first `{min(names)}`"
            )
    return model


def with_adapter(model: Any, path: Path) -> Any:
    """A loaded model with the corrections that are beside it in `path`, put on by plain PEFT."""
    from peft import PeftModel

    if getattr(getattr(model.config, "quantization_config", None), "dequantize", None) is False:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # weights come with the first forward
    return PeftModel.from_pretrained(model, path / ADAPTER)


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises on a bad checkpoint into an error that names it."""
    try:
        yield
    except ImportError as error:
        raise ResourceError(
            f"cannot reload `{path}`: {first_line(error)}", hint="install the package it names"
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _short_of_memory(path, error) from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if OUT_OF_MEMORY in str(error):  # on the CPU, torch has no class of its own for it
            raise _short_of_memory(path, error) from error
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"`{path}` comes with code that has to be run to load it",
                hint="pass `--trust-remote-code` if you trust it; compresso's own exports as"
                " `decilm` have such code",
            ) from error
        raise GateError(f"`{path}` does not load and run: {first_line(error)}") from error


def _short_of_memory(path: Path, error: BaseException) -> ResourceError:
    return ResourceError(
        f"cannot reload `{path}`: {first_line(error)}",
        hint="close other programs, or use a machine with more memory",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings: the loading report is checked, not read."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
