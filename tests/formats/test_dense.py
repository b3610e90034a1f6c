"""Dense exports: any checkpoint as the stock class of its family has it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from coding import affine, save_coded, vector
from correcting import (
    PROBE,
    RUNTIME,
    calm,
    corrections,
    logits_in_memory,
    packed,
    put_beside,
    run_quantize,
    save_mixed,
    stock,
)
from exporting import close, loaded_logits, run_export
from peft import PeftModel
from restructured import STRUCTURES, reference, save
from tiny_models import build
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compresso import preflight
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import ConfigError, GateError, Interrupted, ResourceError
from compresso.models.structure import MODELING_FILES
from compresso.provenance import lineage

EVERYTHING = STRUCTURES["everything"]


SOURCES = {
    "dense bfloat16": lambda path: stock("qwen2", path / "x", dtype=torch.bfloat16),
    "symmetric, head": packed("gpt_neox", method="rtn", bits=4, group_size=32, lm_head=True),
    "asymmetric": packed("qwen3", method="rtn", bits=3, group_size=32, symmetric=False),
    "mixed": lambda path: save_mixed(calm("llama"), path / "x"),
    "vectors": packed("gpt2", method="higgs", bits=3),
    "scales in 8 bits": packed("llama", method="rtn", bits=2, group_size=32, scale_bits=8),
    "nf4": packed("gpt2", method="nf4"),
    "int8": packed("llama", method="int8"),
    "everything coded": lambda path: (
        save_coded(build("llama"), path, [vector(), affine()], structure=EVERYTHING).coded
    ),
    "everything packed": lambda path: run_quantize(
        save(build("llama"), EVERYTHING, path / "x"),
        path / "packed",
        method="rtn",
        bits=4,
        group_size=32,
    ),
}


def check(written, family):
    """It is a plain checkpoint of that family."""
    config = json.loads((written / "config.json").read_text())
    assert config["model_type"] == family and "compresso" not in config
    assert "quantization_config" not in config and "auto_map" not in config
    assert not any((written / file.name).exists() for file in MODELING_FILES)
    model, logits = loaded_logits(written)
    assert type(model).__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return logits


def test_restructured_models_of_every_family(family_name, tmp_path):
    """Shared linears copied, corrections added, removed halves zeros: the same model."""
    source = save(build(family_name), EVERYTHING, tmp_path / "source")
    outcome = run_export(source, tmp_path / "out", "dense")
    logits = check(tmp_path / "out", family_name)
    with torch.no_grad():
        expected = reference(family_name, EVERYTHING)(input_ids=PROBE).logits
    assert close(logits, expected)
    assert outcome.report.summary["proved"].startswith("in transformers")
    assert {row["stored"] for row in outcome.report.rows} == {"kept", "copied", "zeros", "summed"}


@pytest.mark.parametrize("kind", SOURCES)
def test_codes_are_decoded(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    outcome = run_export(source, tmp_path / "out", "dense")
    logits = check(tmp_path / "out", source.config["model_type"].removeprefix("compresso_"))
    limit = 1e-4 if source.dtype == torch.float32 else 3e-2
    assert close(logits, logits_in_memory(source, {}), limit)
    rows = outcome.report.rows
    assert sum(row["bytes"] for row in rows) == Checkpoint(tmp_path / "out").stored_bytes
    assert kind.startswith("dense") or any(row["stored"] == "decoded" for row in rows)


def test_own_structure_is_kept_if_asked_for(tmp_path):
    source = SOURCES["everything packed"](tmp_path)
    run_export(source, tmp_path / "out", "dense", structure="own")
    written = Checkpoint(tmp_path / "out")
    assert written.config["compresso"] == source.config["compresso"] and not written.packed
    assert written.weight_names() == source.weight_names()
    assert close(loaded_logits(tmp_path / "out")[1], logits_in_memory(source, {}))


@pytest.mark.parametrize("kind", ["asymmetric", "vectors", "everything packed"])
def test_adapter_beside_and_merged(kind, tmp_path, monkeypatch):
    bare = SOURCES[kind](tmp_path)
    factors = corrections(bare)
    source = put_beside(bare, tmp_path / "corrected", factors, monkeypatch)
    expected = logits_in_memory(bare, factors)
    run_export(source, tmp_path / "beside", "dense")
    base, plain = loaded_logits(tmp_path / "beside")
    assert not close(plain, expected)
    with torch.no_grad():
        put_on = PeftModel.from_pretrained(base, tmp_path / "beside" / "adapter")
        assert close(put_on(input_ids=PROBE).logits, expected)
    # Checkpoints that are read by compresso have the corrections, too.
    assert Checkpoint(tmp_path / "beside").adapter is not None
    run_export(source, tmp_path / "merged", "dense", merge_adapter=True)
    assert not (tmp_path / "merged" / "adapter").exists()
    assert close(loaded_logits(tmp_path / "merged")[1], expected)


def test_an_adapter_that_is_not_there(tmp_path):
    source = stock("llama", tmp_path / "x")
    with pytest.raises(ConfigError, match="has no adapter to merge") as raised:
        run_export(source, tmp_path / "out", "dense", merge_adapter=True)
    assert raised.value.hint == "leave out `--merge-adapter`"


def test_the_record(tmp_path):
    source = SOURCES["mixed"](tmp_path)
    outcome = run_export(source, tmp_path / "out", "dense")
    record = json.loads((tmp_path / "out" / "compresso.json").read_text())
    assert record["proof"]["generated"] and record["proof"]["runtime"].startswith("transformers")
    assert record["fingerprint"]["tokens"] and record["step"]["method"] == "dense"
    ancestors = lineage(Checkpoint(tmp_path / "out"))
    assert [one.name for one in ancestors] == ["original", "export-dense"]
    assert run_export(source, tmp_path / "out", "dense").reused
    assert not outcome.reused


def test_a_wrong_export_is_not_published(tmp_path, monkeypatch):
    source = stock("llama", tmp_path / "x")

    def broken(model, name):
        return model.load([name])[name] * 1.2

    monkeypatch.setattr("compresso.formats.parts.dense_tensor", broken)
    # What is compared before, weight by weight, would notice it, too: see test_checking.py.
    monkeypatch.setattr("compresso.exporting.check_weights", lambda *_, **__: None)
    with pytest.raises(GateError, match="is not the model it was in memory") as raised:
        run_export(source, tmp_path / "out", "dense")
    assert "nothing was published" in raised.value.hint
    assert not (tmp_path / "out").exists()
    run_export(source, tmp_path / "unproved", "dense", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unproved")
    assert not close(model(input_ids=PROBE).logits, logits_in_memory(source, {}))


def test_without_the_package_that_proves_it(tmp_path, monkeypatch):
    bare = stock("llama", tmp_path / "x")
    source = put_beside(bare, tmp_path / "corrected", corrections(bare), monkeypatch)
    monkeypatch.setattr("compresso.exporting.importlib.util.find_spec", lambda name: None)
    outcome = run_export(source, tmp_path / "out", "dense")
    assert outcome.report.summary["proved"] == "no"
    assert outcome.report.warnings == [
        "not proved: the dense export was written, but not loaded in `transformers`, as package"
        " `peft` is not installed: pip install 'compresso-llm[peft]'"
    ]


def test_a_model_larger_than_the_budget_is_proved_in_blocks(tmp_path, monkeypatch):
    source = SOURCES["asymmetric"](tmp_path)
    monkeypatch.setattr("exporting.RUNTIME", replace(RUNTIME, max_memory=10_000))
    outcome = run_export(source, tmp_path / "out", "dense")
    assert outcome.report.summary["proved"] == "in compresso, block by block"
    assert outcome.report.summary["difference"] == 0
    assert outcome.report.warnings == [
        "proved block by block, without loading it whole, as it is larger than `--max-memory`"
    ]


def test_an_interrupted_export_goes_on(tmp_path, monkeypatch):
    source = stock("llama", tmp_path / "x")
    read = []

    def dense_tensor(model, name):
        if name.startswith("model.layers.1.") and len(read) < 15:
            raise KeyboardInterrupt
        read.append(name)
        return model.load([name])[name]

    monkeypatch.setattr("compresso.formats.parts.dense_tensor", dense_tensor)
    with pytest.raises(Interrupted, match="1 finished parts are saved"):
        run_export(source, tmp_path / "out", "dense")
    first = list(read)
    read += [""] * 20
    run_export(source, tmp_path / "out", "dense")
    assert not set(first) & set(read[len(first) :])
    assert {*read} - {""} == {*source.names()}


def test_room_on_the_disk(tmp_path, monkeypatch):
    source = SOURCES["asymmetric"](tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="needs at least") as raised:
        run_export(source, tmp_path / "out", "dense")
    assert raised.value.hint == "choose another disk with `-o`"


def test_the_bundled_model(tmp_path):
    """Quantized, then in three formats, each loaded by transformers and near what it is made of."""
    source = run_quantize(
        open_checkpoint("reference"), tmp_path / "q", method="rtn", bits=4, group_size=64
    )
    for form in ("dense", "compressed-tensors", "decilm"):
        report = run_export(source, tmp_path / form, form).report
        assert report.summary["proved"].startswith("in transformers")
        assert report.summary["same_top_token"] > 0.95 and not report.warnings
    assert Checkpoint(tmp_path / "compressed-tensors").stored_bytes == source.stored_bytes
