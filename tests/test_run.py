"""Running steps: keys, reuse, proof, gates, interruption, and whole recipes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import BLOCKS, save_tiny

from compresso import pipeline, preflight, proving, registry, run
from compresso.checkpoint.proof import ProofReport
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import (
    CheckpointError,
    ConfigError,
    GateError,
    Interrupted,
    ResourceError,
)
from compresso.pipeline import run_recipe
from compresso.provenance import lineage, read_record
from compresso.recipe import Recipe, load_recipe, make_step
from compresso.report import Report, rows_to_csv
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return str(path)


@pytest.fixture(scope="module")
def runtime():
    return make_runtime(RuntimeSettings(device="cpu", dtype="float32"))


@pytest.fixture
def calibration(text):
    return CalibrationSettings(dataset=text, samples=4, length=32)


@pytest.fixture
def calls(monkeypatch):
    """The names of the stages that really run."""
    names = []
    load = registry.load

    def counting(code):
        if code in {stage.code for stage in registry.STAGES.values()}:
            names.append(code.rpartition(":")[2])
        return load(code)

    monkeypatch.setattr(registry, "load", counting)
    return names


def prune(drop=(1,)):
    return make_step("prune", {"drop": list(drop)}, where="test")


def evaluate(text, **values):
    given = {"dataset": text, "samples": 2, "length": 32, "speed": False, **values}
    return make_step("eval", given, where="test")


def test_a_checkpoint_and_its_record(model, calibration, runtime, tmp_path):
    target = tmp_path / "runs" / "out"
    outcome = run_step(prune(), Checkpoint(model), calibration, target, runtime)
    assert outcome.path == target and not outcome.reused
    assert not target.with_name("out.partial").exists()
    written, record = Checkpoint(target), read_record(target)
    assert written.config["num_hidden_layers"] == BLOCKS - 1
    assert written.key == record["key"] == outcome.key
    given = {key: value for key, value in record["step"].items() if value is not None}
    assert given == {"stage": "prune", "method": "manual", "drop": [1]}
    assert record["source"] == {"path": str(model.resolve()), "key": Checkpoint(model).key}
    assert record["calibration"] is None and record["parent"] is None
    assert record["report"] == json.loads(json.dumps(outcome.report.to_json()))
    assert set(record["versions"]) == {"compresso", "python", "torch", "transformers"}
    assert record["proof"]["difference"] <= record["proof"]["tolerance"]
    assert len(record["fingerprint"]["tokens"]) == len(record["fingerprint"]["top_tokens"])
    assert (target / "compresso-report.csv").read_text() == rows_to_csv(outcome.report.rows)
    assert (target / "LICENSE").read_bytes() == (model / "LICENSE").read_bytes()


def test_finished_work_is_reused_by_key(model, calibration, runtime, tmp_path, calls, capsys):
    target = tmp_path / "out"
    first = run_step(prune(), Checkpoint(model), calibration, target, runtime)
    capsys.readouterr()
    again = run_step(prune(), Checkpoint(model), calibration, target, runtime)
    assert calls == ["prune"]
    assert again.reused and again.key == first.key
    assert again.report.rows == json.loads(json.dumps(first.report.rows))
    assert "reused" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="with other settings"):
        run_step(prune([2]), Checkpoint(model), calibration, target, runtime)
    assert calls == ["prune"]


def test_the_key_is_made_of_all_that_decides_the_result(
    model, calibration, runtime, text, tmp_path
):
    source = Checkpoint(model)
    step = make_step("prune", {"blocks": 1}, where="test")
    data = run.load_data(step, source, calibration, runtime, tmp_path)
    base = run.key_of(step, source, data, runtime)
    other_data = run.load_data(step, source, replace(calibration, seed=1), runtime, tmp_path)
    longer = make_step("prune", {"blocks": 2}, where="test")
    half = replace(runtime, dtype=torch.bfloat16)
    keys = {
        base,
        run.key_of(longer, source, data, runtime),
        run.key_of(step, source, other_data, runtime),
        run.key_of(step, source, data, half),
    }
    assert len(keys) == 4
    same = run.load_data(step, source, replace(calibration, batch_size=2), runtime, tmp_path)
    assert run.key_of(step, source, same, runtime) == base
    gated = evaluate(text, **{"assert": {"ppl": "< 9"}})
    assert run.key_of(gated, source, data, runtime) == run.key_of(
        evaluate(text), source, data, runtime
    )


def test_a_failed_proof_publishes_nothing(model, calibration, runtime, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise GateError("it differs")

    target = tmp_path / "out"
    monkeypatch.setattr(proving, "prove", fail)
    with pytest.raises(GateError, match="it differs") as caught:
        run_step(prune(), Checkpoint(model), calibration, target, runtime)
    assert caught.value.hint == f"nothing was published; `{target}.partial` is kept to look at"
    assert not target.exists() and (tmp_path / "out.partial" / "config.json").exists()
    # Once the reason is gone, the same command goes on from there.
    monkeypatch.undo()
    assert not run_step(prune(), Checkpoint(model), calibration, target, runtime).reused
    assert target.exists()


def test_a_wrong_weight_fails_the_proof(model, calibration, runtime, tmp_path, monkeypatch):
    commit = CheckpointWriter.commit

    def damaged(self, part, tensors, report, **beside):
        commit(self, part, {name: tensor * 1.5 for name, tensor in tensors.items()}, report)

    monkeypatch.setattr(CheckpointWriter, "commit", damaged)
    with pytest.raises(GateError, match="is not the model it was in memory"):
        run_step(prune(), Checkpoint(model), calibration, tmp_path / "out", runtime)
    assert not (tmp_path / "out").exists()


def test_the_proof_is_told_what_it_needs(model, calibration, runtime, tmp_path, monkeypatch):
    told = {}

    def note(path, fingerprint, **options):
        told.update(options, path=path)
        return ProofReport(0.0, 1.0, 1.0, 0.0, 16)

    monkeypatch.setattr(proving, "prove", note)
    run_step(prune(), Checkpoint(model), calibration, tmp_path / "out", runtime)
    assert told["dtype"] == torch.float32 and told["device"] == runtime.device
    assert told["path"] == tmp_path / "out.partial" and told["trust_remote_code"] is False


def test_interrupted_work_is_kept(model, calibration, runtime, tmp_path, monkeypatch):
    commit = CheckpointWriter.commit

    def interrupted(self, part, tensors, report, **beside):
        if part == 2:
            raise KeyboardInterrupt
        commit(self, part, tensors, report, **beside)

    target = tmp_path / "out"
    monkeypatch.setattr(CheckpointWriter, "commit", interrupted)
    with pytest.raises(Interrupted, match="2 finished parts are saved") as caught:
        run_step(prune(), Checkpoint(model), calibration, target, runtime)
    assert caught.value.exit_code == 130 and "same command" in str(caught.value.hint)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="different run"):
        run_step(prune([0]), Checkpoint(model), calibration, target, runtime)
    run_step(prune([0]), Checkpoint(model), calibration, target, runtime, fresh=True)
    assert read_record(target)["step"]["drop"] == [0]


def test_a_report_is_published_whole_or_not_at_all(
    model, text, calibration, runtime, tmp_path, monkeypatch
):
    target = tmp_path / "report"

    def interrupted(source, step, data, directory, runtime):
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "load", lambda code: interrupted)
    with pytest.raises(Interrupted, match="starts again"):
        run_step(evaluate(text), Checkpoint(model), calibration, target, runtime)
    assert list(tmp_path.iterdir()) == []

    def measures(source, step, data, directory, runtime):
        (directory / "plot.png").write_text("x")
        return Report(summary={"ppl": 7.5}, rows=[{"a": 1}, {"b": 2}], warnings=["mind this"])

    monkeypatch.setattr(registry, "load", lambda code: measures)
    run_step(evaluate(text), Checkpoint(model), calibration, target, runtime)
    assert {path.name for path in target.iterdir()} == {
        "plot.png",
        "compresso.json",
        "compresso-report.csv",
    }
    assert (target / "compresso-report.csv").read_text() == "a,b\n1,\n,2\n"
    assert read_record(target)["calibration"]["split"] == "held out"


def test_gates_are_checked_after_the_report_is_written(
    model, text, calibration, runtime, tmp_path, monkeypatch, capsys
):
    ran = []

    def measures(source, step, data, directory, runtime):
        ran.append(step)
        return Report(summary={"ppl": 7.5})

    monkeypatch.setattr(registry, "load", lambda code: measures)
    target = tmp_path / "report"
    strict = evaluate(text, **{"assert": {"ppl": "< 7"}})
    for _ in range(2):
        with pytest.raises(GateError, match=r"`ppl < 7` fails: `ppl` is 7.5"):
            run_step(strict, Checkpoint(model), calibration, target, runtime)
        assert read_record(target)["report"]["summary"]["ppl"] == 7.5
    loose = evaluate(text, **{"assert": {"ppl": "< 8"}})
    assert run_step(loose, Checkpoint(model), calibration, target, runtime).reused
    assert len(ran) == 1


def test_an_output_that_cannot_be_written(model, text, calibration, runtime, tmp_path):
    (tmp_path / "file").write_text("x")
    for step in (prune(), evaluate(text)):
        with pytest.raises(ResourceError, match="cannot"):
            run_step(step, Checkpoint(model), calibration, tmp_path / "file" / "x", runtime)


def test_an_output_inside_its_source_is_refused(calibration, runtime, tmp_path):
    source = save_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="is inside"):
        run_step(prune(), Checkpoint(source), calibration, source / "out", runtime)


def test_an_unknown_architecture_is_refused_before_any_text_is_read(model, runtime, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(model, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    nowhere = CalibrationSettings(dataset=str(tmp_path / "absent.txt"))
    step = make_step("prune", {"blocks": 1}, where="test")
    with pytest.raises(ConfigError, match="unheard_of"):
        run_step(step, Checkpoint(source), nowhere, tmp_path / "out", runtime)


def test_what_does_not_fit_is_refused(model, calibration, runtime, tmp_path, monkeypatch):
    source = Checkpoint(model)
    step = make_step("prune", {"ratio": 0.2}, where="test")
    needed = preflight.smallest_output(step, source)
    assert needed == int(source.stored_bytes * 0.8)
    usage = shutil.disk_usage(tmp_path)
    full = lambda path: usage._replace(free=needed - 1)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(ResourceError, match="needs at least"):
        run_step(step, source, calibration, tmp_path / "out", runtime)
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="one block of `"):
        run_step(step, source, calibration, tmp_path / "out", runtime)
    assert not any(tmp_path.iterdir())


def test_packed_weights_need_their_package(model, calibration, runtime, tmp_path, monkeypatch):
    step = make_step("quantize", {"method": "rtn"}, where="test")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="compressed-tensors") as caught:
        run_step(step, Checkpoint(model), calibration, tmp_path / "out", runtime)
    assert caught.value.hint == "pip install 'compresso-llm[packed]'"


def test_quantized_weights_are_not_compressed_again(model, calibration, runtime, tmp_path):
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    run_step(prune(), Checkpoint(model), calibration, pruned, runtime)
    quantize = make_step("quantize", {"method": "rtn", "group_size": 16}, where="test")
    run_step(quantize, Checkpoint(pruned), calibration, packed, runtime)
    names = [ancestor.name for ancestor in lineage(Checkpoint(packed))]
    assert names == ["original", "prune-manual", "quantize-rtn"]
    for step in (quantize, prune()):
        with pytest.raises(ConfigError, match="needs dense weights") as caught:
            run_step(step, Checkpoint(packed), calibration, tmp_path / "again", runtime)
        assert caught.value.hint == f"pass the one it was made from: `{pruned}`"


@pytest.fixture
def recipe(model, text, calibration):
    return Recipe(
        str(model),
        calibration,
        RuntimeSettings(device="cpu", dtype="float32"),
        (prune([0]), prune([1]), evaluate(text)),
    )


def test_a_recipe_runs_once(recipe, runtime, tmp_path, calls):
    directory = tmp_path / "run"
    outcomes = run_recipe(recipe, directory, runtime)
    assert [outcome.path.name for outcome in outcomes] == [
        "01-prune-manual",
        "02-prune-manual",
        "03-eval-standard",
    ]
    assert calls == ["prune", "prune", "evaluate"]
    assert Checkpoint(outcomes[1].path).config["num_hidden_layers"] == BLOCKS - 2
    assert load_recipe(directory / "compresso-recipe.yaml") == recipe
    again = run_recipe(recipe, directory, runtime)
    assert all(outcome.reused for outcome in again) and len(calls) == 3
    assert [outcome.key for outcome in again] == [outcome.key for outcome in outcomes]


def test_a_recipe_goes_on_after_the_last_finished_step(recipe, runtime, tmp_path, calls):
    directory = tmp_path / "run"
    run_recipe(replace(recipe, steps=recipe.steps[:1]), directory, runtime)
    outcomes = run_recipe(recipe, directory, runtime)
    assert [outcome.reused for outcome in outcomes] == [True, False, False]
    assert calls == ["prune", "prune", "evaluate"]


def test_only_intermediate_checkpoints_of_the_run_are_deleted(recipe, runtime, tmp_path, calls):
    directory = tmp_path / "run"
    stranger = directory / "00-mine"
    stranger.mkdir(parents=True)
    (stranger / "config.json").write_text("{}")
    outcomes = run_recipe(recipe, directory, runtime, keep_last=True)
    left = sorted(path.name for path in directory.iterdir())
    assert left == ["00-mine", "02-prune-manual", "03-eval-standard", "compresso-recipe.yaml"]
    # What is gone but led to what is there counts as done, with or without the option.
    for keep_last in (True, False):
        again = run_recipe(recipe, directory, runtime, keep_last=keep_last)
        assert [outcome.key for outcome in again] == [outcome.key for outcome in outcomes]
        assert all(outcome.reused for outcome in again)
    assert len(calls) == 3 and sorted(path.name for path in directory.iterdir()) == left
    # If something is left to do, it is made again.
    longer = replace(recipe, steps=(*recipe.steps, prune([0])))
    shutil.rmtree(directory / "02-prune-manual")
    run_recipe(longer, directory, runtime, keep_last=True)
    assert len(calls) == 3 + 3


def test_a_failed_gate_stops_a_recipe(recipe, text, runtime, tmp_path, calls):
    strict = evaluate(text, **{"assert": {"ppl": "< 1"}})
    gated = replace(recipe, steps=(recipe.steps[0], strict, recipe.steps[1]))
    for _ in range(2):
        with pytest.raises(GateError, match="`ppl < 1` fails"):
            run_recipe(gated, tmp_path / "run", runtime)
    assert calls == ["prune", "evaluate"]
    assert not (tmp_path / "run" / "03-prune-manual").exists()


def test_a_recipe_that_cannot_be_written(recipe, runtime, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        run_recipe(recipe, tmp_path / "file", runtime)


def test_text_is_read_once_for_all_steps(recipe, runtime, tmp_path, monkeypatch):
    read = []
    load = pipeline.load_data
    monkeypatch.setattr(
        pipeline, "load_data", lambda step, *rest: read.append(step.name) or load(step, *rest)
    )
    steps = (
        make_step("prune", {"blocks": 1}, where="test"),
        make_step("prune", {"method": "contiguous", "blocks": 1}, where="test"),
        recipe.steps[2],
    )
    run_recipe(replace(recipe, steps=steps), tmp_path / "run", runtime)
    assert read == ["prune-shortgpt", "eval-standard"]
