"""A recipe: the YAML file that lists stages in order. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from compresso import registry
from compresso.config import build, fields
from compresso.errors import ConfigError
from compresso.gates import Gate, gate_texts, parse_gates
from compresso.quantize_for import restricted
from compresso.settings import TASK, CalibrationSettings, RuntimeSettings

KEYS = ("model", "calibration", "runtime", "stages")
SPELLED = {"for_runtime": "for"}  # settings whose key in a recipe is no name in Python
PATHS = ("dataset", "against", "original")  # settings that may be relative paths


@dataclass(frozen=True)
class Step:
    """One stage with its method, checked settings, and limits on what it measures."""

    stage: str
    method: str
    settings: Any
    gates: tuple[Gate, ...] = ()

    @property
    def name(self) -> str:
        """`stage-method`, as in the names of output directories."""
        return f"{self.stage}-{self.method}"

    def to_json(self) -> dict[str, Any]:
        """The recipe entry this step is, every default written out."""
        settings = {
            SPELLED.get(key, key): list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.settings).items()
        }
        entry = {"stage": self.stage, "method": self.method, **settings}
        if self.gates:
            entry["assert"] = gate_texts(self.gates)
        return entry


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `model` is a directory, a hub name, or `reference` for the bundled one."""

    model: str
    calibration: CalibrationSettings
    runtime: RuntimeSettings
    steps: tuple[Step, ...]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; no model or dataset is opened.

    Raises ConfigError naming the file, the line or stage, and the nearest right word.
    """
    values, lines = _read(path)
    _check_keys(values, KEYS, str(path))
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(
            f"{path}: `model` must be a directory or a hub name",
            hint="write `model: reference` for the bundled model",
        )
    stages = values.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ConfigError(
            f"{path}: `stages` must list at least one stage", hint="write `- {stage: eval}`"
        )
    steps = []
    for number, (entry, line) in enumerate(zip(stages, lines, strict=True), start=1):
        where = f"{path}: stage {number} (line {line})"
        if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
            known = ", ".join(registry.STAGES)
            raise ConfigError(f"{where}: needs `stage` and a name", hint=f"known: {known}")
        values_of_step = {key: value for key, value in entry.items() if key != "stage"}
        steps.append(make_step(entry["stage"], values_of_step, where=where))
        _check_order(steps, where)
    return Recipe(
        model=model,
        calibration=_section(CalibrationSettings, values, "calibration", path),
        runtime=_section(RuntimeSettings, values, "runtime", path),
        steps=tuple(steps),
    )


def make_step(stage: str, values: dict[str, Any], *, where: str) -> Step:
    """Check one stage's values.

    Without `method`, it is the first of the stage's methods that has all the keys given.

    Raises ConfigError naming `where` and the nearest right word.
    """
    methods = registry.stage(stage, where=where).methods
    values = registry.with_preset(stage, values, where=where)
    named = registry.stage(stage).named
    if named != "method" and named in values:
        if "method" in values:
            raise ConfigError(f"{where}: give only one of `{named}`, `method`")
        values["method"] = values.pop(named)
    values = {field_of(key): value for key, value in values.items()}
    gates: tuple[Gate, ...] = ()
    if stage == "eval" and "assert" in values:
        gates = parse_gates(values.pop("assert"), where=where)
    name = values.pop("method", None)
    if not isinstance(name, str | None):
        raise ConfigError(f"{where}: `{named}` must be a name", hint=f"known: {', '.join(methods)}")
    if name is None and named != "method" and not values:
        raise ConfigError(f"{where}: name a {named}", hint=f"known: {', '.join(methods)}")
    if name is None:
        accepting = (
            m for m, entry in methods.items() if set(values) <= set(fields(entry.settings))
        )
        name = next(accepting, next(iter(methods)))
    method = registry.method(stage, name, where=where)
    _check_step_keys(stage, name, values, where)
    if stage == "quantize":
        values = restricted(name, values, where=where)
    settings: Any = build(method.settings, values, where=where)
    for gate in gates:
        if gate.metric.startswith(TASK) and not settings.tasks:
            raise ConfigError(f"{where}: `{gate.metric}` in `assert` needs `tasks`")
    return Step(stage, name, settings, gates)


def field_of(key: str) -> str:
    """The setting that a key of a recipe stands for."""
    return next((field for field, spelled in SPELLED.items() if spelled == key), key)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` reads the same one back."""
    values = {
        "model": recipe.model,
        "calibration": asdict(recipe.calibration),
        "runtime": asdict(recipe.runtime),
        "stages": [step.to_json() for step in recipe.steps],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def locate(recipe: Recipe, beside: Path) -> tuple[Recipe, list[str]]:
    """The recipe with its relative paths found, and a line for each that was.

    A path is looked for in the current directory, then in the directory `beside`. What is found
    in neither may be the name of something on the hub, and is left as it is.
    """
    notes: list[str] = []

    def find(text: str) -> str:
        if Path(text).is_absolute() or text == "reference":
            return text
        if Path(text).exists():
            notes.append(f"`{text}` is in the current directory")
        elif (beside / text).exists():
            notes.append(f"`{text}` is beside the recipe")
            return str(beside / text)
        return text

    def find_in(record: Any) -> Any:
        named = {name: getattr(record, name, None) for name in PATHS}
        found: dict[str, Any] = {name: find(text) for name, text in named.items() if text}
        if tasks := getattr(record, "tasks", ()):
            files = (".yaml", ".yml")
            found["tasks"] = tuple(find(task) if task.endswith(files) else task for task in tasks)
        return replace(record, **found)

    located = replace(
        recipe,
        model=find(recipe.model),
        calibration=find_in(recipe.calibration),
        steps=tuple(replace(step, settings=find_in(step.settings)) for step in recipe.steps),
    )
    return located, list(dict.fromkeys(notes))


def _read(path: Path) -> tuple[dict[str, Any], list[int]]:
    """The file's mapping, and the line each entry of `stages` starts on."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_unique(root, path)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{path}: line {line}: not YAML: {error.problem}",
            hint="put a value that has `<`, `>`, `:` or `#` in quotes",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must have keys and values", hint=f"known: {', '.join(KEYS)}")
    nodes = {key.value: value for key, value in root.value}
    entries = nodes["stages"].value if isinstance(values.get("stages"), list) else []
    return values, [entry.start_mark.line + 1 for entry in entries]


def _check_unique(node: yaml.Node | None, path: Path) -> None:
    """Raises ConfigError for a key given twice: YAML itself keeps the last one silently."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_unique(child, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}: line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            raise ConfigError(f"{place}: a key must be a word")
        if key.value in seen:
            raise ConfigError(f"{place}: `{key.value}` is given twice")
        seen.add(key.value)
        _check_unique(value, path)


def _section(cls: type[Any], values: dict[str, Any], name: str, path: Path) -> Any:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"{path}: `{name}` must have keys and values", hint=f"known: {', '.join(fields(cls))}"
        )
    return build(cls, section, where=f"{path}: {name}")


def _check_keys(values: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key `{key}`", hint=hint)


def _check_step_keys(stage: str, method: str, values: dict[str, Any], where: str) -> None:
    """Raises ConfigError for a key that this method lacks, saying where it belongs if anywhere."""
    methods, named = registry.stage(stage).methods, registry.stage(stage).named
    for key in values:
        having = [name for name, entry in methods.items() if key in fields(entry.settings)]
        if method in having:
            continue
        if having:
            raise ConfigError(
                f"{where}: `{stage}` {named} `{method}` has no `{key}`",
                hint=f"{named}s that have it: {', '.join(having)}",
            )
        for section, cls in (("calibration", CalibrationSettings), ("runtime", RuntimeSettings)):
            if key in fields(cls):
                raise ConfigError(
                    f"{where}: `{key}` is not a setting of a stage",
                    hint=f"in a recipe it goes under `{section}:`, beside `stages:`",
                )
        known = [name for entry in methods.values() for name in fields(entry.settings)]
        extra = [*dict.fromkeys([named, "method"]), *(["assert"] if stage == "eval" else [])]
        extra += ["preset"] if registry.stage(stage).presets else []
        _check_keys({key: None}, tuple(dict.fromkeys([*extra, *known])), where)


def _check_order(steps: list[Step], where: str) -> None:
    """Raises ConfigError if the last step cannot read what those before it leave."""
    leaves = [registry.stage(step.stage).leaves or "" for step in steps[:-1]]
    weights = next((kind for kind in reversed(leaves) if kind not in ("", "same")), "dense")
    step = steps[-1]
    takes = registry.stage(step.stage).takes
    if takes not in ("any", weights):
        raise ConfigError(
            f"{where}: `{step.stage}` needs {takes} weights, but those before it leave"
            f" {weights} ones",
            hint=f"move `{step.stage}` before the stage that leaves {weights} weights",
        )
