"""Write a checkpoint part by part, so that a killed run can continue.

While it runs, everything is in `<target>.partial/`; `publish` renames that to `<target>`. A part
is written under a temporary name, flushed to the disk and renamed, so it is there only when whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch import Tensor

from compresso.checkpoint.directory import CONFIG, INDEX, RECORD, open_shard, read_shard
from compresso.checkpoint.shard_file import flush_directory, remove, write_safetensors
from compresso.errors import CheckpointError, ResourceError

STAMP = "key"
TEMPORARY = ".tmp"
PARTS = "model-*-of-*.safetensors"
REPORTS = "report-{}.json"
BESIDE = "beside-{}.safetensors"
STATE = "state.json"
WORK = "work"  # a directory, for what a stage computes once and needs until it is done
# What stays until the checkpoint is published, besides parts.
KEPT = (REPORTS.format("*"), BESIDE.format("*"), STATE, WORK)
START_OVER = "pass `--fresh` to start over"


class CheckpointWriter:
    """Parts are durable after `commit`; the checkpoint exists only after `publish`.

    Only one process can work on a target at a time. Use it as a context manager, or call
    `close`, to let go of the target before the process ends.
    """

    def __init__(self, target: Path, *, key: str, parts: int, fresh: bool = False) -> None:
        """Start `target`, or continue what a run with the same key left.

        key:   names the work being done; other work must not continue it.
        parts: how many parts the checkpoint will have, at least 1.
        fresh: throw away what an earlier run left.

        Raises CheckpointError if `target` exists, another process is writing it, or different
        work left its partial directory; ResourceError if nothing can be written there.
        """
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self._parts = parts
        if os.path.lexists(target):
            raise CheckpointError(
                f"`{target}` already exists", hint="remove it, or give another `-o`"
            )
        with self._writing(self.partial):
            existed = self.partial.is_dir() and any(self.partial.iterdir())
            self.partial.mkdir(parents=True, exist_ok=True)
            if existed and not (self.partial / STAMP).is_file():
                raise CheckpointError(
                    f"`{self.partial}` is not an unfinished checkpoint",
                    hint="move it away, or give another `-o`",
                )
            self._stamp = self._lock()
            self._begin(f"{key} {parts}\n", fresh=fresh)
            for path in self.partial.glob(PARTS):
                self._parts = int(path.stem.rpartition("-")[2])

    def resize(self, parts: int) -> None:
        """Say how many parts there will be, where the work has found that out itself.

        Raises ValueError if a part of another number of parts is committed.
        """
        if parts != self._parts and any(self.partial.glob(PARTS)):
            raise ValueError(f"{parts} parts cannot follow parts of {self._parts}")
        self._parts = parts

    def restore(self, part: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the report of a committed part, or None if it is not committed.

        part: from 0. Raises CheckpointError if the part is damaged.
        """
        if not self._committed(part):
            return None
        report = self._report_path(part)
        return read_shard(self._path(part), hint=START_OVER), json.loads(report.read_bytes())

    def restore_beside(self, part: int) -> dict[str, Tensor] | None:
        """What a part was committed with beside its tensors, or None if it is not committed.

        part: from 0. Raises CheckpointError if it is damaged.
        """
        path = self._beside_path(part)
        if not self._committed(part):
            return None
        return read_shard(path, hint=START_OVER) if path.exists() else {}

    def commit(
        self,
        part: int,
        tensors: dict[str, Tensor],
        report: dict[str, Any],
        *,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store a part durably.

        part:    from 0. tensors: as they shall be stored, by their names in the checkpoint; may
                 be views, share memory or be on any device. Not modified. report: plain values.
        beside:  likewise, what is to be known of the part until the checkpoint is published, but
                 is no part of that.

        Raises ResourceError, and keeps the earlier parts, if the disk is full or read-only.
        """
        # Beside the shard, not in it: reports hold times, and a shard is to depend on its weights
        # alone. The shard comes last, as its presence says that the part is whole.
        self._write_json(self._report_path(part).name, report)
        if beside:
            with self._replacing(self._beside_path(part)) as file:
                write_safetensors(file, dict(beside), {"format": "pt"})
        else:  # of a commit that did not come to its shard
            self._beside_path(part).unlink(missing_ok=True)
        with self._replacing(self._path(part)) as file:
            write_safetensors(file, tensors, {"format": "pt"})

    def remember(self, state: dict[str, Any]) -> None:
        """Store durably how far a search has come, in place of what was stored before.

        state: plain values. Raises ResourceError as `commit` does.
        """
        self._write_json(STATE, state)

    def recall(self) -> dict[str, Any] | None:
        """What was remembered last, also by an earlier run; None if nothing was."""
        path = self.partial / STATE
        if not path.exists():
            return None
        state: dict[str, Any] = json.loads(path.read_bytes())
        return state

    def finalize(
        self, *, config: dict[str, Any], side_files: dict[str, Path], expected: Iterable[str]
    ) -> None:
        """Add everything but the weights, once all parts are committed.

        config:     becomes config.json. side_files: name within the checkpoint -> file to copy.
        expected:   names of all tensors that the checkpoint must hold.

        Raises CheckpointError if a tensor is missing, is there twice or is not expected.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for part in range(self._parts):
            path = self._path(part)
            if not path.exists():
                raise CheckpointError(f"part {part + 1} of {self._parts} was not written")
            with open_shard(path) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                    if name in weight_map:
                        raise CheckpointError(
                            f"`{name}` was written to both `{weight_map[name]}` and `{path.name}`"
                        )
                    weight_map[name] = path.name
                    total += shard.get_tensor(name).nbytes
        wanted = set(expected)
        if missing := sorted(wanted - set(weight_map)):
            raise CheckpointError(f"{len(missing)} tensors were not written, first `{missing[0]}`")
        if extra := sorted(set(weight_map) - wanted):
            raise CheckpointError(f"{len(extra)} tensors are not expected, first `{extra[0]}`")
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json(INDEX, index)
        self._write_json(CONFIG, config)
        for name, source in side_files.items():
            path = self.partial / name
            with self._writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as original, self._replacing(path) as file:
                shutil.copyfileobj(original, file)

    def write_record(self, record: dict[str, Any]) -> None:
        """Write compresso.json: how the checkpoint was made."""
        self._write_json(RECORD, record)

    def publish(self) -> None:
        """Rename the finished directory to `target`, in one step, and let go of it.

        Raises CheckpointError if `target` came into being meanwhile.
        """
        with self._writing(self.target):
            if os.path.lexists(self.target):
                raise CheckpointError(f"`{self.target}` already exists")
            os.rename(self.partial, self.target)
            for name in (*KEPT, STAMP):  # of no use to others, and no harm if left
                for path in self.target.glob(name):
                    remove(path)
            flush_directory(self.target.parent)
        self.close()

    def close(self) -> None:
        """Let another process continue; what was committed stays, and nothing if nothing was."""
        if not self._stamp.closed and [path.name for path in self.partial.glob("*")] == [STAMP]:
            shutil.rmtree(self.partial)
        self._stamp.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _committed(self, part: int) -> bool:
        return self._path(part).exists() and self._report_path(part).exists()

    def _path(self, part: int) -> Path:
        if not 0 <= part < self._parts:
            raise ValueError(f"part {part} of {self._parts}")
        return self.partial / f"model-{part + 1:05d}-of-{self._parts:05d}.safetensors"

    def _beside_path(self, part: int) -> Path:
        return self.partial / BESIDE.format(f"{part + 1:05d}")

    def _report_path(self, part: int) -> Path:
        return self.partial / REPORTS.format(f"{part + 1:05d}")

    def _lock(self) -> BinaryIO:
        stamp = (self.partial / STAMP).open("a+b")
        try:
            fcntl.lockf(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stamp.close()
            raise CheckpointError(
                f"another process is writing `{self.partial}`",
                hint="wait for it to end, or give another `-o`",
            ) from None
        return stamp

    def _begin(self, stamp: str, *, fresh: bool) -> None:
        """Check or write the stamp, and clear all that an earlier run left but whole parts."""
        self._stamp.seek(0)
        found = self._stamp.read().decode()
        if found and found != stamp and not fresh:
            self._stamp.close()
            raise CheckpointError(
                f"`{self.partial}` was left by a different run",
                hint="pass `--fresh` to throw it away, or give another `-o`",
            )
        for entry in self.partial.iterdir():
            committed = any(entry.match(name) for name in (PARTS, *KEPT))
            if entry.name == STAMP or (committed and not fresh):
                continue
            remove(entry)
        if found != stamp:
            self._stamp.truncate(0)
            self._stamp.write(stamp.encode())
            self._stamp.flush()
            os.fsync(self._stamp.fileno())
        flush_directory(self.partial.parent)

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        with self._replacing(self.partial / name) as file:
            file.write((json.dumps(values, indent=2) + "\n").encode())

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[BinaryIO]:
        """A file that becomes `path`, flushed, if the body succeeds, and vanishes if not."""
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            with self._writing(path):
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                flush_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"cannot write `{path}`: {error.strerror}",
                hint=f"what is done is kept in `{self.partial}`: make room, or give access, and "
                "run the same command again",
            ) from error
