"""A run killed at any moment and started again ends in the same bytes as one left alone."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Runs the real command, and kills its own process without warning at one exact point.
KILLED = """
import os, signal, sys
from compresso.checkpoint import writer
point, part, *sys.argv = sys.argv[1:]
commit, replace = writer.CheckpointWriter.commit, os.replace

def killed_after(self, number, tensors, report):
    commit(self, number, tensors, report)
    if number == int(part):
        os.kill(os.getpid(), signal.SIGKILL)

def killed_before_rename(source, target, **options):
    if f"model-{int(part) + 1:05d}-of-" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)

def killed_in_search(self, state, remember=writer.CheckpointWriter.remember, left=[int(part)]):
    remember(self, state)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def killed_after_keeping(self, name, tensors, values, left=[int(part)]):
    keep(self, name, tensors, values)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if point == "training":
    from compresso.checkpoint import kept
    from compresso.training import loop
    loop.SECONDS_BETWEEN_SAVES = 0.0
    keep, kept.KeptState.keep = kept.KeptState.keep, killed_after_keeping
elif point == "after":
    writer.CheckpointWriter.commit = killed_after
elif point == "search":
    writer.CheckpointWriter.remember = killed_in_search
else:
    os.replace = killed_before_rename
from compresso.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    import numpy as np

    np.save(path.parent / "tokens.npy", tokens.numpy())
    np.save(path.parent / "more.npy", torch.cat((tokens, tokens[:1])).numpy())
    return path


def arguments(model, output):
    tokens = str(model.parent / "tokens.npy")
    return [
        *("compresso", "quantize", str(model), "-o", str(output), "--bits", "3"),
        *("--group-size", "16", "--dataset", tokens, "--nsamples", "8"),
    ]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def contents(path):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name not in ("compresso.json", "compresso-report.csv")
    }


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    done = run([sys.executable, "-m", *arguments(model, output)])
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("point", ["after", "before"])
@pytest.mark.parametrize("part", [0, 2, 4])
def test_killed_and_resumed_is_bit_identical(model, whole, tmp_path, point, part):
    output = tmp_path / "out"
    command = arguments(model, output)
    killed = run([sys.executable, "-c", KILLED, point, str(part), *command])
    assert killed.returncode == -9, killed.stderr
    assert not output.exists()
    committed = len(list((tmp_path / "out.partial").glob("model-*.safetensors")))
    assert committed == part + (point == "after")
    resumed = run([sys.executable, "-m", *command])
    assert resumed.returncode == 0, resumed.stderr
    assert contents(output) == contents(whole)
    rows = [
        json.loads((path / "compresso.json").read_text())["report"]["rows"]
        for path in (output, whole)
    ]
    for got, want in zip(*rows, strict=True):
        assert got["linear"] == want["linear"] and got["output_error"] == want["output_error"]


DEPTH = {
    "blockpruner": ["prune", "--method", "blockpruner", "--drop-count", "3"],
    "evopress": ["prune", "--method", "evopress", "--ratio", "0.3", "--generations", "3"],
    "gates": ["prune", "--method", "foldgpt", "--drop-count", "1", "--steps", "3"],
    "fold": ["fold", "--blocks", "1", "--rank", "2"],
    "heal": ["heal", "--steps", "5", "--sequences", "3", "--evaluate-every", "2", "--no-plot"],
    "lisa": ["heal", "--method", "lisa", "--steps", "4", "--interval", "2", "--no-plot"],
}


@pytest.mark.parametrize(
    ("name", "point", "part"),
    [
        ("blockpruner", "search", 2),
        ("blockpruner", "after", 1),
        ("evopress", "search", 2),
        ("gates", "search", 2),
        ("fold", "search", 1),
        ("fold", "after", 2),
        ("heal", "training", 3),
        ("heal", "after", 2),
        ("lisa", "training", 3),
    ],
)
def test_a_killed_search_ends_in_the_same_bytes(model, tmp_path, name, point, part):
    stage, *options = DEPTH[name]
    tokens = model.parent / ("more.npy" if stage == "heal" else "tokens.npy")
    text = ("--dataset", str(tokens), "--nsamples", "8")

    def command(output):
        return ["compresso", stage, str(model), "-o", str(output), *options, *text]

    output, whole = tmp_path / "out", tmp_path / "whole"
    killed = run([sys.executable, "-c", KILLED, point, str(part), *command(output)])
    assert killed.returncode == -9, killed.stderr
    assert not output.exists()
    for path in (output, whole):
        done = run([sys.executable, "-m", *command(path)])
        assert done.returncode == 0, done.stderr
    assert contents(output) == contents(whole)


def test_finished_work_is_recognised(model, whole):
    before = (whole / "compresso.json").stat().st_mtime_ns
    again = run([sys.executable, "-m", *arguments(model, whole)])
    assert again.returncode == 0 and again.stdout.strip() == str(whole)
    assert (whole / "compresso.json").stat().st_mtime_ns == before


def test_other_settings_never_touch_it(model, whole):
    before = contents(whole)
    other = run([sys.executable, "-m", *arguments(model, whole), "--seed", "1", "--bits", "4"])
    assert other.returncode == 3
    assert other.stderr.count("error:") == 1 and "Traceback" not in other.stderr
    assert contents(whole) == before
