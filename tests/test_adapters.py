"""Checkpoints with an adapter: written, proved, read by every stage, loaded by plain PEFT."""

import importlib.util
import json
import shutil

import pytest
import torch
from coding import affine, save_coded, vector
from correcting import (
    PROBE,
    calm,
    corrections,
    logits_in_memory,
    modules,
    put_beside,
    run_quantize,
    save_mixed,
    sums,
)
from peft import AutoPeftModelForCausalLM, PeftModel
from restructured import STRUCTURES, save
from tiny_models import build
from transformers import AutoModelForCausalLM

from compresso import run
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError
from compresso.models.modeling_compresso import SharedLinear
from compresso.provenance import read_record


def stock(family, path, **changes):
    calm(family, **changes).save_pretrained(path)
    return Checkpoint(path)


def packed(family, **settings):
    def make(path):
        return run_quantize(stock(family, path / "source"), path / "packed", **settings)

    return make


BASES = {
    "dense": lambda path: stock("llama", path / "dense"),
    "dense bfloat16": lambda path: stock("qwen2", path / "dense", dtype=torch.bfloat16),
    "tied": lambda path: stock("qwen3", path / "dense"),
    "Conv1D": lambda path: stock("gpt2", path / "dense"),
    "other names": lambda path: stock("gpt_neox", path / "dense"),
    "packed symmetric": packed("llama", method="rtn", bits=4, group_size=32),
    "packed asymmetric": packed("qwen3", method="rtn", bits=3, group_size=32, symmetric=False),
    "packed mixed": lambda path: save_mixed(calm("llama"), path / "mixed"),
    "vectors": packed("llama", method="higgs", bits=3),
    "affine": packed("llama", method="hqq", bits=3, group_size=32),
    "Conv1D vectors": packed("gpt2", method="higgs", bits=3),
    "Conv1D affine": packed("gpt2", method="hqq", bits=3, group_size=32),
    "nf4": packed("llama", method="nf4"),
    "int8": packed("llama", method="int8"),
    "Conv1D nf4": packed("gpt2", method="nf4"),
    "halves removed": lambda path: save(build("llama"), STRUCTURES["both kinds"], path / "x"),
    "shared": lambda path: save(build("llama"), STRUCTURES["shared"], path / "x"),
    "everything": lambda path: save(build("gpt2"), STRUCTURES["everything"], path / "x"),
    "everything coded": lambda path: (
        save_coded(
            build("llama"),
            path,
            [vector(), affine()],
            structure=STRUCTURES["everything"],
            head=True,
        ).coded
    ),
}
KERNELS = {"nf4": 0.04, "int8": 0.08, "Conv1D nf4": 0.04}  # which round their inputs


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=PROBE).logits.float()


@pytest.mark.parametrize("base", BASES)
def test_every_base(base, tmp_path, monkeypatch):
    source = BASES[base](tmp_path)
    factors = corrections(source)
    expected = logits_in_memory(source, factors)
    assert (expected - logits_in_memory(source, {})).abs().max() > 0.1 * expected.abs().max()
    written = put_beside(source, tmp_path / "out", factors, monkeypatch)
    record = read_record(written.path)
    assert record["proof"]["adapter"] == "peft" and record["proof"]["generated"] is not None
    # what is stored of the base is what was stored
    kept = written.load(written.names())
    for name, tensor in source.load(source.names()).items():
        assert torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype
    assert written.config == source.config
    # what is seen of it
    assert written.adapter is not None
    assert written.adapter.ranks == {
        path: factor.down.shape[0] for path, factor in sorted(factors.items())
    }
    size = sum(f.up.numel() + f.down.numel() for f in factors.values()) * source.dtype.itemsize
    assert written.adapter.nbytes == size == written.stored_bytes - source.stored_bytes
    assert written.parameters == source.parameters
    found = written.load_weights(written.weight_names())
    dense = sums(source, factors)
    for name, weight in source.load_weights(source.weight_names()).items():
        assert torch.equal(found[name], dense.get(name, weight))
    # what its users see
    tolerance = KERNELS.get(base, 1e-4 if source.dtype == torch.float32 else 3e-2)
    limit = tolerance * expected.abs().max()
    model = (
        AutoPeftModelForCausalLM.from_pretrained(written.path / "adapter")
        if (base != "packed mixed")
        else None
    )
    if model is not None:
        assert (logits(model) - expected).abs().max() < limit
        with model.disable_adapter():
            assert (logits(model) - expected).abs().max() > limit
