"""Writing where it must not or cannot be done: nothing is lost, and the error says what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CONFIG, NAMES, finished, part

from compresso.checkpoint import writer as writer_module
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError, ResourceError

# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_the_target_exists(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "m"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="m` already exists") as caught:
        CheckpointWriter(target, key="k", parts=1, fresh=True)
    assert "-o" in str(caught.value.hint)
    assert not (tmp_path / "m.partial").exists()


def test_the_target_appears_meanwhile(tmp_path: Path) -> None:
    writer = finished(tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        writer.publish()
    assert (writer.partial / "config.json").is_file()


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(CheckpointError, match="is not an unfinished checkpoint"):
            CheckpointWriter(tmp_path / "m", key="k", parts=1, fresh=fresh)
    assert [path.name for path in (tmp_path / "m.partial").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("fresh", [False, True])
def test_two_processes_at_once(tmp_path: Path, fresh: bool) -> None:
    with CheckpointWriter(tmp_path / "m", key="k", parts=1) as writer:
        writer.commit(0, part(0), {})
    script = f"""
import fcntl, sys
file = open({str(writer.partial / "key")!r}, "a+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="another process is writing"):
            CheckpointWriter(tmp_path / "m", key="k", parts=1, fresh=fresh)
        other.communicate("")
    with CheckpointWriter(tmp_path / "m", key="k", parts=1) as writer:
        assert writer.restore(0) is not None


def test_the_writer_holds_its_lock_until_it_is_closed(tmp_path: Path) -> None:
    script = f"""
import fcntl
fcntl.lockf(open({str(tmp_path / "m.partial" / "key")!r}, "a+b"), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""

    def try_to_lock() -> int:
        return subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True
        ).returncode

    writer = finished(tmp_path / "m")
    writer.restore(0)
    assert try_to_lock() != 0
    writer.close()
    assert try_to_lock() == 0


# ---------------------------------------------------------------- a full or read-only disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_no_room_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=2)
    writer.commit(0, part(0), {})

    def fail(file: Any, *_: object) -> None:
        file.write(b"some of it")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_safetensors", fail)
        with pytest.raises(ResourceError) as caught:
            writer.commit(1, part(1), {})
    assert f"m.partial/model-00002-of-00002.safetensors`: {os.strerror(code)}" in str(caught.value)
    assert "kept" in str(caught.value.hint) and "same command again" in str(caught.value.hint)
    assert sorted(path.name for path in writer.partial.iterdir()) == [
        "key",
        "model-00001-of-00002.safetensors",
        "report-00001.json",
        "report-00002.json",
    ]
    assert writer.restore(1) is None
    writer.commit(1, part(1), {})
    assert writer.restore(1) is not None


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device /dev/full fails every write as a full disk does."""
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)
    (writer.partial / "model-00001-of-00001.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="No space left on device"):
        writer.commit(0, {"a": torch.zeros(1 << 16)}, {})
    assert not list(writer.partial.glob("model*"))
    assert writer.restore(0) is None


def test_no_place_for_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*m.partial`: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "m", key="k", parts=1)


def test_no_room_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    side_files = {"sub/tokenizer.json": tmp_path / "tokenizer.json"}
    writer = finished(tmp_path / "m", side_files)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.shutil, "copyfileobj", fail)
        with pytest.raises(ResourceError, match=r"sub/tokenizer.json`: No space"):
            writer.finalize(config=CONFIG, side_files=side_files, expected=NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.os, "fsync", fail)
        with pytest.raises(ResourceError, match=r"compresso.json`: No space"):
            writer.write_record({})
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.os, "rename", fail)
        with pytest.raises(ResourceError, match="m`: No space"):
            writer.publish()
    writer.publish()
    assert (tmp_path / "m" / "sub" / "tokenizer.json").read_text() == "{}"
