"""Run checkpoints as the users of transformers do: load whole, decode with `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.directory import CONFIG, INDEX, SINGLE, has_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.reload import blaming, quiet, reload, with_adapter
from compresso.runtime import peak_memory
from compresso.runtimes.engine import Speed
from compresso.runtimes.process import apart

NAME = "transformers"
REPEATS = 3


def missing() -> str | None:
    """None: compresso needs it itself. What a checkpoint needs besides, loading it says."""
    return None


def version() -> str:
    """The version of transformers."""
    return installed("transformers")


def accepts(path: Path) -> bool:
    """Whether `path` is a directory with a config.json and safetensors."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (SINGLE, INDEX))


def logits(
    path: Path, tokens: Tensor, *, device: str = "cpu", trust_remote_code: bool = False
) -> Tensor:
    """What the model says of tokens: (1, T) int64 -> (1, T, vocabulary) float32.

    Raises GateError if it does not load and run, ResourceError if memory or a package is short.
    """
    return _apart("_logits", path, device, trust_remote_code, tokens=tokens.tolist())


def generate(
    path: Path,
    tokens: Tensor,
    new: int,
    *,
    cache: bool = True,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[int]:
    """The `new` token ids that follow tokens, (1, T) int64, greedily; no token ends them.

    Raises as `logits`.
    """
    given = {"tokens": tokens.tolist(), "new": new, "cache": cache}
    return _apart("_generate", path, device, trust_remote_code, **given)


def speed(
    path: Path,
    prompt: Tensor,
    new: int,
    *,
    sample: Tensor | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Speed:
    """Time the model on a prompt, (1, T) int64, and `new` tokens after it.

    sample: what is continued for `continuation`, (1, T) int64; the prompt if not given.

    Raises as `logits`.
    """
    continued = prompt if sample is None else sample
    given = {"prompt": prompt.tolist(), "sample": continued.tolist(), "new": new}
    return Speed(**_apart("_speed", path, device, trust_remote_code, **given))


def open_model(
    path: Path, *, device: str, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> Any:
    """The model with its adapter, ready to run in this process.

    dtype: type of its weights; the one that is stored if not given.

    Raises as `logits`.
    """
    import compresso.models  # noqa: F401 - its classes load restructured checkpoints

    with quiet(), blaming(path):
        model = reload(path, dtype=dtype, trust_remote_code=trust_remote_code)
        if has_adapter(path):
            model = with_adapter(model, path)
        return model.to(device).eval()


def _apart(name: str, path: Path, device: str, trust_remote_code: bool, **given: Any) -> Any:
    job = {
        "path": str(path),
        "device": device,
        "trust_remote_code": trust_remote_code,
        "threads": torch.get_num_threads(),
        **given,
    }
    return apart(f"{__name__}:{name}", job, path=path, runtime=NAME)


def _open(path: str, device: str, trust_remote_code: bool, threads: int) -> Any:
    torch.set_num_threads(threads)
    return open_model(Path(path), device=device, trust_remote_code=trust_remote_code)


def _logits(*, tokens: list[list[int]], **place: Any) -> Tensor:
    model = _open(**place)
    with torch.inference_mode(), blaming(Path(place["path"])):
        said = model(input_ids=torch.tensor(tokens, device=place["device"])).logits
    return said.float().cpu()


def _generate(*, tokens: list[list[int]], new: int, cache: bool, **place: Any) -> list[int]:
    model = _open(**place)
    with torch.inference_mode(), blaming(Path(place["path"])):
        prompt = torch.tensor(tokens, device=place["device"])
        return _continue(model, prompt, new, cache=cache)


def _speed(
    *, prompt: list[list[int]], sample: list[list[int]], new: int, **place: Any
) -> dict[str, Any]:
    # What is imported here is neither time nor memory of the model.
    from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: F401

    import compresso.models  # noqa: F401

    path, device = Path(place["path"]), place["device"]
    before = peak_memory() if device == "cpu" else 0
    ids, start = torch.tensor(prompt, device=device), time.perf_counter()
    model = _open(**place)
    with torch.inference_mode(), blaming(path):
        _continue(model, ids[:, :1], 1)
        _wait(device)
        load = time.perf_counter() - start
        # The first pass over many tokens pays for allocation.
        continuation = _continue(model, torch.tensor(sample, device=device), new)
        prefill = _best(lambda: model(ids), device)
        first = _best(lambda: _continue(model, ids, 1), device)
        more = _best(lambda: _continue(model, ids, 1 + new), device)
    return asdict(
        Speed(
            prefill=ids.shape[1] / prefill,
            decode=new / max(more - first, 1e-9),
            first_token=first,
            load=load,
            peak_memory=peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated(),
            base_memory=before,
            disk_bytes=Checkpoint(path).stored_bytes,
            continuation=continuation,
        )
    )


def _continue(model: Any, prompt: Tensor, new: int, *, cache: bool = True) -> list[int]:
    from transformers import GenerationConfig

    # generate() fills gaps from the model's own, whose stop tokens and penalties are not wanted.
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, use_cache=cache, pad_token_id=0
    )
    model.generation_config = settings
    mask = torch.ones_like(prompt)
    found = model.generate(input_ids=prompt, generation_config=settings, attention_mask=mask)
    return found[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


def _best(action: Callable[[], Any], device: str) -> float:
    """Fewest seconds that the action takes."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
