"""What is kept beside a part while a checkpoint is written: durable, and gone at the end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CONFIG, part

from compresso.checkpoint import writer as writer_module
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import WORK, CheckpointWriter
from compresso.errors import CheckpointError, ResourceError

FACTORS = {"q.up": torch.arange(6.0).reshape(3, 2), "q.down": torch.ones(2, 5).bfloat16()}


def test_what_is_beside_a_part_outlives_a_run_and_is_not_published(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", key="k", parts=2) as writer:
        assert writer.restore_beside(0) is None
        writer.commit(0, part(0), {"n": 0}, beside=FACTORS)
        writer.commit(1, part(1), {"n": 1})
    with CheckpointWriter(tmp_path / "m", key="k", parts=2) as writer:
        beside = writer.restore_beside(0)
        assert beside is not None and set(beside) == set(FACTORS)
        for name, tensor in FACTORS.items():
            assert beside[name].dtype == tensor.dtype and torch.equal(beside[name], tensor)
        restored = writer.restore(0)
        assert restored is not None and set(restored[0]) == set(part(0))
        assert writer.restore_beside(1) == {}
        writer.finalize(config=CONFIG, side_files={}, expected=[*part(0), *part(1)])
        writer.publish()
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert Checkpoint(tmp_path / "m").names() == sorted([*part(0), *part(1)])


def test_a_fresh_start_forgets_it(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", key="k", parts=1) as writer:
        writer.commit(0, part(0), {}, beside=FACTORS)
    with CheckpointWriter(tmp_path / "m", key="k", parts=1, fresh=True) as writer:
        assert writer.restore_beside(0) is None
        assert [path.name for path in writer.partial.iterdir()] == ["key"]


def test_another_commit_replaces_it(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)
    writer.commit(0, part(0), {}, beside=FACTORS)
    writer.commit(0, part(0), {}, beside={"k.up": torch.zeros(1)})
    beside = writer.restore_beside(0)
    assert beside is not None and set(beside) == {"k.up"}
    writer.commit(0, part(0), {})
    assert writer.restore_beside(0) == {}


@pytest.mark.parametrize("flushed", [2, 4])  # of 0, 2 and 4 the report's, the factors', the shard's
def test_a_kill_before_the_part_is_whole(tmp_path: Path, flushed: int) -> None:
    script = f"""
import os, signal, torch
from pathlib import Path
from compresso.checkpoint import writer
w = writer.CheckpointWriter(Path({str(tmp_path / "m")!r}), key="k", parts=1)
calls, real = [], os.fsync
def fsync(file):
    calls.append(file)
    if len(calls) > {flushed}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)
writer.os.fsync = fsync
w.commit(0, {{"a": torch.arange(4.0)}}, {{}}, beside={{"up": torch.ones(2)}})
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "m.partial").iterdir()}
    assert ("beside-00001.safetensors" in names) == (flushed == 4)
    with CheckpointWriter(tmp_path / "m", key="k", parts=1) as writer:
        assert writer.restore(0) is None and writer.restore_beside(0) is None
        writer.commit(0, {"a": torch.arange(4.0)}, {})  # this time with nothing beside
        assert writer.restore_beside(0) == {}


def test_no_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)

    def fail(file: Any, *_: object) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_safetensors", fail)
        with pytest.raises(ResourceError, match=r"beside-00001.safetensors`: No space left"):
            writer.commit(0, part(0), {}, beside=FACTORS)
    assert writer.restore_beside(0) is None
    writer.commit(0, part(0), {}, beside=FACTORS)
    assert set(writer.restore_beside(0) or {}) == set(FACTORS)


def test_it_is_damaged(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)
    writer.commit(0, part(0), {}, beside=FACTORS)
    path = writer.partial / "beside-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"beside-00001.safetensors` is damaged"):
        writer.restore_beside(0)


def test_a_work_directory_stays_until_the_checkpoint_is_published(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", key="a", parts=1) as writer:
        (writer.partial / WORK).mkdir()
        (writer.partial / WORK / "notes").write_text("1")
    with CheckpointWriter(tmp_path / "out", key="a", parts=1) as writer:
        assert (writer.partial / WORK / "notes").read_text() == "1"
    with CheckpointWriter(tmp_path / "out", key="a", parts=1, fresh=True) as writer:
        assert not (writer.partial / WORK).exists()
        (writer.partial / WORK / "deep").mkdir(parents=True)
        writer.commit(0, {"a": torch.zeros(1)}, {})
        writer.finalize(config={}, side_files={}, expected=["a"])
        writer.publish()
    assert not (tmp_path / "out" / WORK).exists()
