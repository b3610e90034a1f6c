"""Token batches: what they hold, that they repeat, and what is refused."""

import json

import numpy as np
import pytest
import torch

from compresso.calibration.data import load_calibration, load_heldout, model_length
from compresso.calibration.stdlib import is_held_out, stdlib_files
from compresso.calibration.text import documents
from compresso.checkpoint.reader import open_checkpoint
from compresso.config import build
from compresso.errors import CheckpointError, ConfigError
from compresso.recipe import make_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.step_data import load_data, read_by


@pytest.fixture(scope="module")
def reference():
    return open_checkpoint("reference")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 200)
    return str(path)


def settings(**values):
    return build(CalibrationSettings, {"length": 32, "samples": 6} | values, where="test")


def test_crops_repeat_by_seed_and_come_from_the_text(reference, text):
    first = load_calibration(settings(dataset=text), reference)
    again = load_calibration(settings(dataset=text), reference)
    other = load_calibration(settings(dataset=text, seed=1), reference)
    assert first.key == again.key != other.key
    tokens = torch.cat(first.batches)
    assert tokens.shape == (6, 32) and tokens.dtype == torch.int64
    whole = torch.cat(load_heldout(settings(dataset=text), reference, whole=True).batches)
    stream = whole.reshape(-1).unfold(0, 32, 1)
    # Windows are every 32nd run of the same tokens; each crop stands somewhere in them.
    assert all((stream == crop).all(1).any() for crop in tokens[:3])


def test_counts_are_recorded(reference, text):
    record = load_calibration(settings(dataset=text, samples=5), reference).record
    assert (record["sequences_used"], record["tokens_used"]) == (5, 160)
    assert record["tokens_available"] > 160


def test_windows_are_in_order_without_the_tail(reference, text):
    whole = load_heldout(settings(dataset=text), reference, whole=True)
    windows = torch.cat(whole.batches)
    assert len(windows) == whole.record["tokens_available"] // 32
    some = torch.cat(load_heldout(settings(dataset=text, samples=4), reference).batches)
    assert torch.equal(some[0], windows[0])
    assert torch.equal(some[2], windows[2 * len(windows) // 4])


def test_batch_size_does_not_change_the_tokens(reference, text):
    one = load_calibration(settings(dataset=text, batch_size=1), reference)
    four = load_calibration(settings(dataset=text, batch_size=4), reference)
    assert one.key == four.key and len(one.batches) == 6 and len(four.batches) == 2


def test_token_file(reference, tmp_path):
    tokens = np.arange(320, dtype=np.uint16).reshape(10, 32)
    np.save(tmp_path / "t.npy", tokens)
    got = load_calibration(settings(dataset=str(tmp_path / "t.npy"), samples=10), reference)
    assert np.array_equal(torch.cat(got.batches).numpy(), tokens)
    with pytest.raises(CheckpointError, match=r"holds 10 sequences, fewer than the 11"):
        load_calibration(settings(dataset=str(tmp_path / "t.npy"), samples=11), reference)
    np.save(tmp_path / "big.npy", tokens + 5000)
    with pytest.raises(ConfigError, match=r"token 5191, but the model's vocabulary ends at 4095"):
        load_calibration(settings(dataset=str(tmp_path / "big.npy")), reference)
    np.save(tmp_path / "f.npy", np.zeros((2, 32)))
    with pytest.raises(CheckpointError, match="not token ids"):
        load_calibration(settings(dataset=str(tmp_path / "f.npy")), reference)
    (tmp_path / "x.npy").write_text("no array")
    with pytest.raises(CheckpointError, match="cannot be read as an array"):
        load_calibration(settings(dataset=str(tmp_path / "x.npy")), reference)


def test_bad_text(reference, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a b")
    with pytest.raises(CheckpointError, match="is empty"):
        load_calibration(settings(dataset=str(empty)), reference)
    with pytest.raises(CheckpointError, match="fewer than one sequence of 32"):
        load_calibration(settings(dataset=str(short)), reference)
    with pytest.raises(CheckpointError, match="no such file"):
        load_calibration(settings(dataset=str(tmp_path / "absent.txt")), reference)
    with pytest.raises(ConfigError, match="unknown dataset `wikitxt`"):
        load_calibration(settings(dataset="wikitxt"), reference)
    (tmp_path / "d").mkdir()
    with pytest.raises(CheckpointError, match="holds no text"):
        load_calibration(settings(dataset=str(tmp_path / "d")), reference)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(CheckpointError, match="as UTF-8"):
        load_calibration(settings(dataset=str(latin)), reference)


def test_json_lines_and_directories(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "b.json").write_text(json.dumps([{"text": "three"}]))
    (tmp_path / "c.txt").write_text("four")
    (tmp_path / "ignored.bin").write_text("five")
    assert list(documents(str(tmp_path), held_out=False)) == ["one", "two", "three", "four"]
    rows.write_text('{"body": "one"}\n')
    with pytest.raises(CheckpointError, match="row 1 has no `text`"):
        list(documents(str(rows), held_out=False))
    rows.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        list(documents(str(rows), held_out=False))


def test_parquet(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"), held_out=True)) == ["one", "two"]
    Dataset.from_dict({"body": ["one"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(CheckpointError, match="no `text` column"):
        list(documents(str(tmp_path / "b.parquet"), held_out=True))


def test_hub_datasets_are_joined_and_offline_is_said(monkeypatch):
    import datasets

    seen = []

    def load(path, name, **options):
        seen.append((path, name, options))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(documents("wikitext2", held_out=True)) == ["a\n\nb"]
    assert list(documents("some/set", held_out=False)) == ["a", "b"]
    assert seen[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})
    assert seen[1] == ("some/set", None, {"split": "train"})

    def offline(path, name, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CheckpointError, match="no route to host") as caught:
        list(documents("c4", held_out=False))
    assert "--dataset stdlib" in caught.value.hint


def test_the_standard_library_is_split_by_name():
    training = {name for name, _ in stdlib_files(held_out=False)}
    held_out = {name for name, _ in stdlib_files(held_out=True)}
    assert training and held_out and not training & held_out
    assert all(is_held_out(name) for name in held_out)
    assert "json/decoder.py" in training | held_out
    assert not any(name.startswith("test/") for name in training)


def test_length_follows_the_model():
    assert model_length({"max_position_embeddings": 1024}) == 1024
    assert model_length({"n_positions": 131072}) == 2048
    assert model_length({}) == 2048


def repair_data(method, reference, directory, **values):
    """The sequences that `compensate` reads: to learn from, and to judge by."""
    step = make_step("compensate", {"method": method}, where="test")
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    found = torch.cat(load_data(step, reference, settings(**values), runtime, directory).batches)
    heldout = round(step.settings.heldout_share * len(found))
    return found[:-heldout], found[-heldout:]


@pytest.mark.parametrize("method", ["rilq", "lrec"])
def test_held_out_crops_are_of_text_that_no_other_crop_touches(reference, tmp_path, method):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number * 7919 % 100003) for number in range(6000)))
    given = {"dataset": str(path), "length": 256, "samples": 128}
    learnt, judged = repair_data(method, reference, tmp_path, **given)
    assert learnt.shape == (102, 256) and judged.shape == (26, 256)
    runs = {tuple(run) for run in learnt.unfold(1, 16, 1).reshape(-1, 16).tolist()}
    assert len(runs) > 10_000
    assert not runs & {tuple(run) for run in judged.unfold(1, 16, 1).reshape(-1, 16).tolist()}
    whole = load_heldout(settings(**given), reference, whole=True).record["tokens_available"]
    assert whole > 20_000 and len({tuple(crop) for crop in judged.tolist()}) == 26


def test_sequences_of_ids_are_held_out_in_order(reference, tmp_path):
    ids = np.arange(320, dtype=np.uint16).reshape(10, 32)
    np.save(tmp_path / "ids.npy", ids)
    given = {"dataset": str(tmp_path / "ids.npy"), "samples": 10}
    learnt, judged = repair_data("rilq", reference, tmp_path, **given)
    assert np.array_equal(learnt, ids[:8]) and np.array_equal(judged, ids[8:])


def test_a_text_too_short_to_hold_anything_out(reference, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 4)
    given = {"dataset": str(path), "samples": 5}
    tokens = len(load_calibration(settings(**given), reference).batches[0][0])
    assert tokens == 32
    with pytest.raises(CheckpointError, match="fewer than two sequences of 32: one to learn from"):
        repair_data("rilq", reference, tmp_path, **given)


def test_steps_share_text_only_if_they_hold_out_the_same():
    rilq = {"method": "rilq"}
    kinds = [
        make_step(stage, values, where="test")
        for stage, values in (
            ("quantize", {"method": "gptq"}),
            ("quantize", {"method": "rtn"}),
            ("compensate", rilq),
            ("compensate", rilq | {"heldout_share": 0.5}),
            ("heal", {"method": "lora"}),
        )
    ]
    assert len({read_by(step) for step in kinds}) == len(kinds)
    assert read_by(kinds[0]) == read_by(
        make_step("prune", {"method": "shortgpt", "blocks": 1}, where="test")
    )
