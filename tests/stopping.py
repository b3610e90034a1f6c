"""A run that is stopped once it has committed a part."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compresso.checkpoint.writer import CheckpointWriter


def stopped_after(part: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Run it, and stop it when it has committed `part`."""
    commit = CheckpointWriter.commit

    def stop(self, number, tensors, report, **beside):
        commit(self, number, tensors, report, **beside)
        if number == part:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "commit", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run()
