"""Exports in the config of Nemotron-NAS: loaded by the code in them, and run as vLLM runs them."""

import json
from dataclasses import replace

import pytest
import torch
from coding import affine, save_coded, uniform
from correcting import PROBE, RUNTIME, corrections, logits_in_memory, put_beside
from exporting import close, loaded_logits, run_export
from peft import PeftModel
from restructured import STRUCTURES, reference, save
from tiny_models import BLOCKS, build
from transformers import AutoModelForCausalLM, LlamaConfig

from compresso.calibration.replay import replay
from compresso.checkpoint.directory import read_infos
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.models.modeling_decilm import DeciLMConfig, DeciLMForCausalLM
from compresso.models.structure import Structure, restructure, structure_of
from compresso.runtimes.traits import traits_of
from compresso.stages.verify import check_verification, verify

FORM = "decilm"
LIKE_LLAMA = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
}
BOTH = Structure(no_attention=(2,), no_mlp=(2, 4))


@torch.no_grad()
def as_vllm_does(model):
    """The logits by vLLM's order of residual stream and norms (nemotron_nas.py of 0.33)."""
    body = model.model
    hidden, residual = body.embed_tokens(PROBE), None
    positions = body.rotary_emb(hidden, torch.arange(PROBE.shape[1])[None])
    mask = torch.full((PROBE.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for layer, block in zip(body.layers, model.config.block_configs, strict=True):
        if not block.attention.no_op:
            residual = hidden if residual is None else hidden + residual
            hidden = layer.input_layernorm(residual)
            hidden = layer.self_attn(hidden, position_embeddings=positions, attention_mask=mask)[0]
        if not block.ffn.no_op:
            residual = hidden + residual
            hidden = layer.mlp(layer.post_attention_layernorm(residual))
    return model.lm_head(body.norm(hidden + residual))


@pytest.mark.parametrize("structure", [*STRUCTURES, "whole blocks"])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_loads_and_is_the_model(family, structure, tmp_path):
    changes = LIKE_LLAMA[family]
    asked = STRUCTURES.get(structure, BOTH)
    source = save(build(family, **changes), asked, tmp_path / "source")
    report = run_export(source, tmp_path / "out", FORM).report
    assert report.summary["proved"].startswith("in transformers")
    model, logits = loaded_logits(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "DeciLMForCausalLM"
    with torch.no_grad():
        expected = reference(family, asked, **changes)(input_ids=PROBE).logits
    assert close(logits, expected) and close(as_vllm_does(model), expected)
    first = 0 in asked.no_attention
    assert any("stored as zeros" in line for line in report.warnings) == first
    # nothing is stored for what was removed
    gone = [f"layers.{i}.self_attn" for i in asked.no_attention if i]
    gone += [f"layers.{i}.mlp" for i in asked.no_mlp]
    assert not any(part in name for name in read_infos(tmp_path / "out") for part in gone)


def test_without_trust_it_does_not_load(tmp_path):
    run_export(save(build("llama"), BOTH, tmp_path / "source"), tmp_path / "out", FORM)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("structure", ["both kinds", "everything"])
def test_codes(structure, pack, tmp_path):
    structure = STRUCTURES[structure]
    source = save_coded(build("llama"), tmp_path, uniform(4), structure=structure).coded
    run_export(source, tmp_path / "out", FORM, pack=pack)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == pack
    _, logits = loaded_logits(tmp_path / "out", trust_remote_code=True)
    assert close(logits, logits_in_memory(source, {}))


def test_codes_without_a_form(tmp_path):
    source = save_coded(build("llama"), tmp_path, affine(), structure=BOTH).coded
    report = run_export(source, tmp_path / "out", FORM).report
    assert {row["stored"] for row in report.rows} == {"decoded", "kept"}


def test_adapter_beside(tmp_path, monkeypatch):
    bare = save(build("llama"), STRUCTURES["shared"], tmp_path / "source")
    factors = corrections(bare)
    source = put_beside(bare, tmp_path / "corrected", factors, monkeypatch)
    run_export(source, tmp_path / "out", FORM)
    base, _ = loaded_logits(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        put_on = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert close(put_on(input_ids=PROBE).logits, logits_in_memory(bare, factors))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "`gemma2` does not compute as Llama does"),
        ("mistral", "`mistral` with `sliding_window` 8 does not compute"),
        ("qwen2", "`qwen2` with `use_sliding_window` true does not compute"),
    ],
)
def test_other_families(family, message, tmp_path):
    source = save(build(family), BOTH, tmp_path / "source")
    with pytest.raises(ConfigError, match=message) as raised:
        run_export(source, tmp_path / "out", FORM)
    assert raised.value.hint


def test_configs_of_other_making(tmp_path):
    run_export(save(build("llama"), BOTH, tmp_path / "source"), tmp_path / "out", FORM)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    wide = json.loads(json.dumps(values))
    wide["block_configs"][0]["ffn"]["intermediate_size"] = 32
    with pytest.raises(ValueError, match="several widths"):
        DeciLMForCausalLM(DeciLMConfig.from_dict(wide))
    values["block_configs"].pop()
    with pytest.raises(ValueError, match="not about every block"):
        DeciLMForCausalLM(DeciLMConfig.from_dict(values))


def test_what_is_too_large_to_load_is_proved_block_by_block(tmp_path, monkeypatch):
    source = save(build("llama"), BOTH, tmp_path / "source")
    monkeypatch.setattr("exporting.RUNTIME", replace(RUNTIME, max_memory=10_000))
    report = run_export(source, tmp_path / "out", FORM).report
    assert report.summary["proved"] == "in compresso, block by block"
    assert report.summary["difference"] == 0
    assert report.warnings == [
        "proved block by block, without loading it whole, as it is larger than `--max-memory`"
    ]


@pytest.mark.parametrize("structure", [*STRUCTURES, "whole blocks", "nothing"])
def test_it_is_read_back(structure, tmp_path):
    """As a restructured Llama, whatever family it was: so that every stage can go on from it."""
    changes = LIKE_LLAMA["qwen2"]
    asked = {**STRUCTURES, "nothing": Structure()}.get(structure, BOTH)
    source = save(build("qwen2", **changes), asked, tmp_path / "source")
    run_export(source, tmp_path / "out", FORM)
    found = Checkpoint(tmp_path / "out")
    lacking = Structure(tuple(b for b in asked.no_attention if b), asked.no_mlp)
    assert structure_of(found.config) == lacking
    like = LlamaConfig(num_hidden_layers=BLOCKS).to_dict()
    meant = restructure(like, lacking)
    assert found.config.get("compresso") == meant.get("compresso")
    assert found.config["model_type"] == meant["model_type"]
    assert found.config.get("auto_map") == meant.get("auto_map")
    with torch.no_grad():
        expected = reference("qwen2", asked, **changes)(input_ids=PROBE).logits
    assert close(replay_of(found), expected)
    assert traits_of(found).structure == "decilm"
    run_export(found, tmp_path / "dense", "dense")
    assert close(loaded_logits(tmp_path / "dense")[1], expected)
    assert not (tmp_path / "dense" / "modeling_decilm.py").exists()


def replay_of(source):
    return replay(
        source, PROBE, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )


def test_codes_are_read_back_and_go_on_as_codes(tmp_path):
    structure = STRUCTURES["both kinds"]
    source = save_coded(build("llama"), tmp_path, uniform(4), structure=structure).coded
    run_export(source, tmp_path / "out", FORM)
    found = Checkpoint(tmp_path / "out")
    outcome = run_export(found, tmp_path / "gptq", "gptq")
    assert "rescaled" in {row["stored"] for row in outcome.report.rows}
    assert close(replay_of(found), replay_of(source))


def test_verifying_it_takes_trust(tmp_path):
    run_export(save(build("llama"), BOTH, tmp_path / "source"), tmp_path / "out", FORM)
    with pytest.raises(ConfigError, match="comes with code that has to be run") as caught:
        verify(str(tmp_path / "out"), ["transformers"], RUNTIME)
    assert "--trust-remote-code" in caught.value.hint
    trusting = replace(RUNTIME, trust_remote_code=True)
    check_verification(verify(str(tmp_path / "out"), ["transformers"], trusting))


@pytest.mark.parametrize("half", [("ffn", "intermediate_size"), ("attention", "n_heads_in_group")])
def test_blocks_of_several_sizes_are_not_read(half, tmp_path):
    """As those of models that were made by others are."""
    run_export(save(build("llama"), BOTH, tmp_path / "source"), tmp_path / "out", FORM)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["block_configs"][0][half[0]][half[1]] = 7
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="MLPs or heads of several sizes"):
        Checkpoint(tmp_path / "out")
    del config["block_configs"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"`block_configs` in config\.json cannot be read"):
        Checkpoint(tmp_path / "out")
