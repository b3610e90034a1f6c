"""How fast a checkpoint runs as its users would run it, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.directory import has_adapter
from compresso.checkpoint.proof import with_adapter
from compresso.errors import ResourceError
from compresso.runtime import peak_memory

DECODED = 64
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Measured in a process of its own, which loads the checkpoint as its users would.

    prefill:     tokens per second of one forward pass over the prompt; best of three.
    decode:      tokens per second of greedy generation after the prompt; best of three.
    peak_memory: bytes. On the CPU, resident memory of the whole process, interpreter and
                 libraries included; on CUDA, allocated device memory.
    continuation: token ids generated greedily after the sample prompt.
    """

    prefill: float
    decode: float
    peak_memory: int
    continuation: list[int]


def measure_speed(
    path: Path, prompt: Tensor, sample: Tensor, *, device: str, trust_remote_code: bool
) -> Speed:
    """Load `path` in a fresh process and time it.

    prompt: (1, tokens) int64, what prefill and decode are timed on.
    sample: (1, tokens) int64, what is continued.

    Raises ResourceError if the process is killed, as the system does when memory runs out.
    """
    job = {
        "path": str(path),
        "prompt_ids": prompt.tolist(),
        "sample_ids": sample.tolist(),
        "device": device,
        "trust_remote_code": trust_remote_code,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "compresso.stages.speed"]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        raise ResourceError(
            f"measuring the speed of `{path}` was killed, most likely for lack of memory",
            hint="pass `--no-speed`: the quality is measured block by block",
        )
    if done.returncode:
        raise RuntimeError(f"measuring the speed of {path} failed:\n{done.stderr}")
    return Speed(**json.loads(done.stdout))


def _measure(
    path: str,
    prompt_ids: list[list[int]],
    sample_ids: list[list[int]],
    device: str,
    trust_remote_code: bool,
    threads: int,
) -> Speed:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import compresso.models  # noqa: F401 - its classes load restructured checkpoints

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", trust_remote_code=trust_remote_code
    )
    if has_adapter(Path(path)):
        model = with_adapter(model, Path(path))
    model.to(device).eval()
    prompt = torch.tensor(prompt_ids, device=device)
    with torch.inference_mode():
        # The first pass pays for allocation and, for packed weights, for unpacking.
        _generate(model, prompt, 1)
        sample = torch.tensor(sample_ids, device=device)
        continuation = _generate(model, sample, DECODED)[0, sample.shape[1] :].tolist()
        prefill = min(_seconds(lambda: model(prompt), device) for _ in range(REPEATS))
        one = min(_seconds(lambda: _generate(model, prompt, 1), device) for _ in range(REPEATS))
        more = min(
            _seconds(lambda: _generate(model, prompt, 1 + DECODED), device) for _ in range(REPEATS)
        )
    return Speed(
        prefill=prompt.shape[1] / prefill,
        decode=DECODED / max(more - one, 1e-9),
        peak_memory=_peak_memory(device),
        continuation=continuation,
    )


def _generate(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    generated: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return generated


def _seconds(action: Any, device: str) -> float:
    start = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(device: str) -> int:
    return peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(**json.load(sys.stdin)))))
