"""Reading: compared with safetensors' own reader, and every refusal is raised."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CONFIG, sharded, single, weights, write

from compresso.checkpoint.reader import Checkpoint, TensorInfo
from compresso.errors import CheckpointError


@pytest.mark.parametrize("make", [single, sharded])
def test_reads_what_was_written(tmp_path: Path, make: Any) -> None:
    checkpoint = Checkpoint(make(tmp_path / "m"))
    expected = weights()
    assert checkpoint.names() == checkpoint.weight_names() == sorted(expected)
    for name in reversed(checkpoint.names()):
        for read in (checkpoint.load, checkpoint.load_weights):
            found = read([name])
            assert list(found) == [name]
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name])
        info = checkpoint.info(name)
        assert info == checkpoint.weight_info(name)
        assert info.shape == tuple(expected[name].shape)
        assert info.dtype == expected[name].dtype
        assert info.nbytes == expected[name].nbytes
    twice = checkpoint.load_weights(["model.norm.weight", "model.norm.weight"])
    assert list(twice) == ["model.norm.weight"]
    everything = checkpoint.load(iter(expected))
    assert list(everything) == list(expected)
    assert checkpoint.stored_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.parameters == sum(tensor.numel() for tensor in expected.values())
    assert not checkpoint.packed
    assert checkpoint.config == CONFIG
    assert checkpoint.provenance == {}


def test_info_names_the_shard(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path / "m"))
    info = TensorInfo((12, 8), torch.bfloat16, 192, "model-00001-of-00002.safetensors")
    assert checkpoint.info("model.layers.0.mlp.up_proj.weight") == info
    assert checkpoint.info("model.norm.weight").shard == "b.safetensors"


def test_changing_a_loaded_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint(single(tmp_path / "m"))
    checkpoint.load(["model.norm.weight"])["model.norm.weight"].zero_()
    again = checkpoint.load(["model.norm.weight"])["model.norm.weight"]
    assert torch.equal(again, weights()["model.norm.weight"])


def test_memory_stays_near_what_is_in_use(tmp_path: Path) -> None:
    """Reading a model tensor by tensor must not leave it in memory."""
    megabytes = 4
    tensors = {f"t{i:02d}": torch.full((megabytes << 20,), i, dtype=torch.uint8) for i in range(24)}
    write(tmp_path / "m", {"model.safetensors": tensors})
    del tensors
    checkpoint = Checkpoint(tmp_path / "m")
    before = highest = resident()
    for name in checkpoint.names():
        checkpoint.load([name])[name].max()
        highest = max(highest, resident())
    assert highest - before < 3 * megabytes << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs = single(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (blobs / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob-{name}")
    (blobs / "blob-tok").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/blob-tok")
    checkpoint = Checkpoint(snapshot)
    assert checkpoint.names() == sorted(weights())
    assert list(checkpoint.side_files()) == ["tokenizer.json"]


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    path = single(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text("not read")
    assert Checkpoint(path).names() == sorted(weights())


# ---------------------------------------------------------------- facts about the model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_dtype(tmp_path: Path, config: dict[str, Any], expected: torch.dtype) -> None:
    path = single(tmp_path / "m")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert Checkpoint(path).dtype == expected


def test_dtype_of_a_model_without_weights_to_go_by(tmp_path: Path) -> None:
    integers = {"a": torch.zeros(4, dtype=torch.int32)}
    path = write(tmp_path / "m", {"model.safetensors": integers}, config={"model_type": "x"})
    with pytest.raises(CheckpointError, match="holds no float32"):
        _ = Checkpoint(path).dtype


def test_parameters_count_floating_tensors_and_a_stored_tied_head_once(tmp_path: Path) -> None:
    path = single(
        tmp_path / "m",
        **{"lm_head.weight": torch.ones(16, 8), "model.mask": torch.ones(3, dtype=torch.bool)},
    )
    count = sum(tensor.numel() for tensor in weights().values())
    assert Checkpoint(path).parameters == count + 128
    (path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    assert Checkpoint(path).parameters == count


def test_key_is_a_hash_of_config_and_weights(tmp_path: Path) -> None:
    one, two = sharded(tmp_path / "one"), sharded(tmp_path / "two")
    key = Checkpoint(one).key
    assert key == Checkpoint(two).key
    digest = hashlib.sha256()
    for name in ("config.json", "b.safetensors", "model-00001-of-00002.safetensors"):
        digest.update(hashlib.sha256((one / name).read_bytes()).digest())
    assert key == digest.hexdigest()
    (two / "README.md").write_text("not part of it")
    assert Checkpoint(two).key == key
    data = bytearray((two / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (two / "b.safetensors").write_bytes(data)
    assert Checkpoint(two).key != key


def test_a_recorded_key_is_used(tmp_path: Path) -> None:
    path = single(tmp_path / "m")
    (path / "compresso.json").write_text(json.dumps({"key": "abc", "step": 1}))
    assert Checkpoint(path).key == "abc"
    assert Checkpoint(path).provenance == {"key": "abc", "step": 1}


def test_absent_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(single(tmp_path / "m"))
    for read in (checkpoint.info, checkpoint.weight_info):
        with pytest.raises(CheckpointError, match=r"has no tensor `x.weight`"):
            read("x.weight")
    for load in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(CheckpointError, match=r"has no tensor `x.weight`"):
            load(["model.norm.weight", "x.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.randn(33, 65).to(dtype)
    bad[20, 40] = value
    checkpoint = Checkpoint(single(tmp_path / "m", **{"bad.weight": bad}))
    assert not torch.isfinite(checkpoint.load(["bad.weight"])["bad.weight"]).all()
    with pytest.raises(CheckpointError, match=r"`bad.weight` in .* holds NaN or infinity"):
        checkpoint.load_weights(["model.norm.weight", "bad.weight"])


def test_an_empty_weight_is_fine(tmp_path: Path) -> None:
    checkpoint = Checkpoint(single(tmp_path / "m", **{"bias": torch.empty(0)}))
    assert checkpoint.load_weights(["bias"])["bias"].shape == (0,)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float64, torch.int8, torch.int32, torch.uint8, torch.bool]
)
def test_weights_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(single(tmp_path / "m", **{"w.weight": torch.ones(4, 4).to(dtype)}))
    assert checkpoint.info("w.weight").dtype == dtype
    assert checkpoint.load(["w.weight"])["w.weight"].dtype == dtype
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"`w.weight` in .* is stored as {word}"):
        checkpoint.load_weights(["w.weight"])
