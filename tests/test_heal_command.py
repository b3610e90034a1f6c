"""The heal command where training goes wrong: what is said, what is kept, what comes of it."""

from __future__ import annotations

import csv
import errno
import json
import sys
from math import isnan

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny
from tiny_models import tokens

from compresso.__main__ import main
from compresso.checkpoint import kept
from compresso.training import loop
from compresso.training.share import Share

OPTIONS = (
    *("--method", "norms", "--steps", "6", "--sequences", "4", "--evaluate-every", "1"),
    *("--heldout", "2", "--rate", "0.01", "--dtype", "float32", "--device", "cpu", "--no-plot"),
)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Heals a tiny model; the exit code, and what it said."""
    ids = tokens(18, 16, seed=5)
    np.save(tmp_path / "tokens.npy", torch.cat((ids, ids[:2])).numpy())
    model = save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(output, *more):
        words = ["heal", str(model), "-o", output, "--dataset", "tokens.npy", *OPTIONS, *more]
        monkeypatch.setattr(sys, "argv", ["compresso", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, capsys.readouterr().err

    return run


def weights(path):
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_loss_that_is_no_number_keeps_the_best_state(command, tmp_path, monkeypatch):
    """The command says so and fails; the next one publishes that state, and how it came to it."""
    measure = Share.measure

    def fails(self, sequences, rows, step, *, backward):
        found = measure(self, sequences, rows, step, backward=backward)
        return found | {"loss": float("nan")} if backward and step == 3 else found

    with monkeypatch.context() as patched:
        patched.setattr(Share, "measure", fails)
        code, said = command("out")
    assert code == 4 and "Traceback" not in said
    assert "error: the loss is not finite at step 4; the state after step 3, the best" in said
    assert "hint: run the same command again to write that" in said and "--fresh" in said
    assert not (tmp_path / "out").exists()
    code, said = command("out")
    assert code == 0 and "was not finite at step 4: this is the state after step 3" in said
    summary = json.loads((tmp_path / "out" / "compresso.json").read_text())["report"]["summary"]
    assert summary["ended"] == "diverged" and summary["best_step"] == 3
    with (tmp_path / "out" / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert isnan(float(rows[4]["loss"])) and not rows[4]["heldout_loss"]
    assert summary["ppl_healed"] == pytest.approx(float(rows[3]["heldout_ppl"]), rel=1e-4)
    code, said = command("out", "--rate", "0.001")
    assert code == 3


def test_a_lower_rate_needs_fresh_as_the_hint_says(command, tmp_path, monkeypatch):
    assert command("out", "--rate", "1e38")[0] == 4
    assert "--fresh" in command("out", "--rate", "0.01")[1]
    assert command("out", "--rate", "0.01", "--fresh")[0] == 0


def test_a_disk_that_fills_up_keeps_the_state_before(command, tmp_path, monkeypatch):
    assert command("whole")[0] == 0
    write, left = kept.write_safetensors, [3]

    def full(file, *values):
        left[0] -= 1
        if not left[0]:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, *values)

    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_safetensors", full)
        code, said = command("out")
    assert code == 5 and "training.safetensors`: No space left on device" in said
    assert "hint: make room" in said
    assert [path.name for path in (tmp_path / "out.partial" / "work").iterdir()] == [
        "training.safetensors"
    ]
    seen, measure = [], Share.measure

    def watched(self, sequences, rows, step, *, backward):
        seen.append((step, backward))
        return measure(self, sequences, rows, step, backward=backward)

    monkeypatch.setattr(Share, "measure", watched)
    assert command("out")[0] == 0
    assert seen[0] == (2, True)  # the third step
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
