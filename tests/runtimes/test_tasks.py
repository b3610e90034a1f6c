"""Tasks: the two that are shipped, those in files, and lm-eval's numbers in the report's table."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import keyword
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_checkpoint import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso.calibration.stdlib import stdlib_files
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, GateError, ResourceError
from compresso.recipe import load_recipe, locate, make_step
from compresso.report import comparison_table
from compresso.run import key_of, run_step
from compresso.runtime import make_runtime
from compresso.runtimes import memory, tasks
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.step_data import load_data
from compresso.tasks import documents

QUESTIONS = [{"context": "the quick brown", "target": f" {word}"} for word in ("fox", "dog", "a")]
FILE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: {kind}
test_split: train
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
doc_to_choice: [" fox", " dog"]
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tasks") / "tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A task of two choices: which the model finds likelier."""
    root = tmp_path_factory.mktemp("own")
    rows = [{"context": f"the quick brown {n}", "answer": n % 2} for n in range(6)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"name": "own-choice", "data": root / "rows.jsonl"}
    text = FILE.format(kind="multiple_choice", target="answer", **values)
    (root / "choice.yaml").write_text(text)
    return root / "choice.yaml"


@pytest.fixture
def here(monkeypatch):
    """Run tasks in this process, which is faster."""
    monkeypatch.setattr(tasks, "apart", lambda code, job, **_: tasks._work(**job))


@pytest.fixture
def held_out(monkeypatch):
    """A few files in place of the whole library."""
    files = [next(stdlib_files(held_out=True)) for _ in range(1)]
    code = "def measure(width, height):\n    area = width * height\n    return area\n\n"
    files.append(("made.py", code * 20))
    monkeypatch.setattr(documents, "stdlib_files", lambda held_out: iter(files))
    return dict(files)


def test_questions_have_their_answer_in_the_text(held_out):
    rows = documents.cloze()["test"]
    assert rows.to_list() == documents.cloze()["test"].to_list() and len(rows) > 5
    for row in rows:
        name = row["target"][1:]
        assert re.fullmatch(r"[A-Za-z_]\w{3,}", name) and not keyword.iskeyword(name)
        assert name in row["context"] and len(row["context"]) == documents.CONTEXT
        assert any(row["context"] + row["target"] in text for text in held_out.values())


def test_choices_are_four_names_of_the_text(held_out):
    rows = documents.choice()["test"]
    assert len(rows) > 5
    for row in rows:
        assert len({*row["choices"]}) == 4 and all(
            one[1:] in row["context"] for one in row["choices"]
        )
        asked = row["context"] + row["choices"][row["answer"]]
        assert any(asked in text for text in held_out.values())


def best_choice(model, rows):
    """Share of rows whose answer has the higher log-likelihood, by a direct computation."""
    tokenizer, right = AutoTokenizer.from_pretrained(model), []
    plain = AutoModelForCausalLM.from_pretrained(model)
    for row in rows:
        scores = []
        for choice in (" fox", " dog"):
            begin = len(tokenizer(row["context"])["input_ids"])
            ids = torch.tensor([tokenizer(row["context"] + choice)["input_ids"]])
            with torch.no_grad():
                logs = plain(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
            scores.append(float(logs.gather(-1, ids[0, begin:, None]).sum()))
        right.append(scores.index(max(scores)) == row["answer"])
    return sum(right) / len(right)


def test_numbers_are_those_of_a_direct_computation(model, file, here):
    rows = [json.loads(line) for line in (file.parent / "rows.jsonl").read_text().splitlines()]
    options = {"shots": None, "device": "cpu", "trust_remote_code": False}
    found = tasks.run_tasks(model, [str(file)], most=None, **options)
    share = best_choice(model, rows)
    error = (share * (1 - share) / 5) ** 0.5
    assert found["task_own_choice_acc"] == pytest.approx(share)
    assert found["task_own_choice_acc_se"] == pytest.approx(error)
    found = tasks.run_tasks(model, [str(file)], most=3, **options)
    assert found["task_own_choice_acc"] == pytest.approx(best_choice(model, rows[:3]))


def test_no_such_task(model, here, monkeypatch):
    """Its own list takes lm-eval long to read; ours are enough here."""
    from lm_eval import tasks as theirs

    short = functools.partial(theirs.TaskManager, include_path=str(tasks.SHIPPED))
    monkeypatch.setattr(
        theirs, "TaskManager", lambda include_path, include_defaults: short(include_defaults=False)
    )
    options = {"most": None, "shots": None, "device": "cpu", "trust_remote_code": False}
    with pytest.raises(ConfigError, match="there is no task `stdlib_clozes`") as caught:
        tasks._work(path=str(model), names=["stdlib_clozes"], threads=1, **options)
    assert "stdlib_cloze" in caught.value.hint


def test_a_task_of_lm_eval_is_found_without_its_list(monkeypatch):
    def no_list(include_path, include_defaults):
        assert not include_defaults
        return argparse.Namespace(all_tasks=[Path(place).name for place in include_path])

    monkeypatch.setattr("lm_eval.tasks.TaskManager", no_list)
    assert tasks._find_all(["hellaswag"])[1] == ["hellaswag"]
    assert tasks._folder("hellaswag").name == "hellaswag" and tasks._folder("hellaswa*") is None
    assert tasks._folder("mmlu_group_of_none") is None


def test_names_are_checked_before_anything_is_run(model, monkeypatch, capsys, tmp_path):
    looked = []

    def no(code, job, **_):
        looked.append((code, job))
        raise ConfigError("there is no task `hellaswagg`")

    monkeypatch.setattr(tasks, "apart", no)
    tasks.check_tasks(["stdlib_cloze", "hellaswag"])
    assert not looked
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    step, *rest = evaluation(model, tasks=["hellaswagg", "stdlib_cloze"])
    with pytest.raises(ConfigError, match="there is no task `hellaswagg`"):
        run_step(step, *rest, tmp_path / "a", runtime)
    assert looked == [("compresso.runtimes.tasks:_find", {"names": ["hellaswagg"]})]
    assert "looking for `hellaswagg` in all of lm-eval's tasks" in capsys.readouterr().err


def test_questions_that_cannot_be_had(model, file, here, tmp_path):
    text = file.read_text().replace("rows.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    options = {"most": None, "shots": None, "device": "cpu", "trust_remote_code": False}
    with pytest.raises(CheckpointError, match="tasks `own-choice` cannot be run: ") as caught:
        tasks.run_tasks(model, [str(tmp_path / "gone.yaml")], **options)
    assert "`stdlib_choice`, `stdlib_cloze` and local" in caught.value.hint


def evaluation(model, **values):
    step = make_step("eval", {"samples": 2, "length": 32, "speed": False, **values}, where="test")
    return step, Checkpoint(model), CalibrationSettings()


def test_in_one_table_with_perplexity(model, file, here, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    given = {"dataset": str(text), "tasks": [str(file)], "task_limit": 4}
    gates = {"assert": {"task_own_choice_acc": ">= 0"}}
    step, source, settings = evaluation(model, **given, **gates)
    report = run_step(step, source, settings, tmp_path / "a", runtime).report
    (row,) = report.rows
    assert {"ppl", "ppl_se", "task_own_choice_acc", "task_own_choice_acc_se"} <= set(row)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(comparison_table(report.rows, "eval"))
    words = console.export_text()
    shown = " ".join(words.replace("│", " ").split())
    assert f"own choice acc {row['task_own_choice_acc']:.4g} ± " in shown
    gates = {"assert": {"task_own_choice_acc": "> 1"}}
    step, *rest = evaluation(model, **given, **gates)
    with pytest.raises(GateError, match="`task_own_choice_acc > 1` fails"):
        run_step(step, *rest, tmp_path / "a", runtime)
    assert "reused" in capsys.readouterr().err


def test_the_questions_are_part_of_the_key(model, file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    own = tmp_path / "own.yaml"
    own.write_text(file.read_text())
    runtime = make_runtime(RuntimeSettings(device="cpu"))

    def key(**values):
        step, source, settings = evaluation(model, dataset=str(text), **values)
        return key_of(step, source, load_data(step, source, settings, runtime, tmp_path), runtime)

    before = key(tasks=[str(own)])
    assert before == key(tasks=[str(own)]) != key() and before != key(tasks=["stdlib_cloze"])
    own.write_text(file.read_text() + "num_fewshot: 0\n")
    assert key(tasks=[str(own)]) != before


def test_what_is_refused_before_anything_is_read(model, tmp_path, monkeypatch):
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    step, *rest = evaluation(model, tasks=["no-such.yaml"])
    with pytest.raises(CheckpointError, match=r"no task file `no-such\.yaml`"):
        run_step(step, *rest, tmp_path / "a", runtime)
    (tmp_path / "t.yaml").write_text("group: x\n")
    step, *rest = evaluation(model, tasks=[str(tmp_path / "t.yaml")])
    with pytest.raises(CheckpointError, match="has no `task:`"):
        run_step(step, *rest, tmp_path / "a", runtime)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="package `lm-eval`, which runs tasks") as caught:
        run_step(step, *rest, tmp_path / "a", runtime)
    assert caught.value.hint == "pip install 'compresso-llm[tasks]'"
    with pytest.raises(ConfigError, match="`task_limit` and `num_fewshot` need `tasks`"):
        evaluation(model, task_limit=3)
    with pytest.raises(ConfigError, match="`task_x_acc` in `assert` needs `tasks`"):
        evaluation(model, **{"assert": {"task_x_acc": "> 1"}})


def test_a_model_that_does_not_fit(model, file, tmp_path, monkeypatch):
    monkeypatch.setattr("compresso.stages.evaluate.shortage", lambda *_: "it is large")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    step, *rest = evaluation(model, dataset=str(text), tasks=[str(file)])
    with pytest.raises(ResourceError, match="is too large for tasks: it is large"):
        run_step(step, *rest, tmp_path / "a", runtime)
    assert memory.shortage(Checkpoint(model), torch.device("cpu")) is None


def test_files_beside_a_recipe(file, tmp_path):
    (tmp_path / "mine.yaml").write_text(file.read_text())
    (tmp_path / "recipe.yaml").write_text(
        "model: reference\nstages:\n  - {stage: eval, tasks: [mine.yaml, stdlib_cloze]}\n"
    )
    located, notes = locate(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    assert located.steps[0].settings.tasks == (str(tmp_path / "mine.yaml"), "stdlib_cloze")
    assert notes == ["`mine.yaml` is beside the recipe"]
