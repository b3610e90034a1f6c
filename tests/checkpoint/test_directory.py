"""Checkpoint directories: which files belong to them, and every kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CONFIG, sharded, single, weights, write

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError


def test_side_files_are_all_but_weights(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    carried = [
        ".gitattributes",
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_custom.py",
        "original/params.json",
        "preprocessor_config.json",
        "tokenizer.model",
    ]
    left_out = [
        "consolidated.safetensors",
        "model.gguf",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    bookkeeping = [".git/HEAD", ".cache/huggingface/x.metadata", "__pycache__/a.pyc"]
    for name in (*carried, *left_out, *bookkeeping, "compresso.json"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    (path / "broken.json").symlink_to("nowhere")
    found = Checkpoint(path).side_files()
    assert sorted(found) == carried
    assert all(file == path / name and file.read_text() == name for name, file in found.items())
    assert sorted(Checkpoint(path).left_out_files()) == ["broken.json", *left_out]


# ---------------------------------------------------------------- damage


def refused(path: Path, *parts: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "m", "no checkpoint directory", "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[1]", "not hold a JSON object"),
        ("{}", "has no `model_type`"),
        ('{"model_type": 3}', "has no `model_type`"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_bad_config(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = single(tmp_path / "m")
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(path, "config.json", message)


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({}, "no safetensors weights", None),
        ({"pytorch_model.bin": "x"}, "`pytorch_model.bin`), which can run code", "convert"),
        ({"model.pt": "x", "a.txt": ""}, "only pickled weights", "convert"),
        ({"m-Q4_0.gguf": "x"}, "only GGUF", "were made from"),
        ({"weights.safetensors": "x"}, "`weights.safetensors` but neither", "rename"),
        ({"adapter_config.json": "{}"}, "PEFT adapter", "merge"),
    ],
)
def test_no_safetensors(
    tmp_path: Path, files: dict[str, str], message: str, hint: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    error = refused(tmp_path, message)
    assert hint is None or hint in str(error.hint)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../other/model.safetensors", "outside its directory"),
        ("/etc/model.safetensors", "outside its directory"),
        ("sub/model.safetensors", "outside its directory"),
        ("..\\model.safetensors", "outside its directory"),
        ("", "not safetensors"),
        ("..", "not safetensors"),
        ("weights.bin", "not safetensors"),
        (7, "outside its directory"),
        ("absent.safetensors", "lacks its shard `absent.safetensors`"),
    ],
)
def test_index_naming_a_bad_file(tmp_path: Path, shard: Any, message: str) -> None:
    refused(write(tmp_path / "m", {}, index={"a": shard}), message)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": []}', "3"])
def test_bad_index(tmp_path: Path, text: str) -> None:
    path = sharded(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, "model.safetensors.index.json")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    shards = {"a.safetensors": weights()}
    index = {"model.norm.weight": "a.safetensors", "absent": "a.safetensors"}
    refused(write(tmp_path / "m", shards, index=index), "lists `absent` in `a.safetensors`")


def test_tensors_the_index_does_not_list_are_found(tmp_path: Path) -> None:
    """transformers loads all of a shard, whatever the index says."""
    path = write(
        tmp_path / "m", {"a.safetensors": weights()}, index={"model.norm.weight": "a.safetensors"}
    )
    assert Checkpoint(path).names() == sorted(weights())


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    old, new = {"a": torch.zeros(2), "b": torch.ones(2)}, {"a": torch.ones(2)}
    shards = {"x.safetensors": old, "y.safetensors": new}
    path = write(tmp_path / "m", shards, index={"a": "y.safetensors", "b": "x.safetensors"})
    assert Checkpoint(path).load(["a"])["a"].tolist() == [1, 1]
    shards["z.safetensors"] = {"c": torch.zeros(2), "d": torch.zeros(1)}
    shards["y.safetensors"]["c"] = torch.zeros(2)
    index = {"a": "y.safetensors", "b": "x.safetensors", "d": "z.safetensors"}
    refused(write(tmp_path / "n", shards, index=index), "stores `c` in both `y.safetensors`")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    path = sharded(tmp_path / "m")
    data = (path / "b.safetensors").read_bytes()
    (path / "b.safetensors").write_bytes(data[:keep])
    error = refused(path, "`b.safetensors` is damaged".replace("`b", "b"))
    assert "again" in str(error.hint)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = single(tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    (path / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in str(refused(path, "is damaged").hint)


def test_a_directory_for_a_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    (path / "b.safetensors").unlink()
    (path / "b.safetensors").mkdir()
    refused(path, "b.safetensors` is damaged")


def test_unknown_tensor_type(tmp_path: Path) -> None:
    path = single(tmp_path / "m")
    header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(2)
    (path / "model.safetensors").write_bytes(data)
    refused(path, "`w`", "unknown type F4")
