"""Stages on restructured models: what they write loads, is what it was in memory, and says so."""

import json
import shutil

import numpy as np
import pytest
import torch
from restructured import STRUCTURES, reference, save, used_linears
from stopping import stopped_after
from tiny_checkpoint import save_tiny
from tiny_models import BLOCKS, build, tokens
from transformers import AutoModelForCausalLM
from walking import difference, outputs

from compresso import config
from compresso.calibration.originals import Originals
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.structure import MODELING_FILE, Structure, structure_of
from compresso.provenance import read_record
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.stages.inspect import inspect_checkpoint, print_inspection

IDS = tokens(2, 20)
EVERYTHING = STRUCTURES["everything"]


def source_of(name, structure, path, **changes):
    """A restructured checkpoint with the code of some older version."""
    checkpoint = save(build(name, **changes), structure, path / "source")
    (checkpoint.path / MODELING_FILE.name).write_text("raise AssertionError\n")
    np.save(path / "tokens.npy", tokens(16, 32, seed=5).numpy())
    return checkpoint


def run(source, target, stage="quantize", *, runtime=None, **values):
    step = make_step(stage, values, where="test")
    data = {"dataset": str(source.path.parent / "tokens.npy"), "samples": 16, "batch_size": 8}
    calibration = config.build(CalibrationSettings, data, where="test")
    runtime = runtime or make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
    return run_step(step, source, calibration, target, runtime)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def quantized_linears(checkpoint):
    ending = ".weight_packed"
    return {name.removesuffix(ending) for name in checkpoint.names() if name.endswith(ending)}


def own_linears(name, structure):
    family = family_of(name)
    return {
        f"{family.blocks}.{block}.{path}"
        for block in range(BLOCKS)
        if structure.owner(block) == block
        for path in used_linears(family, structure, block)
    }


@pytest.mark.parametrize("kind", ["both kinds", "everything"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox", "opt"])
def test_quantized_it_loads_as_it_was(name, method, kind, tmp_path):
    structure = STRUCTURES[kind]
    source = source_of(name, structure, tmp_path)
    target = tmp_path / "packed"
    run(source, target, method=method, bits=4, group_size=32)
    written = Checkpoint(target)
    assert structure_of(written.config) == structure
    assert written.config["quantization_config"]["format"] == "pack-quantized"
    assert written.config["auto_map"] == source.config["auto_map"]
    assert (target / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    assert quantized_linears(written) == own_linears(name, structure)
    rows = [row["linear"] for row in read_record(target)["report"]["rows"]]
    assert sorted(rows) == sorted(own_linears(name, structure))
    corrections = [n for n in source.names() if "correction" in n]
    before, after = source.load(corrections), written.load(corrections)
    assert all(torch.equal(before[n], after[n]) for n in corrections)
    proof = read_record(target)["proof"]
    assert proof["difference"] <= proof["tolerance"] and proof["generated"]
    with torch.no_grad():
        packed, dense = load(target), load(source.path)
        stored = {n: t for n, t in written.load_weights(written.weight_names()).items()}
        assert difference(packed(IDS).logits, dense(IDS).logits) > 1e-4
        dense.load_state_dict({n.replace("embed_out", "lm_head"): stored[n] for n in stored}, False)
        assert difference(packed(IDS).logits, dense(IDS).logits) < 1e-6


def test_a_quantized_model_that_runs_packed(tmp_path):
    source = source_of("llama", EVERYTHING, tmp_path)
    target = tmp_path / "packed"
    run(source, target, method="rtn", bits=4, group_size=32)
    with torch.no_grad():
        expected = load(target)(IDS).logits
        found = json.loads((target / "config.json").read_text())
        found["quantization_config"]["dequantize"] = False
        (target / "config.json").write_text(json.dumps(found))
        assert difference(load(target)(IDS).logits, expected) < 1e-5


def test_without_packing_and_transposed(tmp_path):
    source = source_of("gpt2", EVERYTHING, tmp_path)
    run(source, tmp_path / "rounded", method="gptq", bits=4, group_size=32, pack=False)
    written = Checkpoint(tmp_path / "rounded")
    assert written.names() == source.names()
    changed = {
        name.removesuffix(".weight")
        for name in written.names()
        if not torch.equal(written.load([name])[name], source.load([name])[name])
    }
    assert changed == own_linears("gpt2", EVERYTHING)


FOLLOWING = {
    "matched": {"method": "gptq", "match_share": 1.0},
    "tuned": {"method": "autoround", "steps": 2},
}


@pytest.mark.parametrize("stopped", [None, 0, 1, 4])
@pytest.mark.parametrize("method", FOLLOWING)
def test_the_original_model_is_followed(method, stopped, tmp_path, monkeypatch):
    """With its own linears, also where they are another block's or were finished earlier."""
    source = source_of("llama", EVERYTHING, tmp_path)
    values = {"bits": 3, "group_size": 32, **FOLLOWING[method]}
    followed, make = [], Originals.__init__

    def made(self, *arguments):
        make(self, *arguments)
        followed.append(self)

    if stopped is not None:
        stopped_after(stopped, monkeypatch, lambda: run(source, tmp_path / "out", **values))
    monkeypatch.setattr(Originals, "__init__", made)
    run(source, tmp_path / "out", **values)
    data = torch.from_numpy(np.load(tmp_path / "tokens.npy"))
    expected = outputs(reference("llama", EVERYTHING), f"model.layers.{BLOCKS - 1}", [data])[0]
    found = torch.cat([followed[0].states[0], followed[0].states[1]])
    assert difference(found, expected) < 1e-5
    proof = read_record(tmp_path / "out")["proof"]
    assert proof["difference"] <= proof["tolerance"]
    if stopped is not None:
        run(source, tmp_path / "whole", **values)
        for part in (tmp_path / "whole").glob("model-*.safetensors"):
            assert part.read_bytes() == (tmp_path / "out" / part.name).read_bytes()


def test_a_result_proved_block_by_block(tmp_path):
    source = source_of("llama", EVERYTHING, tmp_path)
    small = make_runtime(RuntimeSettings(dtype="float32", device="cpu", max_memory="300KB"))
    run(source, tmp_path / "packed", runtime=small, method="gptq", bits=3, group_size=32)
    assert read_record(tmp_path / "packed")["proof"]["generated"] is None


def test_the_code_is_only_where_it_is_needed(tmp_path):
    source = source_of("llama", Structure(), tmp_path)
    run(source, tmp_path / "packed", method="rtn", bits=4, group_size=32)
    assert not (tmp_path / "packed" / MODELING_FILE.name).exists()


def test_eval(tmp_path):
    """With the tokenizer of the model it was made from."""
    stock = save_tiny(tmp_path / "stock")
    structure = Structure(
        no_attention=(0,), no_mlp=(3,), shared=(0, 1, 1, 3), rank=2, corrected=(2,)
    )
    source = save(load(stock), structure, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stock / name, source.path)
    np.save(tmp_path / "tokens.npy", tokens(16, 32, seed=5).numpy())
    run(source, tmp_path / "packed", method="rtn", bits=8, group_size=32)
    packed, values = Checkpoint(tmp_path / "packed"), {"length": 32}
    values |= {"dataset": str(tmp_path / "tokens.npy"), "against": str(source.path)}
    rows = run(packed, tmp_path / "eval", "eval", **values).report.rows
    model, data = load(source.path), tokens(16, 32, seed=5)
    with torch.no_grad():
        loss = model(data, labels=data).loss
    assert rows[0]["ppl"] == pytest.approx(loss.exp().item(), rel=1e-3)
    assert rows[1]["ppl"] == pytest.approx(rows[0]["ppl"], rel=1e-2)


def test_inspect(tmp_path, capsys):
    found = inspect_checkpoint(source_of("qwen2", EVERYTHING, tmp_path))
    assert found["supported"] and found["architecture"] == "CompressoQwen2ForCausalLM"
    assert found["blocks_without_attention"] == [1, 5] and found["blocks_without_mlp"] == [2]
    assert found["linears_used_of_block"] == [0, 0, 0, 3, 4, 4]
    assert (found["corrected_blocks"], found["rank_of_corrections"]) == ([0, 1, 3], 2)
    print_inspection(found)
    assert "blocks without mlp" in capsys.readouterr().out
    save(build("qwen2"), Structure(), tmp_path / "stock")
    assert "rank_of_corrections" not in inspect_checkpoint(Checkpoint(tmp_path / "stock"))
