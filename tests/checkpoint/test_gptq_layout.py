"""GPTQ's layout, bit by bit, and how it is read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import random_packed

from compresso.checkpoint.gptq_layout import (
    auto_round_config,
    gptq_config,
    pack,
    packed_names,
    unpack,
    why_not,
)
from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError

SCHEMES = [
    Scheme(bits, group_size, symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (16, 32, -1)
    for symmetric in (True, False)
]


def from_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits along the last axis of words, one bit after another."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*stream.shape[:-1], -1, bits)
    return (fields * 2 ** np.arange(bits)).sum(-1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layout_bit_by_bit(scheme):
    packed = random_packed(scheme, 64, 96, torch.float16)
    stored = pack("x", packed, less_one=scheme.symmetric, ordered=True)
    groups = scheme.groups(96)
    assert stored["x.qweight"].shape == (96 * scheme.bits // 32, 64)
    assert stored["x.qzeros"].shape == (groups, 64 * scheme.bits // 32)
    codes = from_bits(stored["x.qweight"].numpy().T, scheme.bits)
    zeros = from_bits(stored["x.qzeros"].numpy(), scheme.bits) + scheme.symmetric
    group = stored["x.g_idx"].long().numpy()
    assert group.tolist() == [column // (96 // groups) for column in range(96)]
    scale = stored["x.scales"].float().numpy()
    decoded = (codes.T - zeros[group]) * scale[group]  # (in, out), as kernels have it
    assert np.array_equal(
        decoded.T,
        (
            packed.grid.scale.repeat_interleave(96 // groups, 1)
            * (packed.codes.float() - packed.grid.zero.repeat_interleave(96 // groups, 1))
        ).numpy(),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_read_back(scheme):
    packed = random_packed(scheme, 64, 96, torch.float16)
    for less_one in {False, scheme.symmetric}:
        stored = pack("x", packed, less_one=less_one, ordered=False)
        assert list(stored) == packed_names("x", ordered=False)
        found = unpack("x", stored, scheme, less_one=less_one)
        assert torch.equal(found.codes, packed.codes)
        assert torch.equal(found.grid.scale, packed.grid.scale)
        assert torch.equal(found.grid.zero, packed.grid.zero)


def test_what_does_not_fit():
    scheme = Scheme(4, 32, False)
    packed = random_packed(scheme, 64, 96, torch.float16)
    assert why_not(packed) is None
    assert "is 48 x 96" in str(why_not(random_packed(scheme, 48, 96, torch.float16)))
    packed.grid.zero[0, 0] = 0
    with pytest.raises(ValueError, match="zeros of 0, which version 1"):
        pack("x", packed, less_one=True, ordered=False)
    packed.grid.zero[0, 0] = 0.5
    with pytest.raises(ValueError, match="zeros that are not codes"):
        pack("x", packed, less_one=False, ordered=False)
    assert "scales" in str(why_not(random_packed(scheme, 64, 96, torch.float32)))
    assert "5 bits" in str(why_not(random_packed(Scheme(5, 32, True), 64, 96, torch.float16)))


def write(path, entry, *, ordered=True, less_one=True, symmetric=True, **extra):
    """A checkpoint of one linear, packed in 4 bits."""
    path.mkdir()
    scheme = Scheme(4, 32, symmetric)
    packed = random_packed(scheme, 64, 96, torch.float16)
    name = "model.layers.0.mlp.up_proj"
    stored = pack(name, packed, less_one=less_one, ordered=ordered) | extra
    config = {"model_type": "llama", "dtype": "float16", "quantization_config": entry}
    (path / "config.json").write_text(json.dumps(config))
    save_file({**stored, "model.norm.weight": torch.ones(8)}, path / "model.safetensors")
    return Checkpoint(path), packed, f"{name}.weight"


SYMMETRIC, ASYMMETRIC = Scheme(4, 32, True), Scheme(4, 32, False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_checkpoints_of_gptq(symmetric, tmp_path):
    scheme = SYMMETRIC if symmetric else ASYMMETRIC
    options = {"less_one": symmetric, "symmetric": symmetric}
    entry = gptq_config(scheme, only=None)
    found, packed, name = write(tmp_path / "x", entry, **options)
    assert found.weight_names() == [name, "model.norm.weight"] and found.packed
    assert torch.equal(found.load_weights([name])[name], packed.decode().half())
    entry = auto_round_config(
        {"model.layers.0.mlp.up_proj": scheme}, blocks="model.layers", kept=[]
    )
    found, packed, name = write(tmp_path / "y", entry, ordered=False, **options)
    assert torch.equal(found.load_weights([name])[name], packed.decode().half())
    assert found.packing.kind(name.removesuffix(".weight")) == {
        "bits": 4,
        "group_size": 32,
        "symmetric": symmetric,
    }


def test_what_is_said_of_a_linear_alone(tmp_path):
    """By its name, else by a pattern, as auto-round reads it."""
    usual = {"quant_method": "auto-round", "bits": 8, "group_size": 64, "sym": True}
    own = {"bits": 4, "group_size": 32}
    for number, key in enumerate(("model.layers.0.mlp.up_proj", r"layers\.\d+\.mlp.*")):
        entry = {**usual, "packing_format": "auto_round:auto_gptq", "extra_config": {key: own}}
        found, packed, name = write(tmp_path / str(number), entry, ordered=False)
        assert torch.equal(found.load_weights([name])[name], packed.decode().half())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "marlin"}, "packed as `marlin` cannot be read"),
        ({"bits": 5}, "packed with 5 bits"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "packed with rules by layer"),
        ({"data_type": "mx_fp"}, "cannot be read"),
    ],
)
def test_what_cannot_be_read(changes, message, tmp_path):
    found, *_ = write(tmp_path / "x", gptq_config(SYMMETRIC, only=None) | changes)
    with pytest.raises(CheckpointError, match=message):
        found.weight_names()


def test_tensors_that_do_not_fit(tmp_path):
    entry = gptq_config(SYMMETRIC, only=None)
    turned = {"model.layers.0.mlp.up_proj.g_idx": torch.arange(96, dtype=torch.int32) % 3}
    found, _, name = write(tmp_path / "x", entry, **turned)
    with pytest.raises(CheckpointError, match="columns reordered across groups"):
        found.load_weights([name])
    short = {"model.layers.0.mlp.up_proj.scales": torch.ones(2, 64).half()}
    found, _, name = write(tmp_path / "y", entry, **short)
    with pytest.raises(CheckpointError, match=r"scales` is \(2, 64\)"):
        found.load_weights([name])
