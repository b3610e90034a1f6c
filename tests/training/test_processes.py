"""Several processes that train: what is dealt to them, and that they give what one gives."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import build, tokens

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.runtime import launched
from compresso.training.processes import Processes, join

TRAIN = """
import sys
import torch
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.training import loop
from compresso.training.model import TrainingModel
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.processes import join

model_path, data_path, out, stop = sys.argv[1:]
torch.set_num_threads(1)
loop.SECONDS_BETWEEN_SAVES = 0.0
processes = join(torch.device("cpu"))
source = Checkpoint(__import__("pathlib").Path(model_path))
adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
data = torch.load(data_path)
next_token = MixedObjective(Shares(next_token=1.0))
left = int(stop)

def objective(model, tokens, rows):
    global left
    if torch.is_grad_enabled():
        left -= 1
        if left == -1:
            raise SystemExit(7)
    return next_token(model, tokens, rows)

with TrainingModel(adapter, source) as model:
    names = [name for name in source.names() if "layers.0" not in name]
    parameters = model.train_tensors(names)
    parameters += model.add_low_rank(["model.layers.0.mlp.up_proj"], 4, seed=0)
    options = loop.TrainOptions(
        steps=6, sequences=6, micro=3, rate=3e-3, warmup=1, clip=2.0, evaluate_every=2
    )
    from pathlib import Path
    store = KeptState(Path(out).with_suffix(".work"), writes=processes.first)
    history = loop.train(
        model, parameters, objective, data, data[:5], options, store=store, processes=processes
    )
    tensors = model.trained_tensors()
    tensors |= {path: one.product() for path, one in model.low_ranks().items()}
if processes.first:
    torch.save((history.rows, tensors), out)
"""


def together(command, tmp_path, *, count=2, **environment):
    """Run a command in several processes, as torchrun does; the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(count):
        places = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_PORT": port}
        own = {name: str(value) for name, value in places.items()}
        whole = os.environ | own | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        log = (tmp_path / f"log-{index}").open("w")
        running.append(
            subprocess.Popen(command, env=whole | environment, stdout=log, stderr=log, text=True)
        )
    return [process.wait(timeout=300) for process in running]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, ids, and what one process comes to."""
    path = tmp_path_factory.mktemp("setting")
    build("qwen3").save_pretrained(path / "model")
    torch.save(tokens(14, 12, seed=1), path / "data.pt")
    command = [sys.executable, "-c", TRAIN, str(path / "model"), str(path / "data.pt")]
    done = subprocess.run([*command, str(path / "one.pt"), "-1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return command, torch.load(path / "one.pt")


def test_two_processes_that_split_the_model_go_on_to_the_loss_curve_of_one(setting, tmp_path):
    """FSDP, stopped after three steps and started again."""
    command, one = setting
    out = str(tmp_path / "two.pt")
    stopped = together([*command, out, "3"], tmp_path, ACCELERATE_USE_FSDP="true")
    assert stopped == [7, 7], (tmp_path / "log-0").read_text()
    assert together([*command, out, "3"], tmp_path, ACCELERATE_USE_FSDP="true") == [0, 0]
    rows, tensors = torch.load(out)
    for row, expected in zip(rows, one[0], strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-4, rtol=1e-3)


def test_one_process_alone():
    processes = join(torch.device("cpu"))
    assert processes == Processes() and processes.first
    sums = torch.arange(3.0)
    processes.add_up([sums])
    processes.wait()
    assert sums.tolist() == [0, 1, 2] and processes.agree(True) and not processes.agree(False)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_sequence_is_dealt_once_and_all_get_as_many_runs(count, micro):
    rows = list(range(10, 17))
    dealt = [Processes(index, count).batches(rows, micro) for index in range(count)]
    assert len({len(runs) for runs in dealt}) == 1
    counted = [(run, share) for runs in dealt for run, share in runs if share]
    assert sorted(row for run, _ in counted for row in run) == rows
    assert all(share == len(run) / len(rows) for run, share in counted)
    assert all(1 <= len(run) <= micro for runs in dealt for run, _ in runs)


def test_launchers_that_are_not_supported_are_refused(monkeypatch):
    assert launched().count == 1
    for name, value in {"MASTER_ADDR": "x", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (launched().index, launched().count, launched().sharded) == (1, 2, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DEEPSPEED is not supported"):
        launched()


@pytest.mark.parametrize("way", ["--multi_gpu", "--use_fsdp"])
def test_accelerate_launch_runs_the_command_unchanged(tmp_path, way):
    """One of two processes writes and speaks; the result is that of one.

    With their own copies of the model each, and with one that they split.
    """
    build("llama").save_pretrained(tmp_path / "model")
    ids = tokens(18, 16, seed=5)
    np.save(tmp_path / "tokens.npy", torch.cat((ids, ids[:2])).numpy())
    words = ["heal", str(tmp_path / "model"), "--dataset", str(tmp_path / "tokens.npy")]
    words += ["--nsamples", "18", "--steps", "3", "--sequences", "6", "--batch-size", "3"]
    words += ["--evaluate-every", "2", "--rate", "0.01", "--dtype", "float32", "--no-plot"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", way]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    commands = {
        "one": [sys.executable, "-m", "compresso", *words],
        "two": [*launch, "-m", "compresso", *words],
    }
    curves, said = {}, {}
    for name, command in commands.items():
        done = subprocess.run(
            [*command, "-o", str(tmp_path / name)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said[name] = (done.stdout, done.stderr.count("heal: after step 0"))
        with (tmp_path / name / "training.csv").open() as file:
            curves[name] = list(csv.DictReader(file))
    assert said["two"] == (f"{tmp_path / 'two'}\n", 1)
    for one, two in zip(curves["one"], curves["two"], strict=True):
        for key, value in one.items():
            if value:
                assert float(two[key]) == pytest.approx(float(value), rel=1e-4), key
    weights = [Checkpoint(tmp_path / name) for name in commands]
    one, two = (checkpoint.load(checkpoint.names()) for checkpoint in weights)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
