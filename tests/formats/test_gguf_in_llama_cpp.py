"""GGUF exports in the real llama.cpp: the same model as in transformers."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from correcting import RUNTIME, corrections, put_beside, run_quantize
from exporting import run_export
from llama import difference, said
from restructured import STRUCTURES, reference, save
from tiny_models import BLOCKS, build, tokens
from transformers import AutoModelForCausalLM

from compresso.calibration.replay import fingerprint_of, replay
from compresso.checkpoint.proof import Fingerprint, compare
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError
from compresso.formats.gguf import CODES_TOLERANCE
from compresso.formats.gguf_quantizer import quantize_file
from compresso.models.structure import Structure
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtimes import llama_cpp
from compresso.settings import CalibrationSettings

pytestmark = pytest.mark.runtimes

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
HALVED = ("llama", "qwen2", "qwen3", "gemma2")
LONG, SHORT = tokens(1, 24), tokens(1, 8)
WINDOWED = ("gemma2", "gemma3_text", "llama")
# Wide enough for types whose blocks have 256 weights.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn of another scale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
}


def exported(model, path, **settings):
    """Save a model and export it; the directory of the file."""
    model.save_pretrained(path / "source")
    run_export(Checkpoint(path / "source"), path / "out", "gguf", verify=False, **settings)
    return path / "out"


def calm(family="llama", **changes):
    """A wide model whose weights are as large as those of trained ones."""
    return quiet(build(family, **WIDE, **changes))


@torch.no_grad()
def quiet(model):
    """The model with smaller weights, in which rounding errors do not grow."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.35)
    return model


@pytest.mark.parametrize("family", KNOWN)
def test_every_family_is_the_same_model(family, tmp_path):
    model = build(family)
    out = exported(model, tmp_path)
    probe = LONG if family in WINDOWED else SHORT
    assert difference(out, model, probe) < 1e-3
    one_by_one = said(out, probe, at_once=False)
    assert torch.allclose(one_by_one, said(out, probe), atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_windows_that_llama_cpp_lacks_end_the_context(family, tmp_path):
    outcome_path = exported(build(family), tmp_path)
    (file,) = outcome_path.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{arch}.context_length"].contents() == 8
    record = json.loads((outcome_path / "compresso.json").read_text())
    assert "no sliding windows" in record["report"]["warnings"][0]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_proof_ends_where_the_context_does(family, tmp_path):
    """After that, llama.cpp's is another model, as its user was warned."""
    build(family).save_pretrained(tmp_path / "source")
    run_export(Checkpoint(tmp_path / "source"), tmp_path / "out", "gguf")
    record = json.loads((tmp_path / "out" / "compresso.json").read_text())
    assert len(record["fingerprint"]["tokens"]) == 8
    assert record["proof"]["difference"] < 1e-3


@pytest.mark.parametrize("keep", [[0, 1, 3], [1, 2, 5]])
def test_windows_stay_with_their_blocks_where_others_were_dropped(keep, tmp_path):
    model = build("gemma3_text")
    model.model.layers = torch.nn.ModuleList([model.model.layers[block] for block in keep])
    for place, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = place
    config = model.config
    config.layer_types = [config.layer_types[block] for block in keep]
    config.num_hidden_layers = len(keep)
    assert difference(exported(model, tmp_path), model, LONG) < 1e-3


@pytest.mark.parametrize("family", HALVED)
@pytest.mark.parametrize("structure", ["first attention", "last mlp", "both kinds", "everything"])
def test_restructured_models(family, structure, tmp_path):
    source = save(build(family), STRUCTURES[structure], tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    model = reference(family, STRUCTURES[structure])
    probe = LONG if family in WINDOWED else SHORT
    assert difference(tmp_path / "out", model, probe) < 1e-3


def test_blocks_that_lack_both_halves_are_dropped(tmp_path):
    lacking = Structure(no_attention=(0, 2), no_mlp=(0, 2))
    source = save(build("llama"), lacking, tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == BLOCKS - 2
    assert difference(tmp_path / "out", reference("llama", lacking), LONG) < 1e-3


@pytest.mark.parametrize("name", list(ROPES))
def test_rotations_that_are_scaled(name, tmp_path):
    rope = {"rope_theta": 500.0, **ROPES[name]}
    model = build("llama", rope_parameters=rope)
    assert difference(exported(model, tmp_path), model, tokens(1, 60)) < 1e-3


def test_queries_of_gemma_have_the_scale_of_the_model(tmp_path):
    for family in ("gemma2", "gemma3_text"):
        model = build(family, query_pre_attn_scalar=7)
        assert difference(exported(model, tmp_path / family), model, LONG) < 1e-3


def test_heads_of_another_size_in_qwen2(tmp_path):
    model = build("qwen2", head_dim=24)
    assert difference(exported(model, tmp_path), model, SHORT) < 1e-3


PACKED = {
    "2 bits in 256": ({"bits": 2, "group_size": 256}, "tq2_0"),
    "2 bits, any zeros": ({"bits": 2, "group_size": 256, "symmetric": False}, "q2_k"),
    "2 bits in 64": ({"bits": 2, "group_size": 64}, "q4_0"),
    "3 bits in 256": ({"bits": 3, "group_size": 256}, "q3_k"),
    "3 bits, any zeros": ({"bits": 3, "group_size": 32, "symmetric": False}, "q4_0"),
    "4 bits": ({"bits": 4, "group_size": 64}, "q4_0"),
    "4 bits, any zeros": ({"bits": 4, "group_size": 256, "symmetric": False}, "q4_k"),
    "4 bits in 32, any zeros": ({"bits": 4, "group_size": 32, "symmetric": False}, "q5_0"),
    "8 bits": ({"bits": 8, "group_size": 128}, "q8_0"),
    "hqq": ({"method": "hqq", "bits": 4, "group_size": 64}, "q4_1"),
}


@pytest.mark.parametrize("name", list(PACKED))
def test_codes_are_the_same_codes(name, tmp_path):
    settings, kind = PACKED[name]
    calm().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    packed = run_quantize(
        Checkpoint(tmp_path / "source"), tmp_path / "packed", **{"method": "rtn", **settings}
    )
    outcome = run_export(packed, tmp_path / "out", "gguf", verify=False)
    rows = {row["stored"]: row for row in outcome.report.rows if row["as"] == kind}
    assert rows["repacked"]["tensors"] == 14
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, trust_remote_code=True
    )
    assert difference(tmp_path / "out", model, LONG) < 0.05


def test_codes_of_a_shared_and_halved_model(tmp_path):
    """Everything at once: structure, shared linears, and codes in blocks that are permuted."""
    structure = Structure(no_attention=(1,), no_mlp=(2,), shared=(0, 1, 0, 3, 3, 3))
    model = quiet(build("llama")).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    source = save(model, structure, tmp_path / "source")
    packed = run_quantize(source, tmp_path / "packed", method="rtn", bits=8, group_size=32)
    outcome = run_export(packed, tmp_path / "out", "gguf", verify=False)
    rows = {row["stored"]: row["tensors"] for row in outcome.report.rows if row["as"] == "q8_0"}
    assert rows == {"repacked": 7 * BLOCKS - 4 - 3}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, trust_remote_code=True
    )
    assert difference(tmp_path / "out", model, LONG) < 0.02


ROUNDED = ("q8_0", "q4_1", "q4_k_m", "q3_k_m", "q2_k", "tq2_0", "iq4_xs", "iq2_xxs")


def decoded(path):
    """The weights that a file holds, by name in it."""
    (file,) = path.glob("*.gguf")
    return {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(file).tensors
    }


def export_with_text(source, target, *, verify=True, **settings):
    """The outcome of an export that may read text: the same tokens every time."""
    text = source.path.parent / "tokens.npy"
    np.save(text, tokens(1, 512)[0].numpy())
    step = make_step("export", {"format": "gguf", **settings}, where="test")
    calibration = CalibrationSettings(dataset=str(text), samples=8, length=32)
    return run_step(step, source, calibration, target, replace(RUNTIME, verify=verify))


@pytest.mark.parametrize("kind", ROUNDED)
def test_types_of_llama_cpp_hold_what_they_decode_to(kind, tmp_path):
    """The fingerprint is of the weights that the file decodes to, not of the source's."""
    calm("gemma2", head_dim=64).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    outcome = export_with_text(Checkpoint(tmp_path / "source"), out, type=kind, verify=False)
    assert outcome.report.summary["weights_rounded_anew"] > 0
    record = json.loads((out / "compresso.json").read_text())
    fingerprint = Fingerprint.from_json(record["fingerprint"])
    compare(out, said(out, fingerprint.tokens), fingerprint, CODES_TOLERANCE)


def test_a_proof_in_a_process_of_its_own(tmp_path):
    calm("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    outcome = export_with_text(Checkpoint(tmp_path / "source"), out, type="iq3_xxs")
    assert outcome.report.summary["proved"] == f"in llama.cpp {llama_cpp.version()}"
    proof = json.loads((out / "compresso.json").read_text())["proof"]
    assert proof["generated"] == 16


def test_columns_that_count_more_are_rounded_better(tmp_path):
    out = exported(calm(), tmp_path)
    name = "blk.0.ffn_up.weight"
    weight = decoded(out)[name]
    squares = torch.ones(weight.shape[1])
    squares[::5] = 100.0
    errors = []
    for importance in ({}, {name: squares}):
        target = tmp_path / f"{len(importance)}"
        target.mkdir()
        quantize_file(
            out / "model.gguf",
            target / "model.gguf",
            "q2_k",
            kept={},
            outer=None,
            importance=importance,
        )
        change = decoded(target)[name] - weight
        errors.append(float((change.square() * squares).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_what_the_quantizer_refuses_is_an_error(tmp_path):
    out = exported(calm(), tmp_path)
    with pytest.raises(GateError, match=r"cannot quantize .*importance matrix"):
        quantize_file(out / "model.gguf", out / "x", "iq2_xxs", kept={}, outer=None, importance={})


def test_types_that_are_named_for_head_and_embedding(tmp_path):
    model = calm()
    out = exported(model, tmp_path, type="q4_0", outer="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model-q4_0.gguf").tensors}
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_what_has_the_type_already_is_not_rounded_again(tmp_path):
    calm().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    packed = run_quantize(
        Checkpoint(tmp_path / "source"), tmp_path / "packed", method="rtn", bits=4, group_size=32
    )
    outcome = run_export(packed, tmp_path / "out", "gguf", type="q4_0", verify=False)
    rows = {(row["stored"], row["as"]): row["tensors"] for row in outcome.report.rows}
    assert rows[("repacked", "q4_0")] == 14
    auto = run_export(packed, tmp_path / "auto", "gguf", verify=False)
    assert auto.report.summary["weights_rounded_anew"] == 0
    both = [decoded(path) for path in (tmp_path / "out", tmp_path / "auto")]
    for name in both[0]:
        if name.startswith("blk."):
            assert torch.equal(both[0][name], both[1][name]), name


def test_a_bad_file_ends_its_own_process_alone(tmp_path):
    """And is an error with what llama.cpp says of it."""
    bad = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(bad, "deci")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GateError, match="does not load in"):
        llama_cpp.logits(bad, SHORT)


@pytest.mark.parametrize(("packed", "limit"), [(False, 1e-3), (True, CODES_TOLERANCE)])
def test_corrections_lie_in_a_file_beside_the_model(packed, limit, tmp_path, monkeypatch):
    """As llama.cpp takes them, with `--lora`; those of queries in the order of its rows."""
    calm().to(torch.bfloat16 if packed else torch.float32).save_pretrained(tmp_path / "source")
    base = Checkpoint(tmp_path / "source")
    if packed:
        base = run_quantize(base, tmp_path / "packed", method="rtn", bits=4, group_size=32)
    factors = corrections(base, leave_out="v_proj")
    corrected = put_beside(base, tmp_path / "corrected", factors, monkeypatch)
    outcome = run_export(corrected, tmp_path / "out", "gguf", verify=False)
    rows = {row["stored"]: row["tensors"] for row in outcome.report.rows}
    assert rows.get("repacked", 0) == 14 * packed
    assert outcome.report.summary["kl_to_model"] < 1e-3
    fingerprint = fingerprint_of(corrected, RUNTIME)
    found = said(tmp_path / "out", fingerprint.tokens)
    compare(tmp_path / "out", found, fingerprint, limit)


def test_corrections_that_are_merged_become_part_of_the_weights(tmp_path, monkeypatch):
    calm().save_pretrained(tmp_path / "source")
    source = Checkpoint(tmp_path / "source")
    corrected = put_beside(source, tmp_path / "corrected", corrections(source), monkeypatch)
    run_export(corrected, tmp_path / "out", "gguf", verify=False, merge_adapter=True)
    assert not (tmp_path / "out" / "lora.gguf").exists()
    expected = replay(
        corrected, LONG, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )
    assert (said(tmp_path / "out", LONG) - expected).abs().max() < 1e-3 * expected.abs().max()
