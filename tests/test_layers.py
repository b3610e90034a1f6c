"""The rules of the code base that a machine can check: imports, sizes, what is never written."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compresso

ROOT = Path(compresso.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# What the modules of a directory may import of compresso, besides their own directory.
KERNELS = {"errors"}
CHECKPOINT = {"", "errors", "kernels"}
MODELS = CHECKPOINT | {"checkpoint", "families"}
CALIBRATION = MODELS | {"models", "settings", "config", "runtime"}
RUNTIMES = MODELS | {"models", "runtime", "settings"}
STAGES = CALIBRATION | {
    "runtimes",
    "quantize_settings",
    "compensate_settings",
    "heal_settings",
    "export_settings",
    "quantize_for",
    "calibration",
    "training",
    "recipe",
    "registry",
    "methods",
    "report",
    "provenance",
    "proving",
}
ALLOWED = {
    "kernels": KERNELS,
    "checkpoint": CHECKPOINT,
    "models": MODELS,
    "calibration": CALIBRATION,
    "training": CALIBRATION | {"calibration"},
    "runtimes": RUNTIMES,
    "stages": STAGES | {"formats"},
    "formats": STAGES | {"export_settings"},
    "tasks": {"calibration"},
}
KERNEL_LIBRARIES = {
    "__future__",
    "torch",
    "math",
    "random",
    "typing",
    "dataclasses",
    "collections",
    "itertools",
    "functools",
    "concurrent",  # tiles on threads
    "json",  # grids that were computed once are data
    "pathlib",
}
# Only these know transformers' models; the others load checkpoints as users do.
KNOW_TRANSFORMERS = (
    "models/",
    "checkpoint/proof.py",
    "checkpoint/reload.py",
    "runtimes/transformers",
    "runtime.py",
)
# What runs a model, or shows what a stage found.
VIEWS = ("cli.py", "model_commands.py", "text_commands.py", "report.py")
# Part of checkpoints, with the file beside it that it imports.
SHIPPED = "models/modeling_compresso.py"
LIGHT = (
    "cli",
    "commands",
    "options",
    "recipe",
    "gates",
    "settings",
    "depth_settings",
    "fold_settings",
    "quantize_settings",
    "target_settings",
    "compensate_settings",
    "heal_settings",
    "export_command",
    "push_command",
    "card",
    "loading",
    "push",
    "quantize_for",
    "runtimes.table",
    "model_commands",
    "text_commands",
    "export_settings",
    "export_methods",
    "registry",
    "config",
    "workspace",
    "provenance",
    "listing",
    "families",
    "report",
    "runtime",
    "__main__",
)


def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(file):
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if file == SHIPPED and node.level == 1:  # as it must, to find its neighbour anywhere
                yield f"compresso.models.{node.module}"
                continue
            assert node.level == 0, f"{file} imports relatively"
            if node.module == "compresso":
                yield from (f"compresso.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("file", [file for file in FILES if "/" in file])
def test_a_layer_imports_only_what_is_below_it(file):
    layer = file.split("/")[0]
    own = {
        name.split(".")[1] if "." in name else ""
        for name in imported(file)
        if name.split(".")[0] == "compresso"
    }
    assert own - {layer, "__version__"} <= ALLOWED[layer]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("kernels/")])
def test_kernels_are_mathematics(file):
    libraries = {name.split(".")[0] for name in imported(file)} - {"compresso"}
    assert libraries <= KERNEL_LIBRARIES


@pytest.mark.parametrize("file", FILES)
def test_few_know_transformers(file):
    if not file.startswith(KNOW_TRANSFORMERS):
        assert "transformers" not in {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("file", FILES)
def test_stages_are_reached_through_the_registry(file):
    """What is not a stage knows none; but for the views, which show what one found."""
    if not file.startswith("stages/") and file not in VIEWS:
        assert not any(name.startswith("compresso.stages") for name in imported(file))


def test_light_modules_import_nothing_heavy():
    imports = ", ".join(f"compresso.{module}" for module in LIGHT)
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import {imports}, sys; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("file", FILES)
def test_environment_is_read_in_one_place(file):
    names = {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
    if file != "runtime.py":
        assert not names & {"environ", "getenv", "putenv"}


@pytest.mark.parametrize("file", FILES)
def test_sizes(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            arguments = node.args.posonlyargs + node.args.args
            own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            assert len(own) <= 6, node.name


@pytest.mark.parametrize("file", FILES)
def test_importing_only_defines(file):
    for node in tree(file).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        else:
            assert isinstance(
                node,
                ast.Import
                | ast.ImportFrom
                | ast.Assign
                | ast.AnnAssign
                | ast.FunctionDef
                | ast.ClassDef,
            ), ast.unparse(node)


@pytest.mark.parametrize("file", FILES)
def test_what_is_never_written(file):
    for node in ast.walk(tree(file)):
        assert not isinstance(node, ast.Global), "global"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), node.lineno
        if isinstance(node, ast.Name):
            assert node.id != "NotImplementedError", node.lineno
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "TO" + "DO" not in text and "FIX" + "ME" not in text


@pytest.mark.parametrize("file", FILES)
def test_public_functions_and_classes_say_what_they_are(file):
    module = tree(file)
    if module.body:
        assert ast.get_docstring(module), "module"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_test_is_skipped():
    for path in Path(__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pytest." + "skip" not in text and "mark." + "skip" not in text, path
