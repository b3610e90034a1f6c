"""GPTQ, auto-round and bitsandbytes exports: what is stored, and what is refused."""

import pytest
import torch
from coding import save_coded, uniform, vector
from correcting import PROBE, calm, corrections, put_beside, run_quantize, save_mixed, stock
from exporting import close, loaded_logits, run_export
from restructured import save

from compresso.calibration.replay import replay
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.models.structure import Structure

STRUCTURES_OF_TWO = Structure(no_attention=(1,))
ALIKE = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Quantized checkpoints, each made once."""
    made, root = {}, tmp_path_factory.mktemp("sources")

    def source(name, **settings):
        if name not in made:
            dense = stock("llama", root / f"{name}-dense", dtype=torch.bfloat16)
            made[name] = run_quantize(dense, root / name, **settings)
        return made[name]

    return source


def reread(path):
    """What compresso says of an export, and the weights that it reads."""
    found = Checkpoint(path)
    linears = [name for name in found.weight_names() if name.endswith("proj.weight")]
    return found, found.load_weights(linears)


def said(source):
    return replay(
        source,
        PROBE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        trust_remote_code=False,
    )


CASES = [
    ("gptq", {}, {"checkpoint_format": "gptq", "sym": True, "bits": 4, "group_size": 32}),
    ("gptq", {"symmetric": False}, {"checkpoint_format": "gptq_v2", "sym": False}),
    ("gptq", {"bits": 3}, {"bits": 3, "checkpoint_format": "gptq"}),
    ("gptq", {"bits": 8, "group_size": -1}, {"bits": 8, "group_size": -1}),
    ("auto-round", {}, {"packing_format": "auto_round:auto_gptq", "sym": True}),
    ("auto-round", {"symmetric": False, "bits": 2}, {"packing_format": "auto_round", "bits": 2}),
    ("auto-round", {"group_size": 8}, {"group_size": 8}),
]


@pytest.mark.parametrize(("form", "settings", "entry"), CASES)
def test_codes_are_repacked(form, settings, entry, sources, tmp_path):
    name = "-".join(str(value) for value in settings.values()) or "usual"
    source = sources(name, **ALIKE | settings)
    outcome = run_export(source, tmp_path / "out", form)
    found, weights = reread(tmp_path / "out")
    written = found.config["quantization_config"]
    assert written["quant_method"] == form and entry.items() <= written.items()
    # Once rounded to float16, then to bfloat16: at most one step away.
    for name, weight in source.load_weights(weights).items():
        assert torch.allclose(weights[name].float(), weight.float(), rtol=2**-7, atol=0)
    rows = {row["stored"]: row for row in outcome.report.rows}
    assert set(rows) == {"repacked", "kept"}
    assert [warning for warning in outcome.report.warnings if "not proved" in warning]
    assert close(said(found), said(source), 0.02)


def test_mixed_asymmetric_codes(tmp_path):
    """What neither compressed-tensors nor GPTQ's own form can hold."""
    source = save_coded(
        calm("llama", dtype=torch.bfloat16),
        tmp_path / "x",
        [uniform(4, 32), uniform(2, 16), uniform(3, 64), uniform(8, 32, symmetric=True)],
    ).coded
    run_export(source, tmp_path / "out", "auto-round")
    found, _ = reread(tmp_path / "out")
    entry = found.config["quantization_config"]
    forms = {(own["bits"], own["group_size"], own["sym"]) for own in entry["extra_config"].values()}
    assert entry["packing_format"] == "auto_round" and len(forms) == 3
    assert all(name.startswith("model.layers.") for name in entry["extra_config"])
    assert close(said(found), said(source), 0.02)
    with pytest.raises(ConfigError, match="have 2, 3, 4 and 8 bits") as caught:
        run_export(source, tmp_path / "gptq", "gptq")
    assert "auto-round" in caught.value.hint
    run_export(source, tmp_path / "uniform", "gptq", uniform=True)
    found, _ = reread(tmp_path / "uniform")
    entry = found.config["quantization_config"]
    assert (entry["bits"], entry["group_size"], entry["sym"]) == (8, 16, False)
    assert close(said(found), said(source), 0.02)


def test_mixed_symmetric_codes(tmp_path):
    source = save_mixed(calm("llama", dtype=torch.bfloat16), tmp_path / "x")
    run_export(source, tmp_path / "out", "auto-round")
    found, _ = reread(tmp_path / "out")
    assert found.config["quantization_config"]["packing_format"] == "auto_round:auto_gptq"
    assert close(said(found), said(source), 0.02)


def test_a_head_of_codes(sources, tmp_path):
    source = sources("head", **ALIKE, lm_head=True)
    run_export(source, tmp_path / "auto", "auto-round")
    found, _ = reread(tmp_path / "auto")
    assert found.config["quantization_config"]["extra_config"]["lm_head"]["bits"] == 4
    assert "lm_head.qweight" in found.names()
    outcome = run_export(source, tmp_path / "gptq", "gptq")
    found, _ = reread(tmp_path / "gptq")
    assert "lm_head.weight" in found.names() and "lm_head.qweight" not in found.names()
    assert any("stored dense" in warning for warning in outcome.report.warnings)
    assert close(said(found), said(source), 0.02)


def test_linears_that_were_left_out(sources, tmp_path):
    source = sources("ignored", **ALIKE, ignore=["model.layers.1.mlp.up_proj"])
    run_export(source, tmp_path / "gptq", "gptq")
    entry = reread(tmp_path / "gptq")[0].config["quantization_config"]
    listed = [name for names in entry["modules_in_block_to_quantize"] for name in names]
    assert len(listed) == 13 and "model.layers.1.mlp.up_proj" not in listed
    run_export(source, tmp_path / "auto", "auto-round")
    entry = reread(tmp_path / "auto")[0].config["quantization_config"]
    assert entry["extra_config"] == {
        "model.layers.1.mlp.up_proj": {"bits": 16, "data_type": "float"}
    }


@pytest.mark.parametrize("form", ["gptq", "auto-round"])
def test_dense_weights_are_rounded_if_asked(form, tmp_path):
    source = stock("qwen2", tmp_path / "x", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=f"no codes|has codes that `{form}` can hold") as caught:
        run_export(source, tmp_path / "no", form)
    assert "--bits 4" in caught.value.hint
    outcome = run_export(source, tmp_path / "out", form, bits=8, group_size=32)
    assert "rounded" in {row["stored"] for row in outcome.report.rows}
    assert 0 < outcome.report.summary["kl_to_model"] < 0.01
    with pytest.raises(ConfigError, match="groups of 48"):
        run_export(source, tmp_path / "no", form, bits=4, group_size=48)


def test_scales_of_float32_models_are_rounded(tmp_path):
    dense = stock("llama", tmp_path / "x")
    source = run_quantize(dense, tmp_path / "packed", **ALIKE)
    outcome = run_export(source, tmp_path / "out", "gptq")
    assert "rescaled" in {row["stored"] for row in outcome.report.rows}
    assert outcome.report.summary["kl_to_model"] < 1e-6


def test_scales_that_float16_does_not_hold(tmp_path):
    model = calm("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-7)
    model.save_pretrained(tmp_path / "x")
    source = run_quantize(Checkpoint(tmp_path / "x"), tmp_path / "packed", **ALIKE)
    with pytest.raises(ConfigError, match="scales that float16 does not hold") as caught:
        run_export(source, tmp_path / "out", "gptq")
    assert "compressed-tensors" in caught.value.hint


def test_groups_of_sizes_that_no_kernel_has(sources, tmp_path):
    with pytest.raises(ConfigError, match="groups of 8, which `gptq` cannot hold") as caught:
        run_export(sources("eights", **ALIKE | {"group_size": 8}), tmp_path / "out", "gptq")
    assert "auto-round" in caught.value.hint


def test_codes_that_are_on_no_such_grid(tmp_path):
    """They are stored dense where others are codes, and refused where none are."""
    model = calm("llama", dtype=torch.bfloat16)
    source = save_coded(model, tmp_path / "x", [vector(), uniform(4, 32)]).coded
    outcome = run_export(source, tmp_path / "out", "gptq")
    assert {"decoded", "repacked"} <= {row["stored"] for row in outcome.report.rows}
    assert any("no form for their codes" in warning for warning in outcome.report.warnings)
    found, _ = reread(tmp_path / "out")
    assert close(said(found), said(source), 0.02)
    with pytest.raises(ConfigError, match="has codes that `auto-round` can hold"):
        other = save_coded(model, tmp_path / "y", [vector()]).coded
        run_export(other, tmp_path / "no", "auto-round")


def test_families_whose_linears_are_turned(tmp_path):
    source = stock("gpt2", tmp_path / "x")
    for form in ("gptq", "auto-round"):
        with pytest.raises(ConfigError, match="stored transposed"):
            run_export(source, tmp_path / "out", form, bits=4, group_size=32)


def test_adapters(sources, tmp_path, monkeypatch):
    base = sources("usual", **ALIKE)
    source = put_beside(base, tmp_path / "x", corrections(base), monkeypatch)
    run_export(source, tmp_path / "gptq", "gptq")
    assert (tmp_path / "gptq" / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ConfigError, match="PEFT cannot put the adapter") as caught:
        run_export(source, tmp_path / "out", "auto-round")
    assert "gptq" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be merged into its codes"):
        run_export(source, tmp_path / "out", "gptq", merge_adapter=True)


def test_restructured_models_are_those_of_the_stock_class(tmp_path):
    dense = save(calm("llama", dtype=torch.bfloat16), STRUCTURES_OF_TWO, tmp_path / "x")
    source = run_quantize(dense, tmp_path / "packed", **ALIKE)
    for form in ("gptq", "auto-round"):
        run_export(source, tmp_path / form, form)
        found, _ = reread(tmp_path / form)
        assert found.config["model_type"] == "llama"
        assert close(said(found), said(source), 0.02)


NF4 = {"kind": "nf4", "group_size": 64}


@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        ({"kind": "nf4"}, {"method": "nf4"}),
        ({"kind": "nf4", "double": True}, {"method": "nf4", "scale_bits": 8}),
        ({"kind": "int8"}, {"method": "int8"}),
        ({"kind": "fp4"}, None),
    ],
)
def test_bitsandbytes(settings, same_as, tmp_path):
    """The tensors that quantizing to it makes; loaded and run by its own kernels."""
    source = stock("qwen2", tmp_path / "x", dtype=torch.bfloat16)
    outcome = run_export(source, tmp_path / "out", "bitsandbytes", **settings)
    assert outcome.report.summary["proved"].startswith("in transformers")
    found, _ = reread(tmp_path / "out")
    model, logits = loaded_logits(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert close(logits, said(found), 0.1)
    if same_as is not None:
        other = run_quantize(source, tmp_path / "other", **same_as)
        assert found.names() == other.names()
        ours, theirs = found.load(found.names()), other.load(found.names())
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        again = run_export(other, tmp_path / "again", "bitsandbytes", **settings)
        assert {row["stored"] for row in again.report.rows} == {"repacked", "kept"}


def test_rows_of_8_bits_are_int8(sources, tmp_path):
    source = sources("rows", **ALIKE | {"bits": 8, "group_size": -1})
    outcome = run_export(source, tmp_path / "out", "bitsandbytes", kind="int8")
    assert "repacked" in {row["stored"] for row in outcome.report.rows}
    _, weights = reread(tmp_path / "out")
    for name, weight in source.load_weights(weights).items():
        assert torch.allclose(weights[name].float(), weight.float(), rtol=2**-7, atol=0)
    with pytest.raises(ConfigError, match="codes of another kind") as caught:
        run_export(source, tmp_path / "no", "bitsandbytes", kind="nf4")
    assert "--requantize" in caught.value.hint and "dense" in caught.value.hint
    again = run_export(source, tmp_path / "again", "bitsandbytes", **NF4, requantize=True)
    assert "rounded" in {row["stored"] for row in again.report.rows}


def test_blocks_that_bitsandbytes_decodes_wrongly(tmp_path):
    source = stock("llama", tmp_path / "x")
    with pytest.raises(ConfigError, match="blocks of 256 do not divide"):
        run_export(source, tmp_path / "out", "bitsandbytes", kind="nf4", group_size=256)


def test_linears_that_are_turned_in_bitsandbytes(tmp_path):
    outcome = run_export(stock("gpt2", tmp_path / "x"), tmp_path / "out", "bitsandbytes")
    assert outcome.report.summary["proved"].startswith("in transformers")


def test_linears_that_words_do_not_divide(tmp_path):
    """They stay dense, which whoever asked for codes is told."""
    source = stock("gemma3_text", tmp_path / "x", dtype=torch.bfloat16)
    outcome = run_export(source, tmp_path / "out", "gptq", bits=4, group_size=32, verify=False)
    (warning,) = (line for line in outcome.report.warnings if "stay dense" in line)
    assert warning.startswith("4 linears") and "layers.0.self_attn.k_proj" in warning
