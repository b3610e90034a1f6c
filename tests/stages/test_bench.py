"""Speed side by side: what is measured, in which order, and what is said of it."""

from __future__ import annotations

import json
import sys

import pytest
from correcting import RUNTIME
from tiny_checkpoint import save_tiny

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, GateError, ResourceError
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtimes import engine as engines
from compresso.runtimes import memory, process
from compresso.runtimes import transformers as own
from compresso.runtimes.engine import Speed
from compresso.settings import CalibrationSettings
from compresso.stages.bench import Plan, _compared, bench, print_bench


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An original and what was made of it."""
    root = tmp_path_factory.mktemp("bench")
    original = save_tiny(root / "original")
    step = make_step("prune", {"drop": [1, 2]}, where="test")
    run_step(step, Checkpoint(original), CalibrationSettings(), root / "pruned", RUNTIME)
    return original, root / "pruned"


class Timed:
    """A runtime with made-up speeds: decode by path and round."""

    def __init__(self, name, decode, ending=""):
        self.NAME, self.decode, self.ending, self.calls = name, decode, ending, []
        self.lacks = None

    def missing(self):
        return self.lacks

    def version(self):
        return "1.0"

    def accepts(self, path):
        return path.name.endswith(self.ending)

    def speed(self, path, prompt, new, *, trust_remote_code=False, device="cpu"):
        self.calls.append((path.name, tuple(prompt.shape), new, int(prompt.max())))
        decode = self.decode[path.name][sum(call[0] == path.name for call in self.calls) - 1]
        size = Checkpoint(path).stored_bytes if path.is_dir() else 10
        return Speed(100.0, decode, 0.5, 1.0, 3000, 1000, size, [])


@pytest.fixture
def timed(monkeypatch):
    def put(*found):
        monkeypatch.setattr(engines, "ENGINES", {one.NAME: f"timed_{one.NAME}" for one in found})
        for one in found:
            monkeypatch.setitem(sys.modules, f"timed_{one.NAME}", one)
        return found

    return put


def test_in_turns_the_original_first(pair, timed):
    (fast,) = timed(Timed("x", {"original": [10, 11, 9], "pruned": [20, 18, 19]}))
    found = bench([str(pair[1])], [], Plan(new=8), RUNTIME)
    assert [call[0] for call in fast.calls] == ["original", "pruned"] * 3
    # As many as the models take, of tokens that they have.
    assert all(call[1:3] == ((1, 56), 8) and call[3] < 257 for call in fast.calls)
    first, second = found["rows"]
    assert (second["decode"], second["decode_low"], second["decode_high"]) == (19, 18, 20)
    assert first["memory"] == 2000 and first["first_token"] == 0.5 and first["load"] == 1.0
    assert second["disk_bytes"] == Checkpoint(pair[1]).stored_bytes
    (line,) = found["comparison"]
    assert "decode 1.90 x: gain" in line and "prefill 1.00 x: no gain" in line
    assert f"`{pair[1]}` in x, against `{pair[0]}`: 0.65 x the size" in line
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("decode", "words"),
    [([10.5, 12, 13], "no gain"), ([7, 8, 8.5], "loss"), ([11.5, 12, 13], "gain")],
)
def test_a_gain_is_more_than_the_spread(pair, timed, decode, words):
    timed(Timed("x", {"original": [10, 11, 9], "pruned": decode}))
    found = bench([str(pair[1])], ["x"], Plan(prompt=8, new=8), RUNTIME)
    assert f": {words}; memory" in found["comparison"][0]


def test_what_cannot_be_measured_is_said(pair, timed, tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_text("")
    plain = Timed("x", {"original": [1], "pruned": [1]})
    plain.accepts = lambda path: path.is_dir()
    other = Timed("y", {"m.gguf": [1]}, ".gguf")
    timed(plain, other)
    plan = Plan(rounds=1, prompt=4, new=4)
    found = bench([str(pair[1]), str(file)], ["x", "y"], plan, RUNTIME)
    assert [(row["model"], row["runtime"]) for row in found["rows"]] == [
        (str(pair[0]), "x"),
        (str(pair[1]), "x"),
        (str(file), "y"),
    ]
    assert "whose spread is not known" in found["comparison"][0]
    assert [line.split("`")[1] for line in found["not_measured"]] == [
        str(pair[0]),
        str(pair[1]),
        str(file),
    ]
    assert "`compresso export` writes it" in found["not_measured"][0]
    assert found["not_measured"][2].startswith(f"not measured: `{file}` in x, as it is not in")
    other.lacks = "package `z`: pip install z"
    plain.calls.clear()
    found = bench([str(pair[1]), str(file)], [], plan, RUNTIME)
    assert found["not_measured"] == [f"not measured: `{file}` in y, as this needs {other.lacks}"]
    with pytest.raises(ResourceError, match="runtime `y` needs package `z`"):
        bench([str(file)], ["y"], plan, RUNTIME)
    with pytest.raises(CheckpointError, match="there is nothing to measure") as caught:
        bench([str(file)], [], plan, RUNTIME)
    assert "this needs package `z`" in caught.value.hint


def test_checkpoints_are_written_for_llama_cpp(pair, timed, tmp_path):
    plain = Timed("x", {"original": [1], "pruned": [1]})
    plain.accepts = lambda path: path.is_dir()
    llama = Timed("llama.cpp", {"0.gguf": [4], "1.gguf": [8]}, ".gguf")
    timed(plain, llama)
    written = []

    def convert(path):
        if path == pair[0] and len(written) > 1:
            raise GateError("it cannot be")
        written.append(path)
        (tmp_path / f"{len(written) - 1}.gguf").write_text("")
        return tmp_path / f"{len(written) - 1}.gguf"

    plan = Plan(rounds=1, prompt=4, new=4)
    found = bench([str(pair[1])], [], plan, RUNTIME, convert=convert)
    assert written == list(pair) and found["not_measured"] == []
    assert [row["model"] for row in found["rows"] if row["runtime"] == "llama.cpp"] == [
        f"{path} as GGUF" for path in pair
    ]
    assert f"against `{pair[0]} as GGUF`" in found["comparison"][1]
    assert "decode 2.00 x: gain" in found["comparison"][1]
    plain.calls.clear()
    llama.calls.clear()
    llama.decode["2.gguf"] = [1]
    found = bench([str(pair[1])], [], plan, RUNTIME, convert=convert)
    assert found["not_measured"] == [
        f"not measured: `{pair[0]}` in llama.cpp, as it cannot be written as GGUF: it cannot be"
    ]


def test_a_model_that_does_not_fit(pair, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match="there is nothing to measure") as caught:
        bench([str(pair[1])], ["transformers"], Plan(), RUNTIME)
    assert "and 1 kB are free" in caught.value.hint


def test_more_tokens_than_a_model_takes(pair):
    with pytest.raises(ConfigError, match="takes 64 tokens, fewer than are to be read"):
        bench([str(pair[1])], [], Plan(prompt=60, new=5), RUNTIME)


def test_an_original_that_is_gone(pair, timed, tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    for file in pair[1].iterdir():
        text = file.read_bytes().replace(str(pair[0]).encode(), b"/no/such/place")
        (tmp_path / "copy" / file.name).write_bytes(text)
    timed(Timed("x", {"copy": [1.0]}))
    found = bench([str(tmp_path / "copy")], [], Plan(rounds=1, new=8), RUNTIME)
    assert len(found["rows"]) == 1 and found["comparison"] == []
    assert "the original `/no/such/place` is gone" in capsys.readouterr().err


def test_it_is_shown(pair, timed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    timed(Timed("x", {"original": [10, 11, 9], "pruned": [20, 18, 19]}))
    print_bench(bench([str(pair[1])], [], Plan(new=8), RUNTIME))
    out = capsys.readouterr().out
    assert "19.0 (18.0 to 20.0)" in out and "2 kB" in out and "decode 1.90 x: gain" in out


def test_it_is_shown_on_a_narrow_terminal(pair, timed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    speeds = {"original": [10, 11, 9], "pruned": [20, 18, 19]}
    timed(Timed("transformers", speeds), Timed("other", speeds))
    print_bench(bench([str(pair[1])], [], Plan(new=8), RUNTIME))
    out = capsys.readouterr().out
    assert "in transformers 1.0" in out and "in other 1.0" in out and "…" not in out
    cells = [line.strip("│ ").split("│") for line in out.splitlines()]
    decode = next(line for line in cells if line[0].startswith("decode"))
    assert [cell.strip() for cell in decode] == [
        "decode (tokens/s)",
        "10.0 (9.0 to 11.0)",
        "19.0 (18.0 to 20.0)",
    ]


def test_in_transformers(pair, monkeypatch):
    """The real thing, but in this process."""
    assert own.apart is process.apart
    monkeypatch.setattr(own, "apart", lambda code, job, **_: own._speed(**job))
    found = bench([str(pair[1])], ["transformers"], Plan(rounds=1, new=4), RUNTIME)
    assert [row["runtime"] for row in found["rows"]] == ["transformers"] * 2
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in found["rows"])
    for row in found["rows"]:  # what the process had taken before, the model does not add to
        row["memory"] = 0
    assert "memory: too little to tell" in next(_compared(found["rows"], 1))
