"""What a bare command reads and where it writes."""

import json

import pytest

from compresso.errors import CheckpointError
from compresso.provenance import KEYS, read_record
from compresso.workspace import check_output, newest_checkpoint, next_target


def make(path, created, *, checkpoint=True):
    path.mkdir(parents=True)
    (path / "compresso.json").write_text(json.dumps(dict.fromkeys(KEYS) | {"created": created}))
    if checkpoint:
        (path / "config.json").write_text("{}")
    return path


def test_newest_is_by_the_recorded_time_at_both_depths(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None
    first = make(tmp_path / "01-prune-shortgpt", "2026-01-02T00:00:00+00:00")
    assert newest_checkpoint(tmp_path) == first
    deep = make(tmp_path / "recipe" / "02-quantize-gptq", "2026-01-03T00:00:00+00:00")
    make(tmp_path / "09-prune-tail", "2026-01-01T00:00:00+00:00")
    assert newest_checkpoint(tmp_path) == deep


def test_what_is_no_finished_checkpoint_is_never_newest(tmp_path):
    good = make(tmp_path / "01-prune-shortgpt", "2026-01-01")
    late = "2027-01-01"
    export = make(tmp_path / "05-export-dense", late) / "compresso.json"
    record = json.loads(export.read_text()) | {"step": {"stage": "export", "method": "dense"}}
    export.write_text(json.dumps(record))
    make(tmp_path / "02-eval-standard", late, checkpoint=False)
    make(tmp_path / "03-quantize-gptq.partial", late)
    make(tmp_path / "a" / "b" / "c", late)
    (tmp_path / "04-foreign").mkdir()
    (tmp_path / "04-foreign" / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == good


def test_targets_are_numbered(tmp_path):
    assert next_target("eval-standard", tmp_path / "absent").name == "01-eval-standard"
    make(tmp_path / "01-prune-shortgpt", "")
    make(tmp_path / "07-eval-standard", "", checkpoint=False)
    make(tmp_path / "recipe" / "12-x", "")
    (tmp_path / "note.txt").write_text("9")
    assert next_target("eval-standard", tmp_path) == tmp_path / "08-eval-standard"


def test_an_unfinished_output_is_taken_up_again(tmp_path):
    make(tmp_path / "01-prune-shortgpt", "")
    (tmp_path / "02-quantize-gptq.partial").mkdir()
    assert next_target("quantize-gptq", tmp_path).name == "02-quantize-gptq"
    # Another stage does not count it, nor does one of this stage that has ended since.
    assert next_target("eval-standard", tmp_path).name == "02-eval-standard"
    make(tmp_path / "02-quantize-gptq", "")
    assert next_target("quantize-gptq", tmp_path).name == "03-quantize-gptq"
    (tmp_path / "04-eval-standard.partial-77").mkdir()
    assert next_target("eval-standard", tmp_path).name == "03-eval-standard"


def test_an_output_never_replaces_what_is_not_its_own(tmp_path):
    check_output(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(make(tmp_path / "ours", ""))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(CheckpointError, match="was not made by compresso"):
        check_output(tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    assert read_record(tmp_path) == {}
    (tmp_path / "compresso.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(tmp_path)
    for text in ("[]", '{"key": "k"}'):
        (tmp_path / "compresso.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not a record"):
            read_record(tmp_path)
