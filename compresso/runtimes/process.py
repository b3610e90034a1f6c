"""Call a function in a process of its own, so that what it does to the process ends with it.

torch is imported only for a result that is a tensor: a process starts in no time without.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from compresso import errors
from compresso.errors import CompressoError, GateError, ResourceError

PLAIN = (dict, list, str, int, float, bool, type(None))
VALUE, TENSOR, ERROR = "value.json", "tensor.safetensors", "error.json"


def apart(code: str, job: dict[str, Any], *, path: Path, runtime: str, show: bool = False) -> Any:
    """What a function returns in a process of its own: a tensor, or plain values.

    code:    `module:function`.
    job:     its keyword arguments, as plain values.
    path:    the model it runs. runtime: what runs it. Both are for messages.
    show:    let the user see what it writes to stderr.

    Raises what it raises of compresso's own errors; GateError if the process is ended by a bad
    model, ResourceError if by lack of memory.
    """
    with tempfile.TemporaryDirectory(prefix="compresso-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "compresso.runtimes.process", code, folder],
            input=json.dumps(job),
            stdout=subprocess.DEVNULL,
            stderr=None if show else subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        place = Path(folder)
        if (place / ERROR).is_file():
            found = json.loads((place / ERROR).read_text(encoding="utf-8"))
            raise getattr(errors, found["kind"])(found["message"], hint=found["hint"])
        if done.returncode:
            _raise_ended(done.returncode, done.stderr or "", path, runtime)
        if (place / TENSOR).is_file():
            from compresso.checkpoint.directory import read_shard

            return read_shard(place / TENSOR, hint="run the command again")["tensor"].clone()
        return json.loads((place / VALUE).read_text(encoding="utf-8"))


def _raise_ended(code: int, said: str, path: Path, runtime: str) -> None:
    if code > 0:  # an exception that is a mistake of this program
        raise RuntimeError(f"running {path} in {runtime} failed:\n{said}")
    if -code == signal.SIGKILL:
        raise ResourceError(
            f"running `{path}` in {runtime} was killed, most likely for lack of memory",
            hint="close other programs, or use a machine with more memory",
        )
    if -code == signal.SIGTERM or -code == signal.SIGINT:
        raise KeyboardInterrupt
    lines = [line for line in said.splitlines() if line.strip()]
    last = f": {lines[-1].strip()}" if lines else ""
    name = signal.Signals(-code).name
    raise GateError(f"`{path}` makes {runtime} end with {name}{last}")


def _work(code: str, folder: Path) -> None:
    """What the process does: read the job from stdin, leave the result in `folder`."""
    module, _, name = code.partition(":")
    job = json.load(sys.stdin)
    try:
        result = getattr(import_module(module), name)(**job)
    except CompressoError as error:
        _refuse(folder, error)
        return
    except MemoryError:
        hint = "close other programs, or use a machine with more memory"
        _refuse(folder, ResourceError("there is not enough memory to run the model", hint=hint))
        return
    if isinstance(result, PLAIN):
        (folder / VALUE).write_text(json.dumps(result), encoding="utf-8")
        return
    from compresso.checkpoint.shard_file import write_safetensors

    with (folder / TENSOR).open("wb") as file:
        write_safetensors(file, {"tensor": result.contiguous()}, {"format": "pt"})


def _refuse(folder: Path, error: CompressoError) -> None:
    found = {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
    (folder / ERROR).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
