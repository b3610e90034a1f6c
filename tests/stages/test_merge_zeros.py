"""Pooled corrections in the zeros of a packed checkpoint: no further path, and the same model."""

from dataclasses import replace

import pytest
import torch
from coding import affine, save_coded, vector
from correcting import (
    PROBE,
    RUNTIME,
    calm,
    corrections,
    logits_in_memory,
    open_model,
    run_quantize,
    save_mixed,
)
from restructured import STRUCTURES
from tiny_models import build
from transformers import AutoModelForCausalLM

from compresso import registry
from compresso.checkpoint.packings import merged_codes
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError
from compresso.kernels.lowrank import LowRank
from compresso.kernels.pooled import spread
from compresso.models.coded_linear import CodedLinear
from compresso.recipe import make_step
from compresso.report import Report
from compresso.run import run_step
from compresso.settings import CalibrationSettings
from compresso.stages.merge_zeros import merge_zeros, merged_config

GROUP = 32


def packed(family, path, dtype=torch.float32, **settings):
    model = calm(family, dtype=dtype).to(dtype)
    model.save_pretrained(path / "source")
    return run_quantize(Checkpoint(path / "source"), path / "packed", **settings)


RTN = {"method": "rtn", "group_size": GROUP}
BASES = {
    "symmetric": lambda path: packed("llama", path, bits=2, symmetric=True, **RTN),
    "asymmetric": lambda path: packed("qwen3", path, bits=2, symmetric=False, **RTN),
    "bfloat16": lambda path: packed("llama", path, torch.bfloat16, bits=3, symmetric=False, **RTN),
    "head": lambda path: packed("gpt_neox", path, bits=4, lm_head=True, **RTN),
    "mixed": lambda path: save_mixed(calm("llama"), path / "mixed"),
    "coded": lambda path: packed("llama", path, method="hqq", bits=3, group_size=GROUP),
    "scales in 8 bits": lambda path: packed(
        "llama", path, bits=2, symmetric=True, scale_bits=8, **RTN
    ),
    "Conv1D": lambda path: packed("gpt2", path, method="hqq", bits=3, group_size=GROUP),
    "some vectors": lambda path: save_coded(build("llama"), path, [vector(), affine()]).coded,
    "everything": lambda path: (
        save_coded(build("llama"), path, affine(), structure=STRUCTURES["everything"]).coded
    ),
}


def pooled(source):
    """Pooled corrections of all packed linears but one kind, and of none that are vectors."""
    found = {}
    for path, factor in corrections(source, size=0.03).items():
        if path in source.packing.shapes and source.packing.kind(path).get("kind") != "vector":
            groups = factor.down.shape[1] // GROUP
            found[path] = LowRank(factor.up, factor.down[:, :groups].contiguous())
    return found


def unpooled(factors):
    return {path: LowRank(f.up, spread(f.down, GROUP)) for path, f in factors.items()}


def merge(source, target, factors, patch):
    """Run a step that merges them, which is proved by the model with the corrections apart."""

    def stage(source, step, calibration, writer, runtime):
        adapter = open_model(source)
        parts = [adapter.block_tensors(index) for index in range(adapter.count)]
        parts.append(adapter.outside_tensors() + adapter.unmapped_tensors())
        writer.resize(len(parts))
        described, expected = [], []
        for part, names in enumerate(parts):
            tensors, said = merge_zeros(source, adapter, names, factors)
            writer.commit(part, tensors, {})
            described.append(said)
            expected += tensors
        return Report(
            config=merged_config(source.config, described),
            expected=expected,
            fingerprint=Fingerprint(PROBE, logits_in_memory(source, unpooled(factors))),
        )

    step = make_step("compensate", {"method": "loftq"}, where="test")
    with patch.context() as patched:
        patched.setattr(registry, "load", lambda code: stage)
        # Merged weights are rounded anew, to the type that they are stored for.
        runtime = replace(RUNTIME, dtype=source.dtype)
        run_step(step, source, CalibrationSettings(), target, runtime)
    return Checkpoint(target)


@pytest.mark.parametrize("base", BASES)
def test_merged_equals_unmerged(base, tmp_path, monkeypatch):
    source = BASES[base](tmp_path)
    factors = pooled(source)
    written = merge(source, tmp_path / "merged", factors, monkeypatch)
    before = logits_in_memory(source, {})
    expected = logits_in_memory(source, unpooled(factors))
    assert factors and (expected - before).abs().max() > 0.01 * expected.abs().max()
    assert written.adapter is None and "quantization_config" not in written.config
    assert written.weight_names() == source.weight_names()
    # no further path: codes in place of codes, and nothing else
    model = AutoModelForCausalLM.from_pretrained(written.path, dtype="auto").eval()
    linears = {n for n, m in model.named_modules() if isinstance(m, CodedLinear)}
    assert len(linears) == len(source.packing.shapes)
    limit = 1e-4 if source.dtype == torch.float32 else 3e-2
    with torch.no_grad():
        found = model(input_ids=PROBE).logits.float()
    assert (found - expected).abs().max() < limit * expected.abs().max()
    # codes and scales are the source's
    for path in source.packing.shapes:
        old = source.packing.uniform(path, source.load(source.packing.names(path)))
        new = written.packing.uniform(path, written.load(written.packing.names(path)))
        if old is None:
            names = source.packing.names(path)
            assert all(torch.equal(written.load([n])[n], source.load([n])[n]) for n in names)
            continue
        grid = getattr(old, "grid", old)
        assert torch.equal(new.codes, old.codes) and torch.equal(new.scale, grid.scale)
        assert torch.equal(new.zero, grid.zero) == (path not in factors)
    dense = set(source.names()) & set(written.names())
    for name in dense - {n for path in source.packing.shapes for n in source.packing.names(path)}:
        assert torch.equal(written.load([name])[name], source.load([name])[name])


def test_zeros_have_the_bytes_of_scales_and_their_own_digits(tmp_path, monkeypatch):
    source = BASES["bfloat16"](tmp_path)
    factors = pooled(source)
    written = merge(source, tmp_path / "merged", factors, monkeypatch)
    kinds = written.config["compresso"]["coded_kinds"]
    assert {name: kind.get("zero_dtype") for name, kind in kinds.items()} == {
        "b3g32z3": None,
        "b3g32-float16-zeros": "float16",
    }
    for path, (rows, columns) in source.packing.shapes.items():
        stored = sum(written.info(name).nbytes for name in written.packing.names(path))
        zeros = 16 if path in factors else 3
        assert stored * 8 == rows * columns * (3 + (16 + zeros) / GROUP)


def test_zeros_that_float16_cannot_hold_are_float32(tmp_path):
    source = BASES["bfloat16"](tmp_path)
    path, factor = next(iter(pooled(source).items()))
    parts = source.load(source.packing.names(path))
    merged = merged_codes(source.packing, path, parts, LowRank(factor.up * 1e8, factor.down))
    assert merged.zeros_in == torch.float32 and merged.decode().isfinite().all()
    assert merged_codes(source.packing, path, parts, factor).zeros_in == torch.float16


@pytest.mark.parametrize("method", ["higgs", "nf4", "int8"])
def test_codes_without_zeros(method, tmp_path):
    source = packed("llama", tmp_path, method=method, **({"bits": 3} if method == "higgs" else {}))
    factors = {
        path: LowRank(torch.ones(rows, 1), torch.ones(1, columns // GROUP))
        for path, (rows, columns) in source.packing.shapes.items()
    }
    adapter = open_model(source)
    with pytest.raises(CheckpointError, match=r"a correction of .* its codes have no zeros"):
        merge_zeros(source, adapter, adapter.block_tensors(0), factors)


def test_what_is_no_linear(tmp_path, monkeypatch):
    source = BASES["coded"](tmp_path)
    adapter = open_model(source)
    monkeypatch.setattr("compresso.stages.merge_zeros.linear_modules", lambda *_: {})
    with pytest.raises(CheckpointError, match="is packed, but is no linear that can be coded"):
        merge_zeros(source, adapter, adapter.block_tensors(0), {})
