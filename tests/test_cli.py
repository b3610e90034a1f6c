"""The command line: options, aliases, chains of bare commands, output, errors and exit codes."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_checkpoint import BLOCKS, save_tiny

import compresso
from compresso import commands, registry
from compresso.checkpoint.reader import Checkpoint
from compresso.cli import make_app
from compresso.config import describe, fields
from compresso.depth_settings import ManualSettings
from compresso.gates import Gate
from compresso.listing import TOPICS
from compresso.options import ALIASES, FLAGS, flag, option_name, stage_parameters
from compresso.quantize_settings import GptqSettings, HiggsSettings, RtnSettings
from compresso.recipe import load_recipe
from compresso.settings import (
    CalibrationSettings,
    EvalSettings,
    RuntimeSettings,
)

COMMANDS = typer.main.get_command(make_app()).commands
REPOSITORY = Path(compresso.__file__).parents[1]
# Tiny models crawl on many threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ("--nsamples", "4", "--seqlen", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return str(path)


def recipe_of(command, *arguments):
    """What a stage command's options come to, by way of the recipe it saves."""
    code, out, err = command(*arguments, "--save-recipe", "saved.yaml")
    assert code == 0, err
    assert out.strip() == "saved.yaml"
    recipe = load_recipe(Path("saved.yaml"))
    Path("saved.yaml").unlink()
    return recipe


@pytest.mark.parametrize("stage", registry.STAGES)
def test_options_are_the_settings(stage):
    methods = registry.STAGES[stage].methods.values()
    expected = {field for method in methods for field in fields(method.settings)}
    expected |= {field for field in fields(RuntimeSettings)}
    if stage in ("analyze", "eval"):  # which write nothing that could be proved
        expected.remove("verify")
    if any(method.calibrated for method in methods):
        # No name means two things on one command line, but the seed, which is of all there is.
        assert expected & set(fields(CalibrationSettings)) <= {"seed"}
        expected |= set(fields(CalibrationSettings))
    extra = {registry.STAGES[stage].named} if len(methods) > 1 else set()
    extra |= {"limits"} if stage == "eval" else set()
    extra |= {"preset"} if registry.STAGES[stage].presets else set()
    assert {parameter.name for parameter in stage_parameters(stage)} == expected | extra
    assert set(commands.HELP) == set(registry.STAGES)


@pytest.mark.parametrize("stage", registry.STAGES)
def test_help_comes_from_the_settings(stage, command):
    code, out, _ = command(stage, "--help")
    assert code == 0
    shown = " ".join(out.replace("│", " ").split())
    for method in registry.STAGES[stage].methods.values():
        for field in fields(method.settings):
            description, default = describe(method.settings, field)
            assert flag(field) in shown
            # The columns of the table are narrow: compare without their line breaks.
            assert description.split(";")[0].split()[0] in shown
            if isinstance(default, int | float) and not isinstance(default, bool):
                assert re.search(rf"\[default: \([^)]*\b{re.escape(str(default))}\b", shown)


def test_every_other_spelling_stands_for_something_real():
    real = {
        option.lstrip("-")
        for each in COMMANDS.values()
        for parameter in each.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | set(COMMANDS)
    aliases = [alias for names in ALIASES.values() for alias in names.split()]
    assert set(ALIASES) <= real
    assert not set(aliases) & real and len(aliases) == len(set(aliases))
    assert set(FLAGS) <= {
        field
        for cls in (RtnSettings, HiggsSettings, CalibrationSettings, EvalSettings)
        for field in fields(cls)
    }
    assert option_name("num_calibration_samples") == "nsamples" and option_name("o") == "o"


def test_options_become_settings(command):
    recipe = recipe_of(
        command,
        *("quantize", "org/name", "--bits", "3", "--group-size", "32", "--asym", "--damping"),
        *("0.05", "--no-act-order", "--ignore", "re:.*mlp", "--ignore", "lm_head", "--lm-head"),
        *("--no-pack", "--grid", "minmax", "--nsamples", "7", "--seqlen", "64", "--dataset", "c4"),
        *("--seed", "5", "--batch-size", "2", "--device", "cpu", "--dtype", "float32"),
        *("--max-memory", "1GB", "--trust-remote-code"),
    )
    assert recipe.model == "org/name"
    assert recipe.steps[0].settings == GptqSettings(
        bits=3,
        group_size=32,
        symmetric=False,
        grid="minmax",
        damping=0.05,
        act_order=False,
        ignore=("re:.*mlp", "lm_head"),
        lm_head=True,
        pack=False,
    )
    assert recipe.calibration == CalibrationSettings(
        dataset="c4", samples=7, length=64, seed=5, batch_size=2
    )
    assert recipe.runtime == RuntimeSettings(
        device="cpu", dtype="float32", max_memory="1GB", trust_remote_code=True
    )


def test_spellings_of_other_tools(command):
    recipe = recipe_of(
        command,
        *("quantize", "--model_name_or_path", "org/name", "--q-bits", "2", "--group_size", "16"),
        *(
            "--n_samples",
            "3",
            "--max_seq_length",
            "16",
            "--exclude",
            "lm_head",
            "--percdamp",
            "0.1",
        ),
        *("--output_dir", "there", "--calibration_data", "c4"),
    )
    assert recipe.model == "org/name"
    assert recipe.steps[0].settings == GptqSettings(
        bits=2, group_size=16, ignore=("lm_head",), damping=0.1
    )
    assert recipe.calibration == CalibrationSettings(dataset="c4", samples=3, length=16)
    assert recipe_of(command, "prune", "m", "--sparsity", "0.2").steps[0].settings.ratio == 0.2


def test_the_method_follows_from_the_options(command):
    dropped = recipe_of(command, "prune", "m", "--drop", "3,4, 7").steps[0]
    assert dropped.method == "manual" and dropped.settings == ManualSettings(drop=[3, 4, 7])
    rounded = recipe_of(command, "quantize", "m", "--method", "rtn", "--bits", "8").steps[0]
    assert rounded.settings == RtnSettings(bits=8)
    judged = recipe_of(
        command, "eval", "m", "--assert", "ppl_ratio<1.3, kl<0.1", "--assert", "size<=1GB"
    ).steps[0]
    assert judged.settings == EvalSettings()
    assert judged.gates == (
        Gate("ppl_ratio", "<", 1.3),
        Gate("kl", "<", 0.1),
        Gate("size", "<=", 1e9),
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("prune --rato 0.2", 2, "--ratio"),
        ("quantise m", 2, "quantize"),
        ("quantize m --bits 5", 2, "`bits`: input should be 2, 3, 4 or 8"),
        ("quantize m --bits x", 2, "Invalid value for '--bits'"),
        ("quantize m --method gptqq", 2, "did you mean `gptq`?"),
        ("quantize m --method rtn --damping 0.1", 2, "methods that have it: gptq"),
        ("quantize m --method rtn --nsamples 3", 2, "so `--nsamples` would do nothing"),
        ("quantize m --method lq-lora --no-fisher --seqlen 8", 2, "these options reads no text"),
        ("compensate m --no-weighted --dataset stdlib", 2, "so `--dataset` would do nothing"),
        ("prune m", 2, "give one of `ratio`, `blocks`"),
        ("prune m --ratio 2", 2, "`ratio`: input should be less than 1"),
        ("prune m --drop 3,x", 2, "`x` is not a block, `a` or `m` and a block"),
        ("eval m --assert ppl_rato<1", 2, "did you mean `ppl_ratio`?"),
        ("eval m --assert ppl", 2, "`ppl` is not a limit"),
        ("eval m -m n", 2, "two models are given: `m` and `n`"),
        ("list methds", 2, "did you mean `methods`?"),
        ("list zzz", 2, "known: stages"),
        ("run absent.yaml", 2, "No such file"),
        ("eval ./absent", 3, "no checkpoint directory `./absent`"),
        ("eval m --device gpu", 2, "unknown device `gpu`"),
        ("eval m --max-memory lots", 2, "`lots` is not a size"),
        ("eval m --device cuda:99", 5, "no device `cuda:99`"),
    ],
)
def test_mistakes(command, arguments, code, words):
    found, out, err = command(*arguments.split())
    assert (found, out) == (code, "")
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_errors_and_hints_are_lines(command):
    _, _, err = command("quantize", "m", "--method", "gptqq")
    assert err == (
        "error: compresso quantize: unknown quantize method `gptqq`\n\nhint: did you mean `gptq`?\n"
    )


def test_a_recipe_is_not_overwritten(command, here):
    (here / "mine.yaml").write_text("mine")
    code, _, err = command("eval", "m", "--save-recipe", "mine.yaml")
    assert code == 2 and "`mine.yaml` exists" in err
    assert (here / "mine.yaml").read_text() == "mine"
    code, _, err = command("eval", "m", "--save-recipe", "absent/mine.yaml")
    assert code == 5 and "cannot write `absent/mine.yaml`" in err


def test_bare_commands_chain(command, here, model, text):
    code, out, err = command("prune", model, "--drop", "1")
    assert code == 0, err
    assert out == "compresso-runs/01-prune-manual\n"
    options = ("--method", "rtn", "--group-size", "16", "--bits", "4")
    code, out, err = command("quantize", *options)
    assert code == 0, err
    assert "reading `compresso-runs/01-prune-manual`, the newest checkpoint" in err
    assert out == "compresso-runs/02-quantize-rtn\n"
    evaluated = ("--dataset", text, *SMALL, "--no-speed", "--each", "--assert", "ppl_ratio<1000")
    code, out, err = command("eval", *evaluated)
    assert code == 0, err
    assert "reading `compresso-runs/02-quantize-rtn`" in err
    assert out == "compresso-runs/03-eval-standard\n"
    for words in ("original", "prune-manual", "quantize-rtn", "perplexity", "±"):
        assert words in err
    rows = json.loads((here / out.strip() / "compresso.json").read_text())["report"]["rows"]
    assert [row["checkpoint"] for row in rows] == ["original", "prune-manual", "quantize-rtn"]
    code, out, err = command("analyze", "--dataset", text, *SMALL)
    assert (code, out) == (0, "compresso-runs/04-analyze-similarity\n"), err
    # A stage that cannot read what is newest says what it could read.
    code, _, err = command("quantize", *options)
    assert code == 2 and "needs dense weights" in err
    assert "pass the one it was made from: `" in err and "01-prune-manual`" in err


def test_a_result_that_is_not_proved_says_so(command, model):
    asked = ("prune", model, "--drop", "1", "-o", "pruned", "--no-verify")
    for _ in range(2):  # made, and found again
        code, out, err = command(*asked)
        assert (code, out) == (0, "pruned\n"), err
        assert "not proved, as asked: `compresso verify pruned` does it" in " ".join(err.split())
    record = json.loads(Path("pruned/compresso.json").read_text())
    assert "proof" not in record and record["fingerprint"]["tokens"]
    assert "It was not loaded and compared" in Path("pruned/README.md").read_text()
    code, _, err = command("verify", "pruned")
    assert code == 0, err


def test_bare_commands_begin_with_the_bundled_model(here, capsys):
    assert commands.choose_model() == "reference"
    assert "bundled model" in capsys.readouterr().err


def test_the_result_as_json(command, model):
    code, out, _ = command("prune", model, "--drop", "1", "-o", "pruned", "--json")
    result = json.loads(out)
    assert code == 0 and len(result) == 1
    assert (result[0]["path"], result[0]["method"]) == ("pruned", "manual")
    assert result[0]["report"]["rows"] and result[0]["reused"] is False
    again = json.loads(command("prune", model, "--drop", "1", "-o", "pruned", "--json")[1])
    assert again == [result[0] | {"reused": True}]


def test_a_saved_recipe_makes_the_same(command, here, model, text):
    options = ("prune", model, "--blocks", "1", "--dataset", text, *SMALL)
    assert command(*options, "--save-recipe", "saved.yaml")[0] == 0
    assert command("run", "--check", "saved.yaml")[0] == 0
    code, direct, err = command(*options, "-o", "direct")
    assert code == 0, err
    code, out, err = command("run", "saved.yaml")
    assert code == 0, err
    assert out == "compresso-runs/saved/01-prune-shortgpt\n"
    keys = [Checkpoint(Path(path.strip())).key for path in (direct, out)]
    assert keys[0] == keys[1]


def test_a_recipe_runs(command, here, model, text):
    (here / "r.yaml").write_text(
        f"model: {model}\n"
        f"calibration: {{dataset: {text}, samples: 4, length: 32}}\n"
        "runtime: {dtype: float32}\n"
        "stages:\n"
        f"  - {{stage: eval, dataset: {text}, samples: 2, length: 32, speed: false}}\n"
        "  - {stage: prune, blocks: 1}\n"
        "  - {stage: prune, drop: [0]}\n"
    )
    code, out, err = command("run", "r.yaml", "-o", "runs", "--keep-last", "--device", "cpu")
    assert code == 0, err
    assert out == "runs/03-prune-manual\n"
    assert sorted(path.name for path in (here / "runs").iterdir()) == [
        "01-eval-standard",
        "03-prune-manual",
        "compresso-recipe.yaml",
    ]
    # The last evaluation is what a run ends with, wherever it stood.
    assert err.rindex("perplexity") > err.rindex("deleting")
    code, out, err = command("run", "r.yaml", "-o", "runs", "--keep-last", "--json")
    assert code == 0 and all(outcome["reused"] for outcome in json.loads(out))


def test_inspect(command, model):
    command("prune", model, "--drop", "1", "-o", "pruned")
    code, out, err = command("inspect", "pruned", "--json")
    assert code == 0, err
    found = json.loads(out)
    source = Checkpoint(Path("pruned"))
    assert found["blocks"] == BLOCKS - 1 and found["hidden_size"] == 32
    assert found["stored_bytes"] == source.stored_bytes
    assert found["bits_per_weight"] == pytest.approx(32.0) and found["dtype"] == "float32"
    assert found["tied_embeddings"] is False and found["unmapped_tensors"] == []
    assert [entry["method"] for entry in found["history"]] == ["manual"]
    assert found["history"][0]["settings"]["drop"] == [1]
    code, out, _ = command("inspect", "pruned")
    for words in ("llama", "LlamaForCausalLM", "none: all weights are dense", "made by 1. prune"):
        assert words in out


def test_inspect_counts_what_is_packed(command, model):
    command("quantize", model, "--method", "rtn", "--group-size", "16", "-o", "packed")
    found = json.loads(command("inspect", "packed", "--json")[1])
    linears = 7 * BLOCKS
    assert found["packed"] == [{"linears": linears, "bits": 4, "group_size": 16, "symmetric": True}]
    stored = Checkpoint(Path("packed"))
    nbytes = sum(stored.info(name).nbytes for name in stored.names())
    assert found["bits_per_weight"] == pytest.approx(nbytes * 8 / found["parameters"])
    assert f"{linears} linears, symmetric, per 16 columns" in command("inspect", "packed")[1]


def test_inspect_of_an_unknown_architecture(command, model, here):
    shutil.copytree(model, here / "odd")
    config = json.loads((here / "odd" / "config.json").read_text())
    (here / "odd" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    found = json.loads(command("inspect", "odd", "--json")[1])
    assert found["supported"] is False and "blocks" not in found


@pytest.mark.parametrize("topic", TOPICS)
def test_list(command, topic):
    code, out, _ = command("list", topic)
    rows = json.loads(command("list", topic, "--json")[1])[topic]
    assert code == 0 and len(out.splitlines()) == len(rows) > 0
    first = next(iter(rows[0]))  # the column that says what a row is about
    assert [line.split("\t")[0] for line in out.splitlines()] == [row[first] for row in rows]
    for row in rows:
        assert all(isinstance(value, str) for value in row.values()) and row[first]
        assert topic == "runtimes" or all(row.values())


def test_list_says_all_there_is(command):
    found = json.loads(command("list", "--json")[1])
    assert list(found) == list(TOPICS)
    methods = {row["name"] for row in found["methods"]}
    assert methods == {name for stage in registry.STAGES.values() for name in stage.methods}
    from compresso.calibration.text import DATASETS, FILE_SUFFIXES

    listed = {row["name"]: row["is"] for row in found["datasets"]}
    assert set(DATASETS) <= set(listed)
    assert all(suffix in listed["PATH"] for suffix in FILE_SUFFIXES)


def test_version(command):
    assert command("--version")[:2] == (0, f"compresso {compresso.__version__}\n")


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, **options
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["list", "methods"],
        ["run", "--check", "recipes/quickstart.yaml"],
        ["quantize", "m", "--bits", "5"],
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments):
    code = f"""
import sys
from compresso.__main__ import main
sys.argv = ["compresso", *{arguments!r}]
try:
    main()
except SystemExit:
    print("heavy:", *{{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules))
"""
    done = python(code)
    assert done.stdout.splitlines()[-1].strip() == "heavy:", done.stderr


def test_help_is_quick():
    """By processor time: a machine that runs tests has others waiting."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "compresso", "--help"], capture_output=True, cwd=REPOSITORY
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # About 0.3 s on an idle core; importing torch alone would be more than this.
    assert min(seconds() for _ in range(3)) < 1.0


def test_a_broken_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m compresso list | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_by_a_signal(name, here, model):
    """The run says what it saved, exits with 130, and goes on when it is started again."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
from compresso.checkpoint.writer import CheckpointWriter
commit = CheckpointWriter.commit
def stopped(self, part, tensors, report, **beside):
    commit(self, part, tensors, report, **beside)
    if part == 1:
        os.kill(os.getpid(), signal.{name})
CheckpointWriter.commit = stopped
from compresso.__main__ import main
sys.argv = ["compresso", "prune", {model!r}, "--drop", "0", "-o", {str(here / "out")!r}]
main()
"""
    done = python(code, env=ONE_THREAD)
    assert done.returncode == 130, done.stderr
    assert "error: interrupted; 2 finished parts are saved" in done.stderr
    assert "hint: run the same command again" in done.stderr
    assert not (here / "out").exists() and (here / "out.partial").exists()
    again = subprocess.run(
        [sys.executable, "-m", "compresso", "prune", model, "--drop", "0", "-o", here / "out"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=ONE_THREAD,
    )
    assert again.returncode == 0, again.stderr
    assert (here / "out").exists()


def test_bugs_show_their_traceback():
    code = """
import sys
from compresso import commands
def broken(*arguments, **options):
    raise ZeroDivisionError("a bug")
commands.make_request = broken
from compresso.__main__ import main
sys.argv = ["compresso", "eval"]
main()
"""
    done = python(code)
    assert done.returncode == 1 and "ZeroDivisionError: a bug" in done.stderr


def test_options_have_the_types_of_the_settings():
    """Numbers and switches are read as what they are, and lists can be repeated."""
    found = {p.name: p.annotation.__args__[0] for p in stage_parameters("quantize")}
    assert found["bits"] == int | None and found["damping"] == float | None
    assert found["ignore"] == list[str] | None and found["pack"] == bool | None
