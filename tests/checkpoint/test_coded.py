"""Compresso's own codes: what is stored, and that it decodes to what was coded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from coding import KINDS, affine, eight, is_symmetric, uniform, vector
from samples import write
from torch import Tensor

from compresso.checkpoint import coded
from compresso.checkpoint.coded_kinds import Form, kind_of
from compresso.checkpoint.directory import TensorInfo
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError
from compresso.kernels.higgs import VectorCodes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def opened(tensors: dict[str, Tensor], description: Any) -> coded.Coded:
    """The packing of these tensors; the config goes through JSON."""

    def load(names: Any) -> dict[str, Tensor]:
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"no tensor `{name}`")
        return {}

    infos = {name: TensorInfo(tuple(t.shape), t.dtype, t.nbytes, "") for name, t in tensors.items()}
    return coded.Coded(json.loads(json.dumps({"compresso": description})), infos, load)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_decodes_to_what_was_coded(kind: str, dtype: torch.dtype) -> None:
    codes = KINDS[kind](24, 96, dtype, 3)
    symmetric = is_symmetric(codes)
    tensors = coded.pack("a.b", codes, symmetric=symmetric)
    packing = opened(tensors, coded.describe({"a.b": codes}, symmetric=symmetric))
    assert packing.shapes == {"a.b": (24, 96)} and packing.names("a.b") == list(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert torch.equal(packing.decode("a.b", tensors), codes.decode())
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
    zeros = {getattr(torch, kind.split()[0])} if " zeros" in kind else set()
    types = {tensor.dtype for tensor in tensors.values()}
    assert types - {torch.int8} == {torch.int32, dtype} | zeros
    assert (tensors["a.b.weight_scale"].dtype == torch.int8) == kind.endswith("s8")


@pytest.mark.parametrize("kind", ["p2n256", "3 bits"])
def test_dense_weights_that_are_stored_transposed(kind: str) -> None:
    codes = KINDS[kind](24, 96, torch.float32, 3)
    packing = opened(coded.pack("a", codes), coded.describe({"a": codes}, transposed=True))
    assert packing.shapes == {"a": (96, 24)}
    found = packing.decode("a", coded.pack("a", codes))
    assert found.is_contiguous() and torch.equal(found, codes.decode().T)


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (vector(256, 2)(32, 512, torch.bfloat16, 0), 4 + 16 / 512),
        (vector(256, 4)(32, 512, torch.bfloat16, 0), 2 + 16 / 512),
        (vector(90, 2)(32, 512, torch.bfloat16, 0), 3.5 + 16 / 512),
        (affine(3, 64)(32, 512, torch.bfloat16, 0), 3 + 32 / 64),
        (affine(3, 64, zeros=torch.float16)(32, 512, torch.bfloat16, 0), 3 + 32 / 64),
        (affine(3, 64, zeros=torch.float32)(32, 512, torch.bfloat16, 0), 3 + 48 / 64),
        (uniform(2, 64)(32, 512, torch.bfloat16, 0), 2 + (16 + 2) / 64),
        (uniform(3, 64, symmetric=True)(32, 512, torch.bfloat16, 0), 3 + 16 / 64),
        (eight(vector(256, 4, 64))(32, 512, torch.bfloat16, 0), 2 + 8 / 64 + 16 / 512),
        (eight(affine(3, 64, zero_bits=8))(32, 512, torch.bfloat16, 0), 3 + 16 / 64 + 16 / 512),
        (eight(uniform(2, 64))(32, 512, torch.bfloat16, 0), 2 + (8 + 2) / 64 + 16 / 512),
        (
            eight(uniform(2, 32, symmetric=True))(32, 512, torch.bfloat16, 0),
            2 + 8 / 32 + 16 / 512,
        ),
    ],
)
def test_stored_size(codes: coded.Codes, bits: float) -> None:
    symmetric = is_symmetric(codes)
    stored = sum(tensor.nbytes for tensor in coded.pack("x", codes, symmetric=symmetric).values())
    assert stored * 8 / (32 * 512) == bits
    assert Form.read(*kind_of(codes, symmetric=symmetric)).nbytes(32, 512) == stored


def test_a_code_is_a_point_of_the_rotated_block() -> None:
    """The stored form, read by hand."""
    codes = vector(16, 2)(4, 64, torch.float32, 5)
    assert isinstance(codes, VectorCodes)
    tensors = coded.pack("x", codes)
    kind = coded.describe({"x": codes})["coded_kinds"]["p2n16-64"]
    numbers = [int(w) >> 4 * i & 15 for w in tensors["x.weight_codes"][1] for i in range(8)]
    run = torch.tensor([kind["points"][number] for number in numbers]).flatten()
    signs = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    rotated = torch.tensor(signs, dtype=torch.float64) @ run.double() / 8
    expected = rotated * tensors["x.weight_scale"][1].double()
    torch.testing.assert_close(codes.decode()[1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_bits", [2, 8])
def test_scales_and_zeros_in_few_bits(zero_bits: int) -> None:
    """The stored form, read by hand."""
    codes = eight(affine(2, 16, zero_bits=zero_bits))(8, 64, torch.float16, 5)
    tensors = coded.pack("x", codes)
    (kind,) = coded.describe({"x": codes})["coded_kinds"].values()
    sizes = {"bits": 2, "group_size": 16, "zero_bits": zero_bits, "scale_bits": 8}
    assert kind == {"kind": "affine", "dtype": "float16", **sizes}
    scale = tensors["x.weight_scale"].double() * tensors["x.weight_row_scale"].double() / 128
    for row, group in ((0, 0), (5, 3)):
        stream = sum(
            (int(w) % 2**32) << 32 * i for i, w in enumerate(tensors["x.weight_zero"][group])
        )
        zero = (stream >> zero_bits * row) % 2**zero_bits * 2.0 ** (2 - zero_bits)
        code = int(tensors["x.weight_codes"][row, group]) & 3
        expected = (code - zero) * scale[row, group]
        assert codes.decode()[row, 16 * group].item() == pytest.approx(expected.item(), rel=1e-3)


def test_descriptions_are_merged() -> None:
    first = coded.describe({"a": affine()(8, 64, torch.float32, 0)})
    second = coded.describe({"b": affine()(8, 96, torch.float32, 0)})
    third = coded.describe({"c": vector(8, 1)(8, 96, torch.float32, 0)})
    merged = coded.merge([first, second, third])
    assert merged["coded"] == {"a": "b3g32", "b": "b3g32", "c": "p1n8-32"}
    assert list(merged["coded_kinds"]) == ["b3g32", "p1n8-32"]
    assert first == coded.describe({"a": affine()(8, 64, torch.float32, 0)})
    other = coded.describe({"d": affine()(8, 96, torch.bfloat16, 0)})
    with pytest.raises(ValueError, match="two codings are called `b3g32`"):
        coded.merge([merged, other])


# ---------------------------------------------------------------- what cannot be stored or read


def test_what_would_not_survive_is_refused() -> None:
    codes = affine()(8, 64, torch.float32, 0)
    for name in ("scale", "zero"):
        changed = {"codes": codes.codes, "scale": codes.scale, "zero": codes.zero}
        changed = {
            k: v if k in ("codes", name) else v.bfloat16().float() for k, v in changed.items()
        }
        bad = type(codes)(**changed, bits=3, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=rf"`x.weight_{name}` is not exact"):
            coded.pack("x", bad)
    whole = uniform(2)(8, 64, torch.float32, 0)
    with pytest.raises(ValueError, match=r"`x.weight_zero` is not exact"):
        coded.pack("x", whole, symmetric=True)
    fine = eight(affine(2, 16, zero_bits=8))(8, 64, torch.float32, 0)
    for changed in ({"zero": fine.zero + 4}, {"zero": fine.zero + 1e-3}, {"scale": fine.scale * 3}):
        with pytest.raises(ValueError, match=f"`x.weight_{next(iter(changed))}` is not exact"):
            coded.pack("x", replace(fine, **changed))


def test_config_and_tensors_that_do_not_agree() -> None:
    codes = affine()(8, 64, torch.float32, 0)
    tensors, description = coded.pack("x.y", codes), coded.describe({"x.y": codes})
    with pytest.raises(CheckpointError, match=r"`x.y` is coded, but config.json does not say how"):
        opened(tensors, {**description, "coded": {}})
    for missing in tensors:
        left = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"no tensor `{missing}`"):
            opened(left, description)
    with pytest.raises(CheckpointError, match="names codings that `coded_kinds` lacks"):
        opened(tensors, {"coded": {"x.y": "b3g32"}, "coded_kinds": {}})
    with pytest.raises(CheckpointError, match="names codings that `coded_kinds` lacks"):
        coded.coding_of({"compresso": {"coded": {"x.y": "b3g32"}}})
    kind = description["coded_kinds"]["b3g32"]
    for bad in (
        {"kind": "ternary"},
        {"kind": "vector"},
        {"kind": "vector", "block": 32, "points": [[]]},
        {"kind": None},
        {"dtype": "int4"},
        {"group_size": None},
        {"group_size": 0},
        {"bits": "3"},
        {"scale_bits": 4},
        {"zero_bits": 9},
        {"zero_bits": "8"},
    ):
        with pytest.raises(CheckpointError, match=r"coding `b3g32` in config.json cannot be read"):
            opened(tensors, {**description, "coded_kinds": {"b3g32": {**kind, **bad}}})
    for name, tensor in (
        ("x.y.weight_codes", tensors["x.y.weight_codes"][:, 1:]),
        ("x.y.weight_codes", tensors["x.y.weight_codes"].long()),
        ("x.y.weight_scale", tensors["x.y.weight_scale"].half()),
        ("x.y.weight_zero", tensors["x.y.weight_zero"][:1]),
    ):
        with pytest.raises(CheckpointError, match=f"`{name}` is "):
            opened({**tensors, name: tensor}, description)


def test_tensors_of_another_kind_of_scale() -> None:
    codes = eight(uniform(2, 16))(8, 64, torch.bfloat16, 0)
    tensors, description = coded.pack("x", codes), coded.describe({"x": codes})
    (kind,) = description["coded_kinds"].values()
    plain = {k: v for k, v in kind.items() if k != "scale_bits"}
    with pytest.raises(CheckpointError, match=r"`x.weight_scale` is \(8, 4\) torch.int8, not"):
        opened(tensors, {**description, "coded_kinds": {"b2g16z2s8": plain}})
    del tensors["x.weight_row_scale"]
    with pytest.raises(CheckpointError, match=r"no tensor `x.weight_row_scale`"):
        opened(tensors, description)


def test_a_code_that_is_no_point() -> None:
    codes = vector(90, 2)(8, 64, torch.float32, 0)
    tensors = coded.pack("x", codes)
    packing = opened(tensors, coded.describe({"x": codes}))
    tensors["x.weight_codes"][2, 0] = 127
    with pytest.raises(CheckpointError, match="`x` holds the code 127 of 90 points"):
        packing.decode("x", tensors)


# ---------------------------------------------------------------- as part of a checkpoint


def test_a_checkpoint_that_leaves_out_the_prefix_of_its_base_model(tmp_path: Any) -> None:
    codes = uniform()(8, 64, torch.bfloat16, 0)
    tensors = {"norm.weight": torch.ones(4), **coded.pack("layers.0.mlp.up_proj", codes)}
    config = {
        "model_type": "compresso_llama",
        "dtype": "bfloat16",
        "compresso": coded.describe({"model.layers.0.mlp.up_proj": codes}),
    }
    source = Checkpoint(write(tmp_path / "x", {"model.safetensors": tensors}, config=config))
    assert source.packed
    assert source.weight_names() == ["layers.0.mlp.up_proj.weight", "norm.weight"]
    (weight,) = source.load_weights(["layers.0.mlp.up_proj.weight"]).values()
    assert weight.dtype == torch.bfloat16 and torch.equal(weight.float(), codes.decode())
    info = source.weight_info("layers.0.mlp.up_proj.weight")
    assert info.shape == (8, 64) and info.dtype == torch.bfloat16
    assert info.nbytes == sum(t.nbytes for name, t in tensors.items() if "norm" not in name)
    assert source.parameters == 4 + 8 * 64


def test_infinite_scales_are_refused(tmp_path: Any) -> None:
    codes = affine()(8, 64, torch.bfloat16, 0)
    tensors = coded.pack("x", codes)
    tensors["x.weight_scale"][1, 1] = math.inf
    config = {"model_type": "compresso_llama", "compresso": coded.describe({"x": codes})}
    source = Checkpoint(write(tmp_path / "x", {"model.safetensors": tensors}, config=config))
    with pytest.raises(CheckpointError, match=r"`x.weight` in .* holds NaN or infinity"):
        source.load_weights(["x.weight"])
