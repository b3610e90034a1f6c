"""Which checkpoint is a compressed one's original, what in it is what, and what cannot be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.models.rotation import RotatedCheckpoint, rotated
from compresso.recipe import make_step
from compresso.run import key_of, run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.stages.original import block_map, original_of

RUNTIME = make_runtime(RuntimeSettings(device="cpu", dtype="float32"))


def run(source, target, stage, method, **values):
    step = make_step(stage, {"method": method, **values}, where="test")
    run_step(step, Checkpoint(source), CalibrationSettings(), target, RUNTIME)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chain(model, tmp_path_factory):
    """The model without block 1, then without what was block 3; the same in 4 bits."""
    path = tmp_path_factory.mktemp("chain")
    run(model, path / "first", "prune", "manual", drop=[1])
    run(path / "first", path / "second", "prune", "manual", drop=["a0", 2])
    run(path / "second", path / "packed", "quantize", "rtn", group_size=16)
    return path


def copied(path, target, **config):
    """A copy with other values in its config.json."""
    shutil.copytree(path, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def resized(path, target, name, shape, **config):
    """A copy in which one tensor has another shape."""
    copied(path, target, **config)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = torch.zeros(shape)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_it_is_the_first_that_is_recorded(model, chain):
    for name in ("first", "second", "packed"):
        assert original_of(Checkpoint(chain / name), None).path == model


def test_blocks_are_those_that_pruning_left(model, chain):
    original = Checkpoint(model)
    assert block_map(Checkpoint(chain / "first"), original) == [0, 2, 3]
    assert block_map(Checkpoint(chain / "second"), original) == [0, 2]
    assert block_map(Checkpoint(chain / "packed"), original) == [0, 2]


def test_an_ancestor_can_be_given(model, chain, tmp_path):
    source = Checkpoint(chain / "packed")
    between = original_of(source, str(chain / "first"))
    assert between.path == chain / "first"
    assert block_map(source, between) == [0, 1]
    assert block_map(source, original_of(source, str(chain / "second"))) == [0, 1]
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    assert original_of(source, str(elsewhere)).path == elsewhere
    assert block_map(source, Checkpoint(elsewhere)) == [0, 2]


def test_what_records_nothing_is_what_it_is_told_to_be(model, tmp_path):
    """As many blocks are the same blocks."""
    other = resized(model, tmp_path / "other", "model.norm.weight", 32)
    assert block_map(Checkpoint(other), original_of(Checkpoint(other), str(model))) == [0, 1, 2, 3]


def test_a_rotated_model_has_a_rotated_original(model, tmp_path):
    path = run(model, tmp_path / "out", "quantize", "rtn", rotate=True, seed=3, group_size=16)
    source = Checkpoint(path)
    original = original_of(source, None)
    assert isinstance(original, RotatedCheckpoint)
    assert original.key == rotated(Checkpoint(model), seed=3).key
    name = "model.layers.2.mlp.up_proj.weight"
    own, theirs = (one.load_weights([name])[name] for one in (source, original))
    plain = Checkpoint(model).load_weights([name])[name]
    assert (own - theirs).norm() < 0.2 * theirs.norm() < (own - plain).norm()


def test_two_rotations_are_refused(model, tmp_path):
    once = run(model, tmp_path / "1", "quantize", "rtn", rotate=True, pack=False, group_size=16)
    twice = run(once, tmp_path / "2", "quantize", "rtn", rotate=True, group_size=16)
    with pytest.raises(ConfigError, match="was rotated 2 times"):
        original_of(Checkpoint(twice), None)
    assert isinstance(original_of(Checkpoint(twice), str(once)), RotatedCheckpoint)


def test_nothing_recorded_and_nothing_given(model):
    with pytest.raises(ConfigError, match="does not record an original") as raised:
        original_of(Checkpoint(model), None)
    assert "--original" in raised.value.hint
    with pytest.raises(ConfigError, match="is given as its own original"):
        original_of(Checkpoint(model), str(model))


def test_one_that_is_gone_or_has_changed(model, tmp_path):
    first = shutil.copytree(model, tmp_path / "first")
    source = Checkpoint(run(first, tmp_path / "out", "prune", "manual", drop=[1]))
    tensors = load_file(first / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since"):
        original_of(source, None)
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="is gone"):
        original_of(source, None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        original_of(source, str(first))
    assert block_map(source, original_of(source, str(model))) == [0, 2, 3]


def test_models_that_cannot_be_it(model, chain, tmp_path):
    source = Checkpoint(chain / "first")
    for name, path, message in (
        ("family", copied(model, tmp_path / "family", model_type="mistral"), "family is `mistral`"),
        (
            "vocabulary",
            resized(model, tmp_path / "words", "model.embed_tokens.weight", (300, 32)),
            "its vocabulary is `300`",
        ),
        (
            "width",
            resized(model, tmp_path / "width", "model.embed_tokens.weight", (257, 48)),
            "its hidden size is `48`, not `32`",
        ),
        (
            "shape",
            resized(model, tmp_path / "shape", "model.layers.2.mlp.up_proj.weight", (96, 32)),
            r"its `2.mlp.up_proj.weight` has the shape \(96, 32\), not \(64, 32\)",
        ),
        ("bare", resized(model, tmp_path / "bare", "model.norm.bias", 1), "embed_tokens.weight"),
    ):
        if name == "bare":
            tensors = load_file(path / "model.safetensors")
            del tensors["model.embed_tokens.weight"]
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            original_of(source, str(path))


def test_a_missing_half_and_unknown_blocks(model, chain, tmp_path):
    halved = run(model, tmp_path / "halved", "prune", "manual", drop=["a2"])
    source = Checkpoint(chain / "first")
    with pytest.raises(CheckpointError, match=r"its `2\..* is missing"):
        original_of(source, str(halved))
    (shutil.copytree(chain / "first", tmp_path / "lost") / "compresso.json").unlink()
    with pytest.raises(CheckpointError, match="nothing records which 3 of the 4 blocks"):
        original_of(Checkpoint(tmp_path / "lost"), str(model))


def test_a_tokenizer_that_reads_text_differently(model, chain, tmp_path):
    source = Checkpoint(chain / "first")
    other = shutil.copytree(model, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    assert original_of(source, str(other)).path == other
    values = json.loads(text)
    vocabulary = values["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="has another tokenizer than"):
        original_of(source, str(other))
    (other / "tokenizer.json").unlink()
    assert original_of(source, str(other)).path == other


def test_keys_go_by_what_the_original_holds(model, chain, tmp_path):
    source = Checkpoint(chain / "packed")

    def key(**values):
        step = make_step("compensate", {"method": "loftq", **values}, where="test")
        return key_of(step, source, None, RUNTIME)

    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    assert key() == key(original=str(model)) == key(original=str(elsewhere))
    assert key(original=str(chain / "first")) != key()
    resized(model, tmp_path / "other", "model.norm.weight", 32)
    assert key(original=str(tmp_path / "other")) != key()
