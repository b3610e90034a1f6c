"""Writing: what is committed survives a kill, and a checkpoint appears whole or not at all."""

from __future__ import annotations

import io
import json
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from samples import CONFIG, NAMES, finished, part

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.shard_file import write_safetensors
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError

# ---------------------------------------------------------------- the format


def test_bytes_are_those_of_the_library() -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7),
        "é": torch.randn(()),
        "0": torch.empty(0),
    }
    file = io.BytesIO()
    write_safetensors(file, tensors, {"format": "pt"})
    assert file.getvalue() == safetensors.torch.save(tensors, {"format": "pt"})


def test_every_type_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}": torch.arange(6).to(dtype).reshape(2, 3)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
        )
    }
    with (tmp_path / "t").open("wb") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    read = safetensors.torch.load_file(tmp_path / "t")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())


def test_views_and_shared_memory_are_written_out(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.T,
        "whole": base,
        "row": base[1],
        "step": base[:, ::2],
        "e": base[:1].expand(3, 6),
    }
    parameter = torch.nn.Parameter(base)
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)
    writer.commit(0, {**tensors, "p": parameter, "again": base}, {})
    restored = writer.restore(0)
    assert restored is not None
    for name, tensor in {**tensors, "p": base, "again": base}.items():
        assert torch.equal(restored[0][name], tensor)
    assert parameter.requires_grad and torch.equal(base, torch.arange(24.0).reshape(4, 6))


# ---------------------------------------------------------------- a whole checkpoint


def test_a_published_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "source" / "original").mkdir(parents=True)
    side_files = {}
    for name, data in {"tokenizer.json": b"\x00\xff", "original/params.json": b"{}\r\n"}.items():
        side_files[name] = tmp_path / "source" / name
        side_files[name].write_bytes(data)
    target = tmp_path / "runs" / "m"
    writer = finished(target, side_files)
    writer.write_record({"key": "k"})
    assert not target.exists()
    writer.publish()
    assert not writer.partial.exists()
    files = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
    )
    assert files == [
        "compresso.json",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "original/params.json",
        "tokenizer.json",
    ]
    for name, source in side_files.items():
        assert (target / name).read_bytes() == source.read_bytes()
    checkpoint = Checkpoint(target)
    assert checkpoint.config == CONFIG
    assert checkpoint.key == "k"
    loaded = checkpoint.load(NAMES)
    for index in range(3):
        for name, tensor in part(index).items():
            assert torch.equal(loaded[name], tensor)
            assert checkpoint.info(name).shard == f"model-0000{index + 1}-of-00003.safetensors"
    written = json.loads((target / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == checkpoint.stored_bytes == 3 * (96 + 5)
    with safe_open(target / "model-00002-of-00003.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_files_have_the_usual_access_rights(tmp_path: Path) -> None:
    finished(tmp_path / "m").publish()
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert modes == {usual}


def test_a_missing_part(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=3)
    writer.commit(0, part(0), {})
    writer.commit(2, part(2), {})
    with pytest.raises(CheckpointError, match="part 2 of 3 was not written"):
        writer.finalize(config=CONFIG, side_files={}, expected=NAMES)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([*NAMES, "zz", "lm_head.weight"], "2 tensors were not written, first `lm_head.weight`"),
        (NAMES[:-1], "1 tensors are not expected, first `layers.2.codes`"),
    ],
)
def test_the_wrong_tensors(tmp_path: Path, expected: list[str], message: str) -> None:
    writer = finished(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        writer.finalize(config=CONFIG, side_files={}, expected=expected)
    assert not (tmp_path / "m").exists()


def test_a_doubled_tensor(tmp_path: Path) -> None:
    writer = finished(tmp_path / "m")
    writer.commit(1, part(0), {})
    with pytest.raises(CheckpointError, match=r"`layers.0.codes` was written to both"):
        writer.finalize(config=CONFIG, side_files={}, expected=NAMES)


def test_a_part_out_of_range(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=3)
    for index in (-1, 3):
        with pytest.raises(ValueError, match="part"):
            writer.commit(index, {}, {})


# ---------------------------------------------------------------- continuing


def test_a_committed_part_is_restored(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", key="k", parts=3) as first:
        assert first.restore(1) is None
        first.commit(1, part(1), {"loss": 0.5, "list": [1, None]})
    for leftover in ("model-00003-of-00003.safetensors.tmp", "spilled", "sub/tokenizer.json"):
        (first.partial / leftover).parent.mkdir(exist_ok=True)
        (first.partial / leftover).write_text("half")
    second = CheckpointWriter(tmp_path / "m", key="k", parts=3)
    restored = second.restore(1)
    assert restored is not None
    tensors, report = restored
    assert report == {"loss": 0.5, "list": [1, None]}
    assert set(tensors) == set(part(1))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in part(1).items())
    assert second.restore(0) is None and second.restore(2) is None
    left = sorted(path.name for path in second.partial.iterdir())
    assert left == ["key", "model-00002-of-00003.safetensors", "report-00002.json"]


def test_a_part_does_not_depend_on_its_report(tmp_path: Path) -> None:
    written = []
    for seconds in (1.25, 9.75):
        writer = CheckpointWriter(tmp_path / f"{seconds}", key="k", parts=1)
        writer.commit(0, part(0), {"seconds": seconds})
        written.append((writer.partial / "model-00001-of-00001.safetensors").read_bytes())
    assert written[0] == written[1]


def test_another_number_of_parts(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", key="k", parts=5) as writer:
        writer.resize(2)
        writer.commit(0, part(0), {"n": 0})
        writer.resize(2)
        with pytest.raises(ValueError, match="5 parts cannot follow parts of 2"):
            writer.resize(5)
    with CheckpointWriter(tmp_path / "m", key="k", parts=5) as writer:
        assert writer.restore(0) is not None and writer.restore(1) is None
        writer.resize(2)
        writer.commit(1, part(1), {"n": 1})
        writer.finalize(config=CONFIG, side_files={}, expected=[*part(0), *part(1)])
        writer.publish()
    assert Checkpoint(tmp_path / "m").info("layers.1.codes").shard.endswith("-of-00002.safetensors")


def test_a_kill_in_the_middle_of_a_commit(tmp_path: Path) -> None:
    """A process that dies by SIGKILL while it writes leaves the earlier part, and no half one."""
    script = f"""
import os, signal, torch
from pathlib import Path
from compresso.checkpoint import writer
w = writer.CheckpointWriter(Path({str(tmp_path / "m")!r}), key="k", parts=2)
w.commit(0, {{"a": torch.arange(4.0)}}, {{"n": 1}})
writer.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
w.commit(1, {{"b": torch.arange(4.0)}}, {{}})
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "m.partial").glob("*.tmp")]
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=2)
    restored = writer.restore(0)
    assert restored is not None and restored[0]["a"].tolist() == [0, 1, 2, 3]
    assert writer.restore(1) is None
    writer.commit(1, {"b": torch.arange(4.0)}, {})
    writer.finalize(config=CONFIG, side_files={}, expected=["a", "b"])
    writer.publish()
    assert Checkpoint(tmp_path / "m").names() == ["a", "b"]
    assert not list((tmp_path / "m").glob("*.tmp"))


def test_what_a_different_run_left(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", key="one", parts=3) as writer:
        writer.commit(0, part(0), {})
    for other in ({"key": "two", "parts": 3}, {"key": "one", "parts": 4}):
        with pytest.raises(CheckpointError, match="left by a different run") as caught:
            CheckpointWriter(tmp_path / "m", **other)  # type: ignore[arg-type]
        assert "--fresh" in str(caught.value.hint)
    with CheckpointWriter(tmp_path / "m", key="one", parts=3) as writer:
        assert writer.restore(0) is not None


@pytest.mark.parametrize("key", ["one", "two"])
def test_starting_afresh(tmp_path: Path, key: str) -> None:
    with CheckpointWriter(tmp_path / "m", key="one", parts=3) as writer:
        writer.commit(0, part(0), {})
        (writer.partial / "sub").mkdir()
        (writer.partial / "sub" / "file").write_text("")
    with CheckpointWriter(tmp_path / "m", key=key, parts=3, fresh=True) as writer:
        assert writer.restore(0) is None
        assert [path.name for path in writer.partial.iterdir()] == ["key"]
        writer.commit(1, part(1), {})
    with CheckpointWriter(tmp_path / "m", key=key, parts=3) as writer:
        assert writer.restore(1) is not None


def test_a_damaged_part(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "m", key="k", parts=1)
    writer.commit(0, part(0), {})
    path = writer.partial / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.safetensors` is damaged"):
        writer.restore(0)


def test_a_state_outlives_a_run_that_stops(tmp_path):
    with CheckpointWriter(tmp_path / "out", key="k", parts=1) as writer:
        assert writer.recall() is None
        writer.remember({"step": 1})
        writer.remember({"step": 2})
    with CheckpointWriter(tmp_path / "out", key="k", parts=1) as writer:
        assert writer.recall() == {"step": 2}
    with CheckpointWriter(tmp_path / "out", key="k", parts=1, fresh=True) as writer:
        assert writer.recall() is None
        writer.remember({"step": 3})
        writer.commit(0, {"a": torch.ones(2)}, {})
        writer.finalize(config={}, side_files={}, expected=["a"])
        writer.publish()
    assert not (tmp_path / "out" / "state.json").exists()
