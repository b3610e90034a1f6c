"""GGUF files as the `gguf` package reads them, and models that are refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from correcting import RUNTIME, run_quantize
from exporting import close, run_export
from restructured import STRUCTURES, reference, save
from tiny_models import BLOCKS, build, tokens

from compresso import registry
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, NumericalError, ResourceError
from compresso.formats import gguf as gguf_format
from compresso.formats.gguf_families import ZERO_WIDTH, Piece
from compresso.formats.gguf_file import GgufFile
from compresso.formats.gguf_tensors import Encoded, change, change_back
from compresso.formats.gguf_types import gguf_package
from compresso.models.structure import Structure
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtimes import llama_cpp
from compresso.settings import CalibrationSettings

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def stock(path, family="llama", **changes):
    build(family, **changes).save_pretrained(path)
    return Checkpoint(path)


def fingerprint_of(path):
    """What the file's weights say, which the export's proof goes by."""
    return Fingerprint.from_json(json.loads((path / "compresso.json").read_text())["fingerprint"])


def read(path):
    (file,) = path.glob("model*.gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("family", KNOWN)
def test_a_file_reads_back_as_the_model(family, tmp_path):
    run_export(stock(tmp_path / "source", family), tmp_path / "out", "gguf", verify=False)
    found = fingerprint_of(tmp_path / "out")
    with torch.no_grad():
        expected = build(family)(input_ids=found.tokens).logits
    recorded = found.logits != -torch.inf
    assert close(found.logits[recorded], expected[recorded], 1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_restructured_model_reads_back(family, tmp_path):
    structure = STRUCTURES["everything"]
    source = save(build(family), structure, tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    found = fingerprint_of(tmp_path / "out")
    with torch.no_grad():
        expected = reference(family, structure)(input_ids=found.tokens).logits
    recorded = found.logits != -torch.inf
    assert close(found.logits[recorded], expected[recorded], 1e-3)


def test_what_llama_cpp_needs_of_blocks_without_a_half(tmp_path):
    """No block without attention first, none without an MLP, and none without either."""
    lacking = Structure(no_attention=(0, 2, 4), no_mlp=(3, 4))
    source = save(build("llama"), lacking, tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    fields, tensors = read(tmp_path / "out")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.block_count"] == BLOCKS - 1
    assert fields["deci.attention.head_count"] == [1, 4, 0, 4, 4]
    assert fields["deci.attention.head_count_kv"] == [1, 2, 0, 2, 2]
    assert fields["deci.feed_forward_length"] == [96, 96, 96, ZERO_WIDTH, 96]
    assert "blk.2.attn_q.weight" not in tensors
    for name in ("blk.0.attn_output.weight", "blk.3.ffn_down.weight"):
        assert not tensors[name].data.any()


def test_zeros_take_little_room_where_llama_cpp_cannot_leave_them_out(tmp_path):
    model = build("qwen3", **WIDE, head_dim=64)
    source = save(model, Structure(no_mlp=(1,)), tmp_path / "source")
    outcome = run_export(source, tmp_path / "out", "gguf", verify=False)
    rows = {(row["stored"], row["as"]): row for row in outcome.report.rows}
    assert rows[("zeros", "tq2_0")]["tensors"] == 3
    assert "zeros stand in" in outcome.report.warnings[0]


def test_changes_of_tensors_can_be_undone():
    weight = torch.randn(24, 5)
    piece = Piece("x", "x", (24, 5), heads=3, shift=1.0, factor=0.25)
    assert torch.allclose(change_back(change(weight, piece), piece), weight, atol=1e-6)
    assert not torch.equal(change(weight, piece), weight)


def test_dense_types(tmp_path):
    source = stock(tmp_path / "source")
    for kind in ("f16", "bf16", "f32"):
        run_export(source, tmp_path / kind, "gguf", type=kind, verify=False)
        _, tensors = read(tmp_path / kind)
        assert tensors["blk.0.ffn_up.weight"].tensor_type.name.lower() == kind
        assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"


def test_the_smallest_type_that_rounds_nothing(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(torch.ones(96, 64) / 4)
        model.model.layers[0].mlp.down_proj.weight.copy_(torch.full((64, 96), 2.0**-60))
    model.save_pretrained(tmp_path / "source")
    run_export(Checkpoint(tmp_path / "source"), tmp_path / "out", "gguf", verify=False)
    _, tensors = read(tmp_path / "out")
    kinds = [
        tensors[f"blk.0.ffn_{part}.weight"].tensor_type.name for part in ("up", "down", "gate")
    ]
    assert kinds == ["F16", "BF16", "F32"]


REFUSED = {
    "another architecture": ("gpt2", {}, "does not know the architecture `gpt2`"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "not `gelu`"),
    "a head of its own": ("gemma2", {"tie_word_embeddings": False}, "no place for a head"),
    "no caps": ("gemma2", {"final_logit_softcapping": None}, "always caps"),
    "caps": ("gemma3_text", {"attn_logit_softcapping": 20.0}, "never caps"),
    "a bias": ("qwen3", {"attention_bias": True}, "no place for `.*o_proj.bias`"),
    "a rotation of windows": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            }
        },
        "in blocks with a window",
    ),
    "a rotation of half a head": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "rotates whole heads",
    ),
    "a rotation of other speeds": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "beta_slow": 2,
                "original_max_position_embeddings": 16,
            }
        },
        "takes `beta_slow` of `rope_type` `yarn` to be 1 in `llama`, but it is 2",
    ),
    "a rotation of blocks without a window": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        "as `rope_type` `yarn` does in `gemma3`",
    ),
    "a rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "`dynamic`",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_llama_cpp_cannot_run_are_refused(name, tmp_path):
    family, changes, message = REFUSED[name]
    source = stock(tmp_path / "source", family, **changes)
    with pytest.raises(ConfigError, match=message):
        run_export(source, tmp_path / "out", "gguf", verify=False)


def test_numbers_too_large_for_float16_are_refused(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(NumericalError, match="float16 cannot hold"):
        run_export(Checkpoint(tmp_path / "source"), tmp_path / "out", "gguf", type="f16")


def test_a_full_disk_is_an_error_with_a_hint(tmp_path):
    tensor = Encoded("x", "f32", (2,), np.zeros(2, dtype=np.float32), "kept")
    with GgufFile(tmp_path / "x.gguf", "llama") as file:
        file._scratch.close()
        file._scratch = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        with pytest.raises(ResourceError, match="No space left") as refused:
            file.add(tensor)
        assert "make room" in refused.value.hint


def test_the_package_gguf_is_named_if_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ResourceError, match="needs the package `gguf`"):
        gguf_package()


def test_codes_that_no_type_has_become_dense_and_the_user_is_told(tmp_path):
    source = run_quantize(
        stock(tmp_path / "source"), tmp_path / "packed", method="rtn", bits=4, group_size=16
    )
    outcome = run_export(source, tmp_path / "out", "gguf", verify=False)
    told = " ".join(outcome.report.warnings)
    assert f"{7 * BLOCKS} linears are stored dense" in told


def test_types_that_round_need_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "package `x`: pip install y")
    with pytest.raises(ResourceError, match="`q4_k_m` needs package `x`") as refused:
        run_export(stock(tmp_path / "source"), tmp_path / "out", "gguf", type="q4_k_m")
    assert refused.value.hint == "pip install y"


def test_without_llama_cpp_the_user_is_told_that_nothing_was_proved(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "package `x`: pip install y")
    outcome = run_export(stock(tmp_path / "source"), tmp_path / "out", "gguf")
    assert any("not proved" in warning for warning in outcome.report.warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "f16", "importance": True}, "rounds no codes"),
        ({"type": "iq2_xxs", "importance": False}, "does not make `iq2_xxs`"),
    ],
)
def test_importance_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_step("export", {"format": "gguf", **settings}, where="test")


def test_text_is_read_only_for_importance():
    for settings, reads in (({}, False), ({"type": "q4_0"}, False), ({"type": "iq4_xs"}, True)):
        step = make_step("export", {"format": "gguf", **settings}, where="test")
        assert registry.reads_text("export", "gguf", step.settings) is reads


@torch.no_grad()
def test_importance_is_the_mean_square_of_what_linears_read(tmp_path, monkeypatch):
    """Of shared linears and with a dropped block, by the names that they have in the file."""
    structure = Structure(no_attention=(0, 2), no_mlp=(2,))
    source = save(build("llama"), structure, tmp_path / "source")
    text = tmp_path / "tokens.npy"
    ids = tokens(1, 64)
    np.save(text, ids[0].numpy())
    given = {}

    def catch(dense, target, kind, *, kept, outer, importance):
        given.update(importance)
        dense.with_suffix(".copy").write_bytes(dense.read_bytes())
        dense.with_suffix(".copy").replace(target)

    monkeypatch.setattr(gguf_format, "quantize_file", catch)
    step = make_step("export", {"format": "gguf", "type": "iq4_xs"}, where="test")
    calibration = CalibrationSettings(dataset=str(text), samples=2, length=32)
    run_step(step, source, calibration, tmp_path / "out", replace(RUNTIME, verify=False))

    model, seen = reference("llama", structure), {}
    watched = {
        "blk.2.attn_v.weight": (3, "self_attn.v_proj"),
        "blk.4.ffn_down.weight": (5, "mlp.down_proj"),
    }
    for name, (block, path) in watched.items():
        module = model.model.layers[block].get_submodule(path)
        module.register_forward_hook(lambda _, inputs, __, n=name: seen.update({n: inputs[0]}))
    model(input_ids=ids.view(2, 32))
    for name, inputs in seen.items():
        expected = inputs.flatten(0, 1).square().mean(0)
        assert close(given[name], expected, 1e-4)
    _, tensors = read(tmp_path / "out")
    matrices = {name for name, t in tensors.items() if len(t.shape) == 2 and name[:4] == "blk."}
    assert set(given) == matrices


def test_nothing_that_was_used_on_the_way_stays(tmp_path):
    run_export(stock(tmp_path / "source"), tmp_path / "out", "gguf", verify=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"README.md"} == {"compresso-report.csv", "compresso.json", "model.gguf"}


def test_codes_of_a_float32_model_stay_codes(tmp_path):
    """Its scales are float32, but codes that are stored dense would make the file larger."""
    packed = run_quantize(
        stock(tmp_path / "source", **WIDE),
        tmp_path / "packed",
        **{"method": "rtn", "bits": 4, "for": "llama.cpp"},
    )
    outcome = run_export(packed, tmp_path / "out", "gguf", verify=False)
    rows = {(row["stored"], row["as"]): row["tensors"] for row in outcome.report.rows}
    assert rows["rescaled", "q4_0"] == 14
    assert any("rounded to float16" in message for message in outcome.report.warnings)
    assert outcome.report.summary["kl_to_model"] < 1e-4
