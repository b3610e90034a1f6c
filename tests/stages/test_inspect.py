"""What is said of packed linears."""

from __future__ import annotations

import pytest
import torch
from coding import affine, save_coded, vector
from exporting import run_export
from restructured import STRUCTURES
from tiny_models import BLOCKS, build

from compresso.stages.inspect import inspect_checkpoint, inspect_model, print_inspection


def test_codes_are_counted_by_kind(tmp_path, capsys):
    model = build("llama", dtype=torch.bfloat16).to(torch.bfloat16)
    found = inspect_checkpoint(save_coded(model, tmp_path, vector(256, 2, 64)).coded)
    down = {"kind": "vector", "dtype": "bfloat16", "block": 32, "grid": "p2n256"}
    assert found["packed"] == [
        {"linears": BLOCKS, **down},
        {"linears": 6 * BLOCKS, **down, "block": 64},
    ]
    weights = BLOCKS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    scales = BLOCKS * (2 * 64 + 2 * 32 + 2 * 96 + 3 * 64)
    expected = (weights * 4 + scales * 16) / weights
    assert found["packed_bits_per_weight"] == pytest.approx(expected)
    assert found["architecture"] == "CompressoLlamaForCausalLM" and found["blocks"] == BLOCKS
    print_inspection(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "packed as vector" in shown and "grid p2n256" in shown and "none: all" not in shown


def test_codes_of_blocks_that_are_not_whole(tmp_path):
    pair = save_coded(build("llama"), tmp_path, affine(), structure=STRUCTURES["both kinds"])
    found = inspect_checkpoint(pair.coded)
    linears = 7 * BLOCKS - 2 * 4 - 3 * 3
    kind = {"kind": "affine", "dtype": "float32", "bits": 3, "group_size": 32}
    assert found["packed"] == [{"linears": linears, **kind}]
    assert found["packed_bits_per_weight"] == 5
    assert found["blocks_without_mlp"] == [2, 3, 5]


def test_dense_checkpoints_have_no_packed_linears(checkpoints):
    found = inspect_checkpoint(checkpoints("llama"))
    assert found["packed"] == [] and "packed_bits_per_weight" not in found


def test_gguf(checkpoints, tmp_path, capsys):
    run_export(checkpoints("llama"), tmp_path / "out", "gguf", verify=False)
    found = inspect_model(str(tmp_path / "out"))
    file = next((tmp_path / "out").glob("*.gguf"))
    assert inspect_model(str(file)) == found | {"path": str(file)}
    assert found["stored_bytes"] == sum(one["bytes"] for one in found["stored"].values())
    assert found["tensors"] == sum(one["tensors"] for one in found["stored"].values())
    assert found["runtimes"]["llama.cpp"]["loads"] == "packed"
    assert found["runtimes"]["vllm"]["loads"] == "no"
    assert [one["method"] for one in found["history"]] == ["gguf"]
    print_inspection(found)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "stored as F32" in shown and "made by 1. export gguf" in shown
