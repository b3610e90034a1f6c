"""Which packing a checkpoint has."""

from __future__ import annotations

from typing import Any

import pytest
from coding import affine, vector
from samples import random_packed
from torch import Tensor, bfloat16, equal, float32, ones

from compresso.checkpoint import coded, layout, packings
from compresso.checkpoint.directory import TensorInfo
from compresso.errors import CheckpointError

SCHEME = layout.Scheme(3, 32, False)
PACKED = layout.pack("x.y", random_packed(SCHEME, 8, 64, float32), float32, symmetric=False)
PACKED_CONFIG = {"quantization_config": layout.quantization_config(SCHEME, ignore=[])}
CODES = affine()(8, 64, float32, 0)
CODED = coded.pack("x.y", CODES)
CODED_CONFIG = {"compresso": coded.describe({"x.y": CODES})}


def packing_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> packings.Packing:
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, t.nbytes, "") for name, t in tensors.items()}
    return packings.packing_of(config, infos, lambda names: {n: tensors[n] for n in names})


def test_by_what_config_json_says() -> None:
    found = packing_of(PACKED_CONFIG, PACKED)
    assert isinstance(found, packings.CompressedTensors) and found.shapes == {"x.y": (8, 64)}
    assert found.names("x.y") == list(PACKED)
    assert found.kind("x.y") == {"bits": 3, "group_size": 32, "symmetric": False}
    found = packing_of(CODED_CONFIG, CODED)
    assert isinstance(found, coded.Coded) and found.shapes == {"x.y": (8, 64)}
    assert found.kind("x.y") == {"kind": "affine", "dtype": "float32", "bits": 3, "group_size": 32}


@pytest.mark.parametrize("config", [{}, {"compresso": {"shared": []}}, {"compresso": None}])
def test_a_dense_checkpoint(config: dict[str, Any]) -> None:
    assert packing_of(config, {"x.weight": PACKED["x.y.weight_scale"]}).shapes == {}
    assert not packings.is_packed(config, ["x.weight"])


def test_what_is_packed() -> None:
    assert packings.is_packed(PACKED_CONFIG, PACKED)
    assert packings.is_packed(CODED_CONFIG, CODED)
    assert packings.is_packed({"quantization_config": {"quant_method": "bitsandbytes"}}, ["x"])


def test_what_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="quantized by `awq` cannot be read"):
        packing_of({"quantization_config": {"quant_method": "awq"}}, {})
    with pytest.raises(CheckpointError, match=r"`x.y` is packed, but there is no"):
        packing_of({}, PACKED)


def test_decoded_leaves_only_weights_of_several_kinds_of_codes() -> None:
    made = {"a.b": affine()(8, 64, bfloat16, 0), "a.c": vector()(8, 64, bfloat16, 1)}
    stored = {"a.norm": ones(8)}
    for path, codes in made.items():
        stored |= coded.pack(path, codes)
    names = list(stored)
    dense = packings.decoded(stored, {"compresso": coded.describe(made)}, bfloat16)
    assert set(dense) == {"a.norm", "a.b.weight", "a.c.weight"} and list(stored) == names
    for path, codes in made.items():
        assert dense[f"{path}.weight"].dtype == bfloat16
        assert equal(dense[f"{path}.weight"].float(), codes.decode())
    assert equal(dense["a.norm"], stored["a.norm"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_decoded_of_several_schemes(symmetric: bool) -> None:
    found = {"a": layout.Scheme(4, 32, symmetric), "b": layout.Scheme(4, 32, symmetric)}
    if symmetric:
        found["b"] = layout.Scheme(3, -1, True)
    made = {path: random_packed(scheme, 33, 64, bfloat16) for path, scheme in found.items()}
    stored = {"a.bias": ones(33)}
    for path, packed in made.items():
        stored |= layout.pack(path, packed, bfloat16, symmetric=symmetric)
    config = {"quantization_config": layout.quantization_config(found, ignore=[])}
    dense = packings.decoded(stored, config, bfloat16)
    assert set(dense) == {"a.weight", "b.weight", "a.bias"}
    for path, packed in made.items():
        assert equal(dense[f"{path}.weight"], packed.decode().to(bfloat16))
    rest = {"a.bias": ones(33)}
    assert packings.decoded(rest, config, bfloat16) == rest
