"""Uploading, with a stand-in for the hub's interface: what would go, and what goes."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
from correcting import RUNTIME, corrections, put_beside, run_quantize
from huggingface_hub.errors import LocalTokenNotFoundError
from tiny_checkpoint import save_tiny
from typer.testing import CliRunner

from compresso.card import CARD, front_matter
from compresso.checkpoint.checksums import altered
from compresso.checkpoint.reader import Checkpoint
from compresso.cli import make_app
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.provenance import read_record
from compresso.push import make_upload, push
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.settings import CalibrationSettings

USUAL = {"method": "rtn", "bits": 4, "group_size": 32}


class StandIn:
    """Keeps what it is asked for. `failing`: what it raises, by the method that does."""

    calls: list
    failing: dict

    def __init__(self, **_):
        pass

    def _do(self, name, *arguments, **options):
        self.calls.append((name, arguments, options))
        if name in self.failing:
            raise self.failing[name]

    def create_repo(self, repository, **options):
        self._do("create_repo", repository, **options)
        return f"https://huggingface.co/{repository}"

    def create_branch(self, repository, **options):
        self._do("create_branch", repository, **options)

    def create_commit(self, repository, operations, **options):
        self._do("create_commit", repository, operations, **options)


@pytest.fixture
def hub(monkeypatch):
    stand_in = type("Hub", (StandIn,), {"calls": [], "failing": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    run_quantize(Checkpoint(save_tiny(root / "tiny")), root / "packed", **USUAL)
    return root / "packed"


def options(**changes):
    return {"private": True, "revision": None, "message": "m", **changes}


def test_everything_goes_in_one_commit(packed, hub):
    upload = make_upload(packed, "me/tiny-4")
    address = push(upload, **options(revision="next", private=False))
    names = [name for name, *_ in hub.calls]
    assert names == ["create_repo", "create_branch", "create_commit"]
    assert address == "https://huggingface.co/me/tiny-4"
    assert hub.calls[0][2] == {"private": False, "exist_ok": True}
    (repository, operations), settings = hub.calls[2][1:]
    assert repository == "me/tiny-4" and settings == {"commit_message": "m", "revision": "next"}
    there = {operation.path_in_repo: operation for operation in operations}
    here = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert set(there) == here == set(upload.sizes())
    for name, operation in there.items():
        content = operation.path_or_fileobj
        if name not in upload.changed:
            assert content == str(packed / name)
    assert there[CARD].path_or_fileobj.decode().count('"me/tiny-4"') == 2


def test_no_path_of_this_machine_goes(packed, tmp_path, hub, monkeypatch):
    base = Checkpoint(packed)
    source = put_beside(base, tmp_path / "beside", corrections(base), monkeypatch)
    upload = make_upload(source.path, "me/tiny-4")
    push(upload, **options())
    root = str(packed.parent)
    assert root in (source.path / "compresso.json").read_text()
    for content in upload.changed.values():
        assert root not in content.decode() and str(tmp_path) not in content.decode()
    adapter = json.loads(upload.changed["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "me/tiny-4"
    assert 'subfolder="adapter"' in upload.changed[CARD].decode()


def test_what_goes_is_what_its_record_says(packed, tmp_path, monkeypatch):
    """Also of a file that is changed for it: what is downloaded passes `verify`."""
    base = Checkpoint(packed)
    source = put_beside(base, tmp_path / "beside", corrections(base), monkeypatch)
    upload = make_upload(source.path, "me/tiny-4")
    for name, file in upload.files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "there" / name)
    for name, content in upload.changed.items():
        (tmp_path / "there" / name).write_bytes(content)
    record = read_record(tmp_path / "there")
    assert "adapter/adapter_config.json" in record["sha256"]
    assert altered(tmp_path / "there", record["sha256"]) == {"changed": [], "gone": []}
    assert "sha256" not in record["parent"] and "fingerprint" not in record["parent"]


def test_an_evaluation_is_in_the_card(packed):
    text = packed.parent / "text.txt"
    text.write_text("what is said here is said again. " * 60)
    values = {"dataset": str(text), "samples": 2, "length": 16, "speed": False}
    step = make_step("eval", values, where="test")
    target = packed.parent / "eval"
    run_step(step, Checkpoint(packed), CalibrationSettings(), target, RUNTIME)
    for given in (None, target):
        card = make_upload(packed, "me/x", evaluation=given).changed[CARD].decode()
        line = next(line for line in card.splitlines() if line.startswith("| perplexity |"))
        assert line.count("±") == 2
        assert "| KL to the original (nats) |" in card
    with pytest.raises(ConfigError, match="is no evaluation of"):
        make_upload(packed, "me/x", evaluation=packed)
    with pytest.raises(CheckpointError, match="holds no weights"):
        make_upload(target, "me/x")


def test_the_base_can_be_named(packed):
    card = make_upload(packed, "me/x", base="org/tiny").changed[CARD].decode()
    assert front_matter(card)["base_model"] == "org/tiny"
    assert "[org/tiny](https://huggingface.co/org/tiny)" in card


@pytest.mark.parametrize(
    ("name", "error", "kind", "message"),
    [
        ("create_repo", LocalTokenNotFoundError("no"), ResourceError, "nobody is logged in"),
        ("create_commit", ConnectionError("refused"), ResourceError, "was not uploaded: refused"),
        ("create_commit", OSError("disk"), ResourceError, "was not uploaded: disk"),
    ],
)
def test_what_can_go_wrong(name, error, kind, message, packed, hub):
    hub.failing[name] = error
    with pytest.raises(kind, match=message) as caught:
        push(make_upload(packed, "me/x"), **options())
    assert caught.value.hint


def test_what_is_refused(packed, tmp_path):
    for name in ("tiny", "a/b/c", "/x", "me/.x"):
        with pytest.raises(ConfigError, match="is no name for a repository"):
            make_upload(packed, name)
    with pytest.raises(CheckpointError, match="is no output of compresso"):
        make_upload(tmp_path, "me/x")


def test_the_command(packed, hub):
    run = CliRunner().invoke
    done = run(make_app(), ["push", str(packed), "me/x", "--dry-run"])
    assert done.exit_code == 0 and not hub.calls
    assert "config.json" in done.stdout and "# tiny: quantize rtn" in done.stdout
    done = run(make_app(), ["push", str(packed), "me/x", "--dry-run", "--json"])
    found = json.loads(done.stdout)
    assert found["private"] and CARD in found["files"] and found["card"].startswith("---")
    done = run(make_app(), ["push", str(packed), "me/x", "--no-private"])
    assert done.stdout.strip() == "https://huggingface.co/me/x"
    assert not hub.calls[0][2]["private"] and len(hub.calls) == 2
