"""The quantize stage on tiny models: what it writes, that it loads, and what it refuses."""

import functools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from compresso.checkpoint.reader import Checkpoint
from compresso.config import build
from compresso.errors import ConfigError, NumericalError
from compresso.kernels import gptq
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save(config, path, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # random logits are nearly flat: spread them
    model.save_pretrained(path)
    tokens = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(1))
    np.save(path / "tokens.npy", tokens.numpy())
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    return save(config, tmp_path_factory.mktemp("llama"))


def run(source, target, runtime=None, **values):
    step = make_step("quantize", values, where="test")
    calibration = build(
        CalibrationSettings,
        {"dataset": str(source / "tokens.npy"), "samples": 16, "batch_size": 4},
        where="test",
    )
    runtime = runtime or make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
    return run_step(step, Checkpoint(source), calibration, target, runtime)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_output_is_what_was_decoded(llama, tmp_path, method, bits, symmetric):
    out = tmp_path / "out"
    run(llama, out, method=method, bits=bits, symmetric=symmetric, group_size=16)
    dense = load(llama)
    written = Checkpoint(out)
    decoded = written.load_weights(written.weight_names())
    dense.load_state_dict(decoded, strict=True)
    with torch.no_grad():
        assert torch.equal(load(out)(IDS).logits, dense(IDS).logits)
    original = Checkpoint(llama)
    changed = {
        name
        for name, weight in original.load_weights(original.weight_names()).items()
        if not torch.equal(weight, decoded[name])
    }
    assert changed and all("_proj" in name for name in changed)
    assert written.stored_bytes < 0.8 * original.stored_bytes


def test_gptq_is_nearer_the_original_than_rtn(llama, tmp_path):
    tokens = torch.from_numpy(np.load(llama / "tokens.npy"))
    with torch.no_grad():
        want = load(llama)(tokens).logits
        errors = {}
        for method in ("rtn", "gptq"):
            run(llama, tmp_path / method, method=method, bits=3, group_size=16)
            errors[method] = (load(tmp_path / method)(tokens).logits - want).square().mean()
    # The inputs of a random model are nearly white: there is little for GPTQ to gain.
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_rows_report_every_linear(llama, tmp_path):
    run(llama, tmp_path / "out", bits=3, group_size=16)
    record = json.loads((tmp_path / "out" / "compresso.json").read_text())
    rows = record["report"]["rows"]
    assert len(rows) == 21
    assert all(row["bits"] == 3 and 0 < row["output_error"] < row["weight_error"] for row in rows)
    assert all(row["damping"] == 0.01 and row["seconds"] > 0 for row in rows)
    header, *lines = (tmp_path / "out" / "compresso-report.csv").read_text().splitlines()
    assert {"linear", "bits", "output_error", "damping", "seconds"} <= set(header.split(","))
    assert len(lines) == 21


def test_linears_of_a_group_share_one_sweep(llama, tmp_path, monkeypatch):
    calls = []
    real = gptq.quantize

    @functools.wraps(real)  # which says what options it takes
    def recording(weight, *arguments, **options):
        calls.append(tuple(weight.shape))
        return real(weight, *arguments, **options)

    monkeypatch.setattr(gptq, "quantize", recording)
    run(llama, tmp_path / "out", bits=4, group_size=16)
    assert calls == [(64, 32), (32, 32), (128, 32), (32, 64)] * 3


def test_ignored_linears_stay_bit_identical(llama, tmp_path):
    out = tmp_path / "out"
    run(llama, out, bits=2, group_size=16, ignore=["re:.*layers\\.1\\..*", "down_proj"])
    written, original = Checkpoint(out), Checkpoint(llama)
    same = [name for name in written.names() if name.endswith("_proj.weight")]
    assert len(same) == 9
    kept = original.load(same)
    assert all(torch.equal(kept[name], value) for name, value in written.load(same).items())
    with torch.no_grad():
        load(out)(IDS)


def test_head_is_quantized_when_asked(llama, tmp_path):
    out = tmp_path / "out"
    run(llama, out, bits=8, group_size=16, lm_head=True)
    assert "lm_head.weight_packed" in Checkpoint(out).names()
    with torch.no_grad():
        error = (load(out)(IDS).logits - load(llama)(IDS).logits).abs().max()
    assert 0 < error < 0.2


def test_unpacked_weights_equal_the_packed_ones(llama, tmp_path):
    run(llama, tmp_path / "packed", bits=3, group_size=16)
    run(llama, tmp_path / "dense", bits=3, group_size=16, pack=False)
    packed, dense = Checkpoint(tmp_path / "packed"), Checkpoint(tmp_path / "dense")
    want = packed.load_weights(packed.weight_names())
    got = dense.load(dense.names())
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in got)
    assert "quantization_config" not in dense.config


def test_tied_embeddings_stay_tied(tmp_path):
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    source = save(config, tmp_path / "model", torch.bfloat16)
    run(source, tmp_path / "out", bits=4, group_size=16)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with pytest.raises(ConfigError, match="shares its weights with the embedding"):
        run(source, tmp_path / "head", bits=4, group_size=16, lm_head=True)


def test_transposed_linears_are_rounded_but_not_packed(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    source = save(config, tmp_path / "model")
    with pytest.raises(ConfigError, match="stored transposed") as caught:
        run(source, tmp_path / "packed", bits=4, group_size=16)
    assert "--no-pack" in caught.value.hint
    run(source, tmp_path / "out", bits=4, group_size=16, pack=False)
    with torch.no_grad():
        want, got = load(source)(IDS).logits, load(tmp_path / "out")(IDS).logits
    assert 0 < (got - want).abs().max() < 0.5 * want.abs().max()
    weight = Checkpoint(tmp_path / "out").load(["transformer.h.0.attn.c_attn.weight"])
    levels = weight["transformer.h.0.attn.c_attn.weight"][:16, 0].unique()
    assert len(levels) <= 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 24}, r"has 32 columns, which do not divide into groups of 24"),
        ({"group_size": 16, "ignore": ["re:.*qproj"]}, r"pattern `re:.\*qproj` matches no linear"),
        ({"group_size": 16, "ignore": ["re:.*"]}, "leaves no linear to quantize"),
    ],
)
def test_refused_before_any_work(llama, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        run(llama, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_damping_is_raised_and_recorded(llama, tmp_path, monkeypatch):
    real = gptq.quantize

    @functools.wraps(real)
    def fussy(weight, gram, *, damping, **options):
        if damping < 0.5:
            raise NumericalError("gram is not positive definite")
        return real(weight, gram, damping=damping, **options)

    monkeypatch.setattr(gptq, "quantize", fussy)
    run(llama, tmp_path / "out", bits=4, group_size=16)
    record = json.loads((tmp_path / "out" / "compresso.json").read_text())
    assert {row["damping"] for row in record["report"]["rows"]} == {1.0}

    @functools.wraps(real)
    def never_content(*arguments, **options):
        return fussy(*arguments, **{**options, "damping": 0.0})

    monkeypatch.setattr(gptq, "quantize", never_content)
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj"):
        run(llama, tmp_path / "never", bits=4, group_size=16)
    assert not (tmp_path / "never").exists()


def test_spilled_hidden_states_change_nothing(llama, tmp_path):
    small = make_runtime(RuntimeSettings(dtype="float32", device="cpu", max_memory="20KB"))
    run(llama, tmp_path / "ram", bits=3, group_size=16)
    run(llama, tmp_path / "disk", bits=3, group_size=16, runtime=small)
    for name in sorted(path.name for path in (tmp_path / "ram").glob("*.safetensors")):
        assert (tmp_path / "ram" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    assert {path.name for path in (tmp_path / "ram").iterdir()} == {
        path.name for path in (tmp_path / "disk").iterdir()
    }


def test_rtn_needs_no_data(llama, tmp_path):
    step = make_step("quantize", {"method": "rtn", "group_size": 16}, where="test")
    runtime = make_runtime(RuntimeSettings(device="cpu"))
    nowhere = build(CalibrationSettings, {"dataset": "no/such-set"}, where="test")
    run_step(step, Checkpoint(llama), nowhere, tmp_path / "out", runtime)
    assert (tmp_path / "out" / "config.json").exists()
