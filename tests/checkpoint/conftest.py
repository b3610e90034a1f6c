"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import SMALL, fingerprint, make
from transformers import LlamaConfig

from compresso.checkpoint.proof import Fingerprint


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Fingerprint]:
    """A saved model, and what it says in memory."""
    path = tmp_path / "m"
    return path, fingerprint(make(path, LlamaConfig(**SMALL)))
