"""`compresso export` and its recipes: several formats, where they go, what goes on from them."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny

from compresso import pipeline, registry
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import DecilmSettings, DenseSettings
from compresso.recipe import load_recipe, make_step
from compresso.runtime import make_runtime
from compresso.settings import RuntimeSettings
from compresso.workspace import newest_checkpoint

FLOAT32 = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_several_formats_in_one_run(command, model):
    asked = ("export", model, "--format", "dense", "--format", "decilm", "--no-pack", *FLOAT32)
    code, out, err = command(*asked, "-o", "out")
    assert code == 0, err
    assert out.split() == ["out/dense", "out/decilm"]
    assert err.count("proved") == 2 and "kept" in err
    records = [json.loads(Path(path, "compresso.json").read_text()) for path in out.split()]
    assert [record["step"]["method"] for record in records] == ["dense", "decilm"]
    assert records[0]["key"] != records[1]["key"]
    # tokenizer and licence, byte for byte
    for name in ("tokenizer.json", "LICENSE"):
        assert Path("out/dense", name).read_bytes() == Path(model, name).read_bytes()
    code, out, err = command(*asked, "-o", "out", "--json")
    assert code == 0 and [one["reused"] for one in json.loads(out)] == [True, True]


def test_no_command_goes_on_from_an_export(command, model):
    code, out, err = command("export", model, "-f", "dense", "--no-verify", *FLOAT32)
    assert (code, out) == (0, "compresso-runs/01-export-dense\n"), err
    assert newest_checkpoint() is None
    assert (
        Checkpoint(Path("compresso-runs/01-export-dense")).provenance["report"]["summary"]["proved"]
        == "no"
    )


def test_options_go_to_the_formats_that_have_them(command, model):
    asked = ("export", model, "-f", "dense", "-f", "decilm", "--no-pack", "--merge-adapter")
    assert command(*asked, "--save-recipe", "saved.yaml")[0] == 0
    steps = load_recipe(Path("saved.yaml")).steps
    assert steps[0].settings == DenseSettings(merge_adapter=True)
    assert steps[1].settings == DecilmSettings(merge_adapter=True, pack=False)


REFUSED = {
    "no format": ((), "compresso export: name a format", "known: "),
    "unknown": (("-f", "dence"), "unknown export format `dence`", "did you mean `dense`?"),
    "twice": (("-f", "dense", "-f", "dense"), "a format is named twice", None),
    "an option of others": (
        ("-f", "dense", "-f", "decilm", "--bits", "4"),
        "`--bits` is no option of `dense`, `decilm`",
        "`compresso export --help` says which format has it",
    ),
    "an option of others alone": (
        ("-f", "dense", "--bits", "4"),
        "`--bits` is no option of `dense`",
        "`compresso export --help` says which format has it",
    ),
    "a value": (("-f", "decilm", "-f", "gguf", "--type", "q9"), "`type`", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, command, model):
    arguments, message, hint = REFUSED[case]
    code, out, err = command("export", model, *arguments)
    lines = [" ".join(line.split()) for line in err.splitlines()]
    assert code == 2 and out == ""
    assert any(line.startswith("error:") and message in line for line in lines), err
    assert hint is None or any(line.startswith("hint:") and hint in line for line in lines), err


def test_what_there_is_to_export_to(command, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("export", "--list")
    assert code == 0 and "…" not in out and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.replace("│", " ").split())
    assert all(f" {name} " in words for name in registry.stage("export").methods)
    assert "stored as `gguf`" in words and "vllm 0.33.0" in words
    assert f"`{model}` as it is" not in words
    found = json.loads(command("export", "--list", "--json")[1])
    assert set(found) == {"formats", "runtimes"}


def test_which_runtimes_load_a_model_as_it_is(command, model):
    out = command("export", model, "--list")[1]
    assert out.startswith(f"`{model}` as it is")
    assert "`compresso export --format gguf` first" in out.partition("formats")[0]
    found = json.loads(command("export", "-m", model, "--list", "--json")[1])
    assert found["model"]["transformers"]["loads"] == "dense"
    assert command("export", "nothing", "--list")[0] == 3


def test_two_models(command, model):
    code, _, err = command("export", model, "-m", model, "-f", "dense")
    assert code == 2 and "two models are given" in err


def test_a_format_is_named_by_either_word():
    named = make_step("export", {"format": "dense"}, where="test")
    assert named == make_step("export", {"method": "dense"}, where="test")
    # or by what only it has
    assert make_step("export", {"pack": False}, where="test").method == "decilm"
    with pytest.raises(ConfigError, match="give only one of `format`, `method`"):
        make_step("export", {"format": "dense", "method": "dense"}, where="test")
    with pytest.raises(ConfigError, match="`format` must be a name"):
        make_step("export", {"format": 4}, where="test")
    with pytest.raises(ConfigError, match="`export` format `dense` has no `bits`") as raised:
        make_step("export", {"format": "dense", "bits": 4}, where="test")
    assert raised.value.hint.startswith("formats that have it: compressed-tensors")
    assert registry.stage("export").leaves is None


def test_a_recipe_goes_on_from_what_came_before_an_export(tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\n"
        "stages:\n"
        "  - {stage: prune, drop: [3]}\n"
        "  - {stage: export, format: dense}\n"
        "  - {stage: quantize, method: rtn, bits: 4, group_size: 32}\n"
        "  - {stage: export, format: compressed-tensors}\n"
        "  - {stage: export, format: decilm}\n"
    )
    runtime = make_runtime(RuntimeSettings(device="cpu", dtype="float32"))
    outcomes = pipeline.run_recipe(load_recipe(recipe), tmp_path / "run", runtime)
    sources = [json.loads((o.path / "compresso.json").read_text())["source"] for o in outcomes]
    assert [Path(source["path"]).name for source in sources[1:]] == [
        "01-prune-manual",
        "01-prune-manual",
        "03-quantize-rtn",
        "03-quantize-rtn",
    ]
    assert [o.path.name for o in outcomes][1::2] == [
        "02-export-dense",
        "04-export-compressed-tensors",
    ]
    again = pipeline.run_recipe(load_recipe(recipe), tmp_path / "run", runtime)
    assert all(outcome.reused for outcome in again)
