"""Packed linears: compared with the compressed-tensors library, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from samples import UNIFORM, random_packed
from torch import Tensor

from compresso.checkpoint.layout import (
    Scheme,
    pack,
    packed_names,
    quantization_config,
    schemes,
    unpack,
)
from compresso.errors import CheckpointError
from compresso.kernels.grid import Grid, Packed

LIBRARY = BaseCompressor.get_value_from_registry("pack-quantized")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    channel = scheme.group_size == -1
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=scheme.bits,
            symmetric=scheme.symmetric,
            strategy="channel" if channel else "group",
            group_size=None if channel else scheme.group_size,
        ),
    )


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- against the library


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", UNIFORM)
def test_the_library_reads_what_we_pack(scheme: Scheme, dtype: torch.dtype) -> None:
    packed = random_packed(scheme, 41, 96, dtype)
    tensors = pack("a.b", packed, dtype, symmetric=scheme.symmetric)
    assert list(tensors) == packed_names("a.b", scheme)
    weight = LIBRARY.decompress(local(tensors), library_scheme(scheme))["weight"]
    assert weight.dtype == dtype
    assert torch.equal(weight, packed.decode().to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_we_read_what_the_library_packs(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    packed = random_packed(scheme, 41, 96, torch.float32)
    offset = 2 ** (bits - 1)
    given = {
        "weight": packed.decode(),
        "weight_scale": packed.grid.scale,
        "weight_zero_point": (packed.grid.zero - offset).to(torch.int8),
    }
    if symmetric:
        del given["weight_zero_point"]
    tensors = {f"x.{k}": v for k, v in LIBRARY.compress(given, library_scheme(scheme)).items()}
    found = unpack("x", tensors, scheme)
    assert torch.equal(found.codes, packed.codes)
    assert torch.equal(found.grid.scale, packed.grid.scale)
    assert torch.equal(found.grid.zero, packed.grid.zero)
    ours = pack("x", packed, torch.float32, symmetric=symmetric)
    assert set(ours) == set(tensors)
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("scheme", [*UNIFORM, Scheme(3, -1, False)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (33, 96), (64, 160)])
def test_unpack_inverts_pack(scheme: Scheme, rows: int, columns: int) -> None:
    packed = random_packed(scheme, rows, columns, torch.bfloat16)
    tensors = pack("x", packed, torch.bfloat16, symmetric=scheme.symmetric)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = unpack("x", tensors, scheme)
    assert torch.equal(found.codes, packed.codes) and found.codes.dtype == torch.uint8
    assert torch.equal(found.grid.scale, packed.grid.scale)
    assert torch.equal(found.grid.zero, packed.grid.zero)
    assert found.grid.bits == scheme.bits
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_stored_size() -> None:
    """4 bits in groups of 64 with bfloat16 scales are 4.25 bits a weight, and zeros 0.0625 more."""
    for symmetric, bits in ((True, 4.25), (False, 4.3125)):
        scheme = Scheme(4, 64, symmetric)
        packed = random_packed(scheme, 256, 512, torch.bfloat16)
        tensors = pack("x", packed, torch.bfloat16, symmetric=symmetric)
        stored = sum(tensor.nbytes for name, tensor in tensors.items() if "shape" not in name)
        assert stored * 8 / (256 * 512) == bits


def test_odd_columns_in_one_group() -> None:
    scheme = Scheme(3, -1, True)
    packed = random_packed(scheme, 5, 45, torch.float32)
    tensors = pack("x", packed, torch.float32, symmetric=True)
    assert tensors["x.weight_packed"].shape == (5, 5)
    assert torch.equal(unpack("x", tensors, scheme).codes, packed.codes)


# ---------------------------------------------------------------- what cannot be packed or read


def test_what_would_not_survive_is_refused() -> None:
    packed = random_packed(Scheme(4, 32, False), 8, 64, torch.float32)
    with pytest.raises(ValueError, match=r"scales of `x` are not exact in torch.bfloat16"):
        pack("x", packed, torch.bfloat16, symmetric=False)
    with pytest.raises(ValueError, match="`x` is not symmetric"):
        pack("x", packed, torch.float32, symmetric=True)
    for zero in (0.5, -1.0, 16.0):
        grid = Grid(packed.grid.scale, torch.full_like(packed.grid.zero, zero), 4)
        with pytest.raises(ValueError, match="zeros of `x` are not codes"):
            pack("x", Packed(packed.codes, grid), torch.float32, symmetric=False)


def test_tensors_that_do_not_fit_the_scheme() -> None:
    scheme = Scheme(3, 32, False)
    good = pack("x", random_packed(scheme, 64, 96, torch.float32), torch.float32, symmetric=False)
    cases: list[tuple[str, Tensor]] = [
        ("x.weight_packed", torch.zeros(64, 10, dtype=torch.int32)),  # ten values in every word
        ("x.weight_packed", good["x.weight_packed"].long()),
        ("x.weight_scale", good["x.weight_scale"][:, :1]),
        ("x.weight_scale", good["x.weight_scale"].double()),
        ("x.weight_zero_point", torch.zeros(64, 3, dtype=torch.int8)),
    ]
    for name, bad in cases:
        with pytest.raises(CheckpointError, match=f"`{name}` is ") as caught:
            unpack("x", {**good, name: bad}, scheme)
        assert "another layout" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="96 columns, which groups of 64 do not divide"):
        unpack("x", good, Scheme(3, 64, False))


def config(**changes: Any) -> dict[str, Any]:
    entry = quantization_config(Scheme(4, 64, True), ignore=["lm_head"])
    return {"quantization_config": {**entry, **changes}}


def group(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = config()["quantization_config"]["config_groups"]["group_0"]
    if changes.get("weights", {}) is not None:
        changes["weights"] = {**found["weights"], **changes.get("weights", {})}
    return {**found, **changes}


@pytest.mark.parametrize("scheme", UNIFORM)
def test_the_config_says_what_the_scheme_is(scheme: Scheme) -> None:
    entry = json.loads(json.dumps(quantization_config(scheme, ignore=["b", "a"])))
    assert schemes({"quantization_config": entry}, ["x", "y"]) == {"x": scheme, "y": scheme}
    assert entry["ignore"] == ["a", "b"]
    assert entry["dequantize"] is True


def test_several_schemes_are_told_apart_by_name() -> None:
    found = {"a.x": Scheme(4, 64, True), "a.y": Scheme(2, -1, True), "b.x": Scheme(4, 64, True)}
    entry = json.loads(json.dumps(quantization_config(found, ignore=["head"])))
    assert schemes({"quantization_config": entry}, found) == found
    targets = [group["targets"] for group in entry["config_groups"].values()]
    assert targets == [["a.y"], ["a.x", "b.x"]]
    assert entry["ignore"] == ["head"] and "dequantize" not in entry
    alike = dict.fromkeys(found, Scheme(3, 32, False))
    assert quantization_config(alike, ignore=["head"]) == quantization_config(
        Scheme(3, 32, False), ignore=["head"]
    )


def test_several_schemes_of_which_one_is_asymmetric_are_refused() -> None:
    found = {"x": Scheme(4, 64, True), "y": Scheme(2, 64, False)}
    with pytest.raises(ValueError, match="some are asymmetric: store symmetric codes, or all"):
        quantization_config(found, ignore=[])


def test_names_without_the_prefix_of_the_base_model_and_an_old_name_of_the_head() -> None:
    found = {"model.layers.0.x": Scheme(4, 64, True), "lm_head": Scheme(2, -1, True)}
    config = {"quantization_config": quantization_config(found, ignore=[])}
    assert schemes(config, ["layers.0.x", "embed_out"]) == {
        "layers.0.x": found["model.layers.0.x"],
        "embed_out": found["lm_head"],
    }


def test_groups_of_other_tools() -> None:
    groups = {
        "first": group(targets=["Linear"]),
        "second": group(targets=["re:.*down_proj$", "re:.*up"], weights={"num_bits": 8}),
        "third": group(
            targets=["model.layers.0.mlp.down_proj"],
            format=None,
            weights={
                "strategy": None,
                "group_size": None,
                "symmetric": False,
                "actorder": "weight",
            },
        ),
    }
    paths = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("down", "gate")]
    found = schemes(config(config_groups=groups, format="mixed-precision"), paths)
    assert [found[path] for path in paths] == [
        Scheme(4, -1, False),
        Scheme(4, 64, True),
        Scheme(8, 64, True),
        Scheme(4, 64, True),
    ]


def test_no_quantization() -> None:
    assert schemes({}, []) == {}
    assert schemes({"quantization_config": None}, []) == {}
    with pytest.raises(CheckpointError, match="`x` is packed, but there is no"):
        schemes({}, ["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantized by `awq` cannot be read"),
        ({"format": "float-quantized"}, "format `float-quantized` cannot be read"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "a preset name"),
        ({"config_groups": {"a": group(targets=["re:nothing", "Conv"])}}, "no group of"),
        ({"config_groups": {"a": group(input_activations={"num_bits": 8})}}, "activations, which"),
        ({"config_groups": {"a": group(output_activations={"num_bits": 8})}}, "activations"),
        ({"config_groups": {"a": group(format="marlin-24")}}, "format `marlin-24`"),
        ({"config_groups": {"a": group(weights={"type": "float"})}}, "type `float`"),
        ({"config_groups": {"a": group(weights={"num_bits": 16})}}, "16 bits"),
        ({"config_groups": {"a": group(weights=None)}}, "None bits"),
        ({"config_groups": {"a": group(weights={"strategy": "block"})}}, "strategy `block`"),
        ({"config_groups": {"a": group(weights={"actorder": "group"})}}, "columns reordered"),
    ],
)
def test_quantization_that_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        schemes(config(**changes), ["x"])


def test_codes_of_another_kind() -> None:
    with pytest.raises(CheckpointError, match="format `pack-quantized` cannot be read"):
        schemes(config(), [])
