"""Fixtures for every test: one thread, and tiny checkpoints of every family."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS, build
from transformers import PreTrainedModel

from compresso.__main__ import main
from compresso.checkpoint.reader import Checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models crawl on many threads."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(TINY_MODELS))
def family_name(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def models() -> Callable[[str], PreTrainedModel]:
    """The tiny model of a family, built once: leave it as it is."""
    built: dict[str, PreTrainedModel] = {}

    def model_of(family: str) -> PreTrainedModel:
        if family not in built:
            built[family] = build(family)
        return built[family]

    return model_of


@pytest.fixture(scope="session")
def checkpoints(
    models: Callable[[str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Checkpoint]:
    """The checkpoint of a family's tiny model, saved once: leave its files as they are."""
    saved: dict[str, Path] = {}

    def checkpoint_of(family: str) -> Checkpoint:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp("tiny") / family
            models(family).save_pretrained(saved[family])
        return Checkpoint(saved[family])

    return checkpoint_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and a terminal wide enough not to wrap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[object, str, str]]]:
    """Run a command as `compresso` does: its exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["compresso", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)
