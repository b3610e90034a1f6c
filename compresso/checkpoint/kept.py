"""State of long work, kept beside an unfinished checkpoint, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from compresso.checkpoint.directory import open_shard
from compresso.checkpoint.shard_file import flush_directory, write_safetensors
from compresso.errors import ResourceError

VALUES = "values"


class KeptState:
    """Tensors and plain values by name: files of a directory, each whole or not there."""

    def __init__(self, directory: Path, *, writes: bool = True) -> None:
        """directory: made if need be. writes: False for a process that only reads."""
        self.directory = directory
        self._writes = writes

    def keep(self, name: str, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Store durably, in place of what was stored by that name before.

        tensors: on any device. Not modified. values: plain.

        Raises ResourceError, and leaves what was stored before, if the disk is full or read-only.
        """
        if not self._writes:
            return
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            self.directory.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                write_safetensors(file, dict(tensors), {VALUES: json.dumps(values)})
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_directory(self.directory)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise ResourceError(
                f"cannot write `{path}`: {error.strerror}",
                hint="make room, or give access, and run the same command again",
            ) from error

    def values(self, name: str) -> dict[str, Any] | None:
        """The plain values that were stored last by that name; None if nothing was.

        Raises CheckpointError if the file is damaged.
        """
        if not self._path(name).exists():
            return None
        with self._open(name) as shard:
            values: dict[str, Any] = json.loads(shard.metadata()[VALUES])
        return values

    def kept(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was stored last by that name, also by an earlier run; None if nothing was.

        Raises CheckpointError if it is damaged.
        """
        if (values := self.values(name)) is None:
            return None
        with self._open(name) as shard:
            names = shard.keys()
            return {one: shard.get_tensor(one).clone() for one in names}, values

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _open(self, name: str) -> AbstractContextManager[Any]:
        return open_shard(self._path(name), hint="pass `--fresh` to start over")
