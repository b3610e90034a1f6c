"""Run GGUF files in llama.cpp, through llama-cpp-python."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.errors import CheckpointError
from compresso.runtime import peak_memory
from compresso.runtimes.engine import Speed
from compresso.runtimes.llama_cpp_model import NAME, Model, open_library
from compresso.runtimes.process import apart

PACKAGE, ENDING = "llama_cpp", ".gguf"
LORA = "lora"  # begins the name of a file with corrections, beside that of the model
REPEATS = 3

__all__ = ["NAME", "accepts", "generate", "logits", "missing", "speed", "tokenize", "version"]


def missing() -> str | None:
    """What to install, if llama-cpp-python is not."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "package `llama-cpp-python`: pip install 'compresso-llm[gguf]'"
    return None


def version() -> str:
    """The version of llama-cpp-python, which brings llama.cpp along."""
    return installed("llama-cpp-python")


def accepts(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory with one."""
    return bool(_files(path)[0])


def logits(path: Path, tokens: Tensor, *, trust_remote_code: bool = False) -> Tensor:
    """What the model says of tokens: (1, T) int64 -> (1, T, vocabulary) float32.

    Keys and values are kept in float32, which is not the default: so no more is rounded than the
    weights' own kernels round.

    trust_remote_code: has no part in it; there is none.

    Raises GateError if it does not load and run, ResourceError if llama.cpp is not installed.
    """
    found: Tensor = _apart("_logits", path, tokens=tokens[0].tolist())
    return found


def generate(
    path: Path,
    tokens: Tensor,
    new: int,
    *,
    cache: bool = True,
    trust_remote_code: bool = False,
) -> list[int]:
    """The `new` token ids that follow tokens, (1, T) int64, greedily; no token ends them.

    cache: keep the keys and values of earlier tokens, instead of running all for each new one.

    Raises as `logits`.
    """
    found: list[int] = _apart("_generate", path, tokens=tokens[0].tolist(), new=new, cache=cache)
    return found


def speed(
    path: Path,
    prompt: Tensor,
    new: int,
    *,
    sample: Tensor | None = None,
    trust_remote_code: bool = False,
) -> Speed:
    """Time the model on a prompt, (1, T) int64, and `new` tokens after it.

    sample: what is continued for `continuation`, (1, T) int64; the prompt if not given.

    Raises as `logits`.
    """
    continued = prompt if sample is None else sample
    given = {"prompt": prompt[0].tolist(), "sample": continued[0].tolist(), "new": new}
    return Speed(**_apart("_speed", path, **given))


def tokenize(path: Path, texts: list[str]) -> list[list[int]]:
    """The token ids of texts as the file's own tokenizer has them, with none put around them.

    Raises as `logits`.
    """
    found: list[list[int]] = _apart("_tokenize", path, texts=texts)
    return found


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """GGUF files at `path`: of models, and of corrections to them.

    Those beside a file are its own if it is the only model there, as an export's is.
    """
    folder = path.parent if path.is_file() else path
    found = sorted(folder.glob(f"*{ENDING}"))
    models = [file for file in found if not file.name.startswith(LORA)]
    corrections = [file for file in found if file not in models]
    if path.is_file():
        own = corrections if models == [path] else []
        return ([path] if path.suffix == ENDING else []), own
    return models, corrections


def the_files(path: Path) -> tuple[Path, list[Path]]:
    """The GGUF file at `path`, and those of corrections that go with it.

    Raises CheckpointError if there is not exactly one.
    """
    models, corrections = _files(path)
    if len(models) != 1:
        names = ", ".join(f"`{file.name}`" for file in models) or "none"
        raise CheckpointError(
            f"`{path}` should hold one GGUF file, but holds {names}", hint="name the file itself"
        )
    return models[0], corrections


def _apart(name: str, path: Path, **given: Any) -> Any:
    model, corrections = the_files(path)
    job = {
        "path": str(model),
        "corrections": [str(file) for file in corrections],
        "threads": torch.get_num_threads(),
        **given,
    }
    return apart(f"{__name__}:{name}", job, path=path, runtime=NAME)


def _logits(*, path: str, corrections: list[str], threads: int, tokens: list[int]) -> Tensor:
    model = Model(path, corrections)
    model.make_room(len(tokens), threads, exact=True)
    return model.run(tokens, 0, every=True)[None]


def _generate(
    *, path: str, corrections: list[str], threads: int, tokens: list[int], new: int, cache: bool
) -> list[int]:
    model = Model(path, corrections)
    model.make_room(len(tokens) + new, threads)
    return model.follow(tokens, new, cache=cache)


def _tokenize(
    *, path: str, corrections: list[str], threads: int, texts: list[str]
) -> list[list[int]]:
    model = Model(path, [], vocabulary=True)
    return [model.tokenize(text) for text in texts]


def _speed(
    *,
    path: str,
    corrections: list[str],
    threads: int,
    prompt: list[int],
    sample: list[int],
    new: int,
) -> dict[str, Any]:
    open_library()  # is neither time nor memory of the model
    before, start = peak_memory(), time.perf_counter()
    model = Model(path, corrections)
    model.make_room(max(len(prompt), len(sample)) + new + 1, threads)
    model.run(prompt[:1], 0)
    load = time.perf_counter() - start
    continuation = model.follow(sample, new)
    prefill = first = more = float("inf")
    for _ in range(REPEATS):
        prefill = min(prefill, _seconds(model, prompt, 0))
        first = min(first, _seconds(model, prompt, 1))
        more = min(more, _seconds(model, prompt, 1 + new))
    return asdict(
        Speed(
            prefill=len(prompt) / prefill,
            decode=new / max(more - first, 1e-9),
            first_token=first,
            load=load,
            peak_memory=peak_memory(),
            base_memory=before,
            disk_bytes=sum(Path(file).stat().st_size for file in (path, *corrections)),
            continuation=continuation,
        )
    )


def _seconds(model: Model, prompt: list[int], new: int) -> float:
    start = time.perf_counter()
    if new:
        model.follow(prompt, new)
    else:
        model.forget()
        model.run(prompt, 0)
    return time.perf_counter() - start
