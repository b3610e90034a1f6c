"""Names of models: what they stand for, and what is said when they stand for nothing."""

from __future__ import annotations

from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors
from samples import single, weights

import compresso
from compresso.checkpoint.reader import open_checkpoint
from compresso.errors import CheckpointError, ResourceError


def test_open_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = single(tmp_path / "org@2")
    assert open_checkpoint(str(path)).path == path
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org@2").names() == sorted(weights())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/org@2").path == path


def test_open_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    single(tmp_path / "reference")
    monkeypatch.setattr(compresso, "__file__", str(tmp_path / "__init__.py"))
    assert open_checkpoint("reference").path == tmp_path / "reference"


def test_a_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "01-prune").mkdir(parents=True)
    (tmp_path / "runs" / "file").write_text("")
    for name, hint in {
        "runs/01-prun": "did you mean `runs/01-prune`?",
        "run": "did you mean `runs`?",
        "./absent/x/y": "there is no `absent/x` either",
        "gpt9": "hub models are given as `org/name`",
    }.items():
        with pytest.raises(CheckpointError, match="no checkpoint directory") as caught:
            open_checkpoint(name)
        assert hint in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="`runs/file` is a file") as caught:
        open_checkpoint("runs/file")
    assert "the directory" in str(caught.value.hint)


def test_open_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    path = single(tmp_path / "snapshot")
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.bin" in ignore_patterns and "*.pth" in ignore_patterns
        assert "*.safetensors" not in ignore_patterns
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("org/name").path == path
    open_checkpoint("org/name@abc")
    open_checkpoint("org/name", revision="main")
    assert asked == [("org/name", None), ("org/name", "abc"), ("org/name", "main")]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))
    cases: list[tuple[Exception, str]] = [
        (errors.OfflineModeIsEnabled("off"), "hub cannot be reached"),
        (errors.LocalEntryNotFoundError("none"), "hub cannot be reached"),
        (errors.RevisionResolutionError("none"), "hub cannot be reached"),
        (errors.HfHubHTTPError("500", response=response), "hub cannot be reached"),
        (httpx2.ConnectError("no route"), "hub cannot be reached"),
        (ConnectionError("reset"), "hub cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=response), "no model `org/name`"),
        (errors.GatedRepoError("403", response=response), "must be granted"),
        (errors.RevisionNotFoundError("404", response=response), "no revision `r1`"),
        (errors.HFValidationError("bad"), "neither a directory nor a hub name"),
    ]
    for error, message in cases:

        def fail(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint("org/name@r1")
        assert "local directory" in str(caught.value.hint)


def test_a_full_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ResourceError, match="No space left"):
        open_checkpoint("org/name")
