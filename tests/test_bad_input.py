"""Bad input, as a user meets it: one clear line, a hint, an exit code, and nothing published."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny

from compresso.__main__ import main
from compresso.checkpoint import writer


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return str(path)


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Run a command that must fail; return the one line that says why."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code):
        monkeypatch.setattr(sys, "argv", ["compresso", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == code
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in captured.err
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def quantize(model, text, *more):
    calibration = ("--dataset", text, "--nsamples", "4", "--seqlen", "32")
    return ("quantize", model, "-o", "out", "--group-size", "16", *calibration, *more)


def edit_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def shard(model):
    """Split the weights in two files with an index, and return the path of that."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:9]}
    files["model-00002-of-00002.safetensors"] = names[9:]
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
    places = {name: file for file, part in files.items() for name in part}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_missing_shard(model, text, fails):
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "lacks its shard" in fails(*quantize(model, text), code=3)


def test_truncated_shard(model, text, fails):
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    assert "is damaged" in fails(*quantize(model, text), code=3)


def test_index_that_leaves_the_directory(model, text, fails):
    index = shard(model)
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    assert "../model-00002" in fails(*quantize(model, text), code=3)


def test_integer_weights(model, text, fails):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)

    edit_weights(model, change)
    assert "model.norm.weight" in fails(*quantize(model, text), code=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_weights_that_are_no_numbers(model, text, fails, value, command):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    edit_weights(model, change)
    arguments = quantize(model, text)
    if command == "prune":
        arguments = ("prune", model, "-o", "out", "--drop", "0")
    assert "model.layers.2.mlp.up_proj.weight" in fails(*arguments, code=3)


def test_config_and_weights_that_disagree(model, text, fails):
    edit_config(model, intermediate_size=48)
    assert "has the shape (64, 32)" in fails(*quantize(model, text), code=3)


def test_config_with_too_many_blocks(model, text, fails):
    edit_config(model, num_hidden_layers=5)
    assert "model.layers.4." in fails(*quantize(model, text), code=3)


def test_unknown_family(model, text, fails):
    edit_config(model, model_type="t5")
    assert "unsupported architecture: `t5`" in fails(*quantize(model, text), code=2)


def test_pickles_are_not_read(model, text, fails):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails(*quantize(model, text), code=3)


def test_group_size_that_does_not_divide(model, text, fails):
    line = fails(*quantize(model, text, "--group-size", "24"), code=2)
    assert "do not divide into groups of 24" in line


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1", "0.99"])
def test_ratio_out_of_range(model, text, fails, ratio):
    fails("prune", model, "-o", "out", "--method", "tail", "--ratio", ratio, code=2)


def test_dropping_every_block(model, text, fails):
    fails("prune", model, "-o", "out", "--drop", "0,1,2,3", code=2)
    fails("prune", model, "-o", "out", "--method", "tail", "--blocks", "4", code=2)


def test_empty_and_short_text(model, fails, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in fails(*quantize(model, "empty.txt"), code=3)
    (tmp_path / "short.txt").write_text("too short")
    assert "fewer than one sequence" in fails(*quantize(model, "short.txt"), code=3)


def test_full_disk_keeps_what_is_done(model, text, fails, tmp_path, monkeypatch):
    whole, calls = writer.write_safetensors, []

    def fill_up(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(*arguments)

    monkeypatch.setattr(writer, "write_safetensors", fill_up)
    assert "No space left on device" in fails(*quantize(model, text), code=5)
    assert len(list((tmp_path / "out.partial").glob("model-*.safetensors"))) == 2
    monkeypatch.setattr(sys, "argv", ["compresso", *map(str, quantize(model, text))])
    with pytest.raises(SystemExit) as finished:
        main()
    assert not finished.value.code and (tmp_path / "out" / "config.json").exists()


def test_no_permission(model, text, fails, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(writer, "write_safetensors", refuse)
    assert "Permission denied" in fails(*quantize(model, text), code=5)


def test_output_that_is_something_else(model, text, tmp_path, fails, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    fails(*quantize(model, text, "-o", "mine"), code=3)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_interrupt_says_how_to_go_on(model, text, tmp_path):
    stop = (
        "import signal, sys, os\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from compresso.checkpoint.writer import CheckpointWriter as Writer\n"
        "commit = Writer.commit\n"
        "def stopped(self, part, *rest, **beside):\n"
        "    commit(self, part, *rest, **beside)\n"
        "    if part == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "Writer.commit = stopped\n"
        "from compresso.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", stop, *map(str, quantize(model, text))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "2 finished parts are saved" in done.stderr
    assert "run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()
