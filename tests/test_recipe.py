"""Recipes: what is accepted, what is refused and how it says so, and what is written back."""

import pytest

from compresso import registry
from compresso.depth_settings import ContiguousSettings, ShortGptSettings
from compresso.errors import ConfigError, GateError
from compresso.gates import Gate, check_gates, gate_texts, parse_gates, split_limits
from compresso.quantize_settings import GptqSettings
from compresso.recipe import Recipe, dump_recipe, load_recipe, locate, make_step
from compresso.settings import (
    CalibrationSettings,
    EvalSettings,
    RuntimeSettings,
)

GOOD = """
model: org/name@abc
calibration: {dataset: c4, samples: 16, length: 128, seed: 3}
runtime: {device: cpu, max_memory: 1GB}
stages:
  - {stage: analyze, tokens: last}
  - {stage: prune, method: contiguous, ratio: 0.25}
  - {stage: prune, drop: [3, 4]}
  - {stage: quantize, bits: 3, ignore: ["re:.*mlp", lm_head]}
  - {stage: eval, assert: {ppl_ratio: "< 1.3", kl: "> 0, <= 0.25"}}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: "), caught.value.hint


def stages(text):
    return f"model: m\nstages:\n  - {text}\n"


def test_a_recipe_is_read(written):
    recipe = load_recipe(written(GOOD))
    assert recipe.model == "org/name@abc"
    assert recipe.calibration == CalibrationSettings(dataset="c4", samples=16, length=128, seed=3)
    assert recipe.runtime == RuntimeSettings(device="cpu", max_memory="1GB")
    assert [step.name for step in recipe.steps] == [
        "analyze-similarity",
        "prune-contiguous",
        "prune-manual",
        "quantize-gptq",
        "eval-standard",
    ]
    assert recipe.steps[1].settings == ContiguousSettings(ratio=0.25)
    assert recipe.steps[3].settings == GptqSettings(bits=3, ignore=("re:.*mlp", "lm_head"))
    assert recipe.steps[4].gates == (
        Gate("ppl_ratio", "<", 1.3),
        Gate("kl", ">", 0.0),
        Gate("kl", "<=", 0.25),
    )


def test_what_is_written_is_read_back(written):
    recipe = load_recipe(written(GOOD))
    text = dump_recipe(recipe)
    assert load_recipe(written(text)) == recipe
    # Every default is there to be seen and changed.
    assert "damping: 0.01" in text and "batch_size: null" in text


def test_only_the_model_and_stages_are_needed(written):
    recipe = load_recipe(written("model: reference\nstages: [{stage: eval}]"))
    step = make_step("eval", {}, where="test")
    assert recipe == Recipe("reference", CalibrationSettings(), RuntimeSettings(), (step,))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "must have keys and values", "known: model, "),
        ("- a", "must have keys and values", "known: model, "),
        ("just words", "must have keys and values", "known: model, "),
        ("model: [a\nstages: 3", "line 2: not YAML: ", "in quotes"),
        ("model: \x07", "not YAML: ", None),
        ("model: m\nmodel: n", "line 2: `model` is given twice", None),
        ("model: m\n? [a]\n: b", "line 2: a key must be a word", None),
        ("modl: m", "unknown key `modl`", "did you mean `model`?"),
        ("nonsense: m", "unknown key `nonsense`", "known: model, calibration"),
        ("stages: [{stage: eval}]", "`model` must be a directory or a hub name", "reference"),
        ("model: 3\nstages: [{stage: eval}]", "`model` must be", "reference"),
        ("model: m", "`stages` must list at least one stage", "- {stage: eval}"),
        ("model: m\nstages: []", "`stages` must list at least one stage", "- {stage: eval}"),
        ("model: m\nstages: {stage: eval}", "`stages` must list", "- {stage: eval}"),
        (stages("eval"), "stage 1 (line 3): needs `stage` and a name", "known: analyze"),
        (stages("{method: rtn}"), "stage 1 (line 3): needs `stage` and a name", "known: analyze"),
        (stages("{stage: quantise}"), "unknown stage `quantise`", "did you mean `quantize`?"),
        (stages("{stage: eval, method: 3}"), "`method` must be a name", "known: standard"),
        (
            stages("{stage: quantize, method: gptqq}"),
            "unknown quantize method `gptqq`",
            "did you mean `gptq`?",
        ),
        (
            stages("{stage: quantize, group-size: 8}"),
            "unknown key `group-size`",
            "did you mean `group_size`?",
        ),
        (stages("{stage: quantize, bits: 4, bits: 3}"), "line 3: `bits` is given twice", None),
        (stages("{stage: quantize, bits: 5}"), "`bits`: input should be 2, 3, 4 or 8", None),
        (stages("{stage: quantize, bits: four}"), "`bits`: input should be", None),
        (
            stages("{stage: quantize, group_size: 12}"),
            "`group_size` must be -1 or a multiple",
            None,
        ),
        (stages("{stage: prune}"), "give one of `ratio`, `blocks`", None),
        (
            stages("{stage: prune, ratio: 0.1, blocks: 2}"),
            "give only one of `ratio`, `blocks`",
            None,
        ),
        (stages("{stage: prune, ratio: 1.5}"), "`ratio`: input should be less than 1", None),
        (
            stages("{stage: quantize, method: rtn, damping: 0.1}"),
            "`quantize` method `rtn` has no `damping`",
            "methods that have it: gptq",
        ),
        (
            stages("{stage: quantize, samples: 3}"),
            "`samples` is not a setting of a stage",
            "under `calibration:`",
        ),
        (
            stages("{stage: quantize, device: cpu}"),
            "`device` is not a setting of a stage",
            "under `runtime:`",
        ),
        (
            stages("{stage: prune, blocks: 1, assert: {kl: '< 1'}}"),
            "unknown key `assert`",
            "known:",
        ),
        (stages("{stage: eval, assert: '< 1'}"), "`assert` must map metrics to limits", "ppl"),
        (
            stages("{stage: eval, assert: {ppl_rato: '< 1'}}"),
            "unknown metric `ppl_rato`",
            "did you mean `ppl_ratio`?",
        ),
        (stages("{stage: eval, assert: {speed: '< 1'}}"), "unknown metric `speed`", "known: ppl"),
        (stages("{stage: eval, assert: {kl: 0.3}}"), "`0.3` is not a limit for `kl`", "< 1.3"),
        (stages("{stage: eval, assert: {kl: '< a'}}"), "`< a` is not a limit for `kl`", "< 1.3"),
        (
            "model: m\ncalibration: {sample: 3}\nstages: [{stage: eval}]",
            "calibration: unknown key `sample`",
            "did you mean `samples`?",
        ),
        (
            "model: m\ncalibration: c4\nstages: [{stage: eval}]",
            "`calibration` must have keys and values",
            "known: dataset",
        ),
        (
            "model: m\nruntime: {dtype: int8}\nstages: [{stage: eval}]",
            "runtime: `dtype`: input should be 'auto'",
            None,
        ),
        (
            "model: m\nstages:\n  - {stage: quantize}\n  - {stage: eval}\n  - {stage: quantize}\n",
            "stage 3 (line 5): `quantize` needs dense weights, but those before it leave quantized",
            "move `quantize` before",
        ),
        (
            "model: m\nstages:\n  - {stage: quantize}\n  - {stage: prune, blocks: 1}\n",
            "stage 2 (line 4): `prune` needs dense weights",
            "move `prune` before",
        ),
    ],
)
def test_mistakes_are_named(written, text, message, hint):
    said, hinted = refused(written(text))
    assert message in said
    assert hint is None or hint in hinted


def test_a_file_that_cannot_be_read(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml")[0]
    assert "Is a directory" in refused(tmp_path)[0]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    assert refused(binary)[0] == "is not UTF-8 text"


def test_the_method_follows_from_the_keys():
    assert make_step("prune", {"drop": [1]}, where="x").method == "manual"
    assert make_step("prune", {"ratio": 0.1}, where="x").settings == ShortGptSettings(ratio=0.1)
    chosen = make_step("prune", {"blocks": 2, "tokens": "last"}, where="x")
    assert chosen.method == "contiguous"
    values = {"bits": 2}
    make_step("quantize", values, where="x")
    assert values == {"bits": 2}


def test_paths_are_found(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for path in (here, there):
        path.mkdir()
    (here / "model").mkdir()
    (there / "model").mkdir()
    (there / "text.txt").write_text("x")
    monkeypatch.chdir(here)
    recipe = Recipe(
        "model",
        CalibrationSettings(dataset="text.txt"),
        RuntimeSettings(),
        (make_step("eval", {"dataset": "text.txt", "against": "org/original"}, where="x"),),
    )
    located, notes = locate(recipe, there)
    assert located.model == "model"
    assert located.calibration.dataset == str(there / "text.txt")
    assert located.steps[0].settings == EvalSettings(
        dataset=str(there / "text.txt"), against="org/original"
    )
    assert notes == ["`model` is in the current directory", "`text.txt` is beside the recipe"]


def test_gates_hold_or_name_the_number():
    gates = parse_gates({"kl": "< 0.1", "top1_agreement": ">= 0.9", "size": "<= 2MB"}, where="test")
    assert gates[2] == Gate("size", "<=", 2e6)
    good = {"kl": 0.05, "top1_agreement": 0.9, "size": 2_000_000}
    check_gates(gates, good, written="there")
    with pytest.raises(GateError) as caught:
        check_gates(gates, {"kl": 0.1, "top1_agreement": 0.95}, written="there")
    assert str(caught.value) == (
        "`kl < 0.1` fails: `kl` is 0.1; `size <= 2e+06` cannot be checked: `size` was not measured"
    )
    assert caught.value.hint == "the whole report is in `there`"
    assert caught.value.exit_code == 6


def test_nothing_is_below_a_limit_that_is_not_a_number():
    with pytest.raises(GateError):
        check_gates(parse_gates({"ppl": "< 9"}, where="x"), {"ppl": float("nan")}, written="x")


def test_limits_of_the_command_line():
    assert split_limits(["ppl_ratio<1.3, kl <= 0.1", "kl>0"]) == {
        "ppl_ratio": "<1.3",
        "kl": "<= 0.1, >0",
    }
    gates = parse_gates(split_limits(["top1-agreement>=0.123456789012345"]), where="x")
    assert parse_gates(gate_texts(gates), where="x") == gates
    for text in ("kl", "kl=3", "<3", ""):
        with pytest.raises(ConfigError, match="is not a limit"):
            split_limits([text])


def test_a_preset_is_a_method_and_its_settings():
    for name, values in registry.stage("quantize").presets.items():
        step = make_step("quantize", {"preset": name, "bits": 3}, where="test")
        assert step == make_step("quantize", {**values, "bits": 3}, where="test")
    with pytest.raises(ConfigError) as raised:
        make_step("quantize", {"preset": "fats"}, where="test")
    assert raised.value.hint == "did you mean `fast`?"
    with pytest.raises(ConfigError, match="give only one of `preset`, `method`"):
        make_step("quantize", {"preset": "fast", "method": "rtn"}, where="test")
    with pytest.raises(ConfigError, match="unknown prune preset `fast`"):
        make_step("prune", {"preset": "fast", "ratio": 0.2}, where="test")
