"""Put the questions of lm-eval's tasks to a checkpoint, in transformers."""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import logging
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import compresso
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.models.tokenizer import Tokenizer
from compresso.runtime import log
from compresso.runtimes.process import apart
from compresso.runtimes.transformers import open_model
from compresso.settings import TASK

SHIPPED = Path(compresso.__file__).parent / "tasks"
ENDINGS = (".yaml", ".yml")
BATCH = 8
BOOTSTRAPS = 1000  # draws for standard errors that have no formula
NAME = re.compile(r"^task:\s*[\"']?([\w.-]+)", re.MULTILINE)


def check_tasks(names: Sequence[str]) -> None:
    """See that there are such tasks, before anything is run.

    Raises ResourceError if lm-eval is not installed, CheckpointError if a file is not a task,
    ConfigError if there is no task of a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "package `lm-eval`, which runs tasks, is not installed",
            hint="pip install 'compresso-llm[tasks]'",
        )
    for name in names:
        task_name(name)
    if rest := [name for name in names if _folder(name) is None]:
        log(f"looking for {', '.join(f'`{name}`' for name in rest)} in all of lm-eval's tasks")
        apart(f"{__name__}:_find", {"names": rest}, path=Path(rest[0]), runtime="lm-eval")


def task_name(given: str) -> str:
    """The name of a task that is given by that, or by its YAML file. Raises as `check_tasks`."""
    if not given.endswith(ENDINGS):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no task file `{given}`")
    found = NAME.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise CheckpointError(f"`{given}` has no `task:`, the name of the task")
    return found[1]


def tasks_key(names: Sequence[str]) -> str:
    """A hash of all that decides which questions are asked, so far as it is on this machine."""
    parts = [version("lm-eval")]
    for name in names:
        parts.append(name)
        if name.endswith(ENDINGS):
            folder = Path(name).expanduser().parent
            files = [file for file in sorted(folder.iterdir()) if file.is_file()]
            parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        elif (SHIPPED / f"{name}.yaml").is_file():
            parts.append(platform.python_version())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run_tasks(
    path: Path,
    names: Sequence[str],
    *,
    most: int | None,
    shots: int | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    """What a checkpoint achieves, in a process of its own: `task_NAME_METRIC`, errors under `_se`.

    names: of tasks that compresso ships or lm-eval knows, or YAML files.
    most:  questions of each task, the first; all if None.
    shots: examples before each question; as the task says if None.

    Raises ConfigError if there is no such task, CheckpointError if its questions or a tokenizer
    cannot be had, GateError if the checkpoint does not load and run, ResourceError if memory is
    short.
    """
    job = {
        "path": str(path),
        "names": list(names),
        "most": most,
        "shots": shots,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "threads": torch.get_num_threads(),
    }
    found: dict[str, float] = apart(
        f"{__name__}:_work", job, path=path, runtime="lm-eval", show=sys.stderr.isatty()
    )
    return found


def _work(
    *,
    path: str,
    names: list[str],
    most: int | None,
    shots: int | None,
    device: str,
    trust_remote_code: bool,
    threads: int,
) -> dict[str, float]:
    torch.set_num_threads(threads)
    manager, known = _find_all(names)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = Tokenizer.open(Checkpoint(Path(path)), trust_remote_code=trust_remote_code)
    model = open_model(Path(path), device=device, trust_remote_code=trust_remote_code)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer.inner, backend="causal", batch_size=BATCH)
    try:
        found = simple_evaluate(
            wrapped,
            tasks=known,
            task_manager=manager,
            num_fewshot=shots,
            limit=most,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except (OSError, ValueError, LookupError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        shipped = ", ".join(f"`{file.stem}`" for file in sorted(SHIPPED.glob("*.yaml")))
        raise CheckpointError(
            f"tasks {', '.join(f'`{name}`' for name in known)} cannot be run: {first}",
            hint=f"offline? {shipped} and local task files need no download",
        ) from error
    return _values(found["results"])


def _find(*, names: list[str]) -> None:
    """Raises ConfigError if there is no task of a name."""
    _find_all(names)


def _find_all(names: list[str]) -> tuple[Any, list[str]]:
    """lm-eval's list of tasks, with those that are asked for in it, and their names.

    Raises ConfigError if one is not there.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    folders = [_folder(name) for name in names]
    places = list(dict.fromkeys(str(folder) for folder in (SHIPPED, *folders) if folder))
    manager = TaskManager(include_path=places, include_defaults=None in folders)
    known = [task_name(name) for name in names]
    for name in known:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"did you mean `{near[0]}`?" if near else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"there is no task `{name}`", hint=hint)
    return manager, known


def _folder(name: str) -> Path | None:
    """Where a task is defined; None if only lm-eval's list says that.

    To read that, with its 14000 files, takes lm-eval long, and most tasks have a file of their
    name.
    """
    if name.endswith(ENDINGS):
        return Path(name).expanduser().resolve().parent
    if (SHIPPED / f"{name}.yaml").is_file():
        return SHIPPED
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.origin is not None  # `check_tasks` has looked
    theirs = Path(found.origin).parent / "tasks"
    for file in theirs.rglob(f"{glob.escape(name)}.yaml"):
        said = NAME.search(file.read_text(encoding="utf-8", errors="replace"))
        if said is not None and said[1] == name:
            return file.parent
    return None


def _values(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of lm-eval's results, which are under `metric,filter`, by key of a row."""
    values: dict[str, float] = {}
    for task, measured in results.items():
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = metric.endswith("_stderr")
            words = [task, metric.removesuffix("_stderr")] + ([] if kind == "none" else [kind])
            name = TASK + re.sub(r"\W+", "_", "_".join(words))
            values[f"{name}_se" if error else name] = float(value)
    return values
