"""The same results on a GPU as on the CPU, to rounding. Run by `pytest -m gpu`."""

import numpy as np
import pytest
import torch
from tiny_checkpoint import save_tiny

from compresso.checkpoint.reader import Checkpoint
from compresso.kernels import gptq, grid
from compresso.kernels.packing import pack_rows, unpack_rows
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    vocabulary = Checkpoint(path).config["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (16, 32))
    np.save(path.parent / "tokens.npy", tokens)
    return path


def run(model, target, stage, device, tokens=None, samples=16, **values):
    tokens = str(tokens or model.parent / "tokens.npy")
    if stage == "eval":
        values |= {"dataset": tokens, "speed": False}
    step = make_step(stage, values, where="test")
    runtime = make_runtime(RuntimeSettings(device=device, dtype="float32"))
    calibration = CalibrationSettings(dataset=tokens, samples=samples)
    return run_step(step, Checkpoint(model), calibration, target, runtime).report


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernels(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    inputs = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    gram = inputs.T @ inputs / 500
    options = {"bits": bits, "group_size": 16, "symmetric": True, "grid": "mse"}
    options |= {"scale_dtype": torch.bfloat16}
    for quantize, more in ((grid.quantize, {}), (gptq.quantize, {"damping": 0.01})):
        more = more and {**more, "act_order": True}
        on_cpu = quantize(weight, gram, **options, **more)
        on_gpu = quantize(weight.cuda(), gram.cuda(), **options, **more)
        errors = [gptq.relative_error(weight, p.decode().cpu(), gram) for p in (on_cpu, on_gpu)]
        # Rounding may tip single codes, and through feedback those after them.
        assert errors[1] == pytest.approx(errors[0], rel=0.02)
    codes = on_gpu.codes
    words = pack_rows(codes, bits)
    assert torch.equal(words.cpu(), pack_rows(codes.cpu(), bits))
    assert torch.equal(unpack_rows(words, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_and_eval(model, tmp_path, method):
    losses = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / device
        run(model, target, "quantize", device, method=method, bits=4, group_size=16)
        tokens, report = model.parent / "tokens.npy", tmp_path / f"eval-{device}"
        losses[device] = run(target, report, "eval", device, tokens, against=str(model)).rows[-1]
    assert losses["cuda"]["ppl"] == pytest.approx(losses["cpu"]["ppl"], rel=1e-3)
    assert losses["cuda"]["kl"] == pytest.approx(losses["cpu"]["kl"], rel=0.1)


def test_analyze_and_prune(model, tmp_path):
    rows = {}
    for device in ("cpu", "cuda"):
        rows[device] = run(model, tmp_path / f"a-{device}", "analyze", device).rows
        run(model, tmp_path / f"p-{device}", "prune", device, blocks=1)
    for on_cpu, on_gpu in zip(rows["cpu"], rows["cuda"], strict=True):
        assert on_gpu["influence"] == pytest.approx(on_cpu["influence"], rel=1e-3)
        assert on_gpu["angles"] == pytest.approx(on_cpu["angles"], rel=1e-3)
    pruned = [Checkpoint(tmp_path / f"p-{device}") for device in ("cpu", "cuda")]
    first, second = (source.load(source.names()) for source in pruned)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hidden_states_leave_the_device(model, tmp_path):
    small = RuntimeSettings(device="cuda", dtype="float32", max_memory="10KB")
    step = make_step("quantize", {"bits": 4, "group_size": 16}, where="test")
    tokens = CalibrationSettings(dataset=str(model.parent / "tokens.npy"), samples=16)
    run_step(step, Checkpoint(model), tokens, tmp_path / "spilled", make_runtime(small))
    run(model, tmp_path / "ram", "quantize", "cuda", bits=4, group_size=16)
    for name in sorted(path.name for path in (tmp_path / "ram").glob("*.safetensors")):
        assert (tmp_path / "ram" / name).read_bytes() == (tmp_path / "spilled" / name).read_bytes()


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("method", ["lora", "full", "norms"])
def test_healing_is_as_on_the_cpu(model, tmp_path, method, compile):
    values = {"method": method, "steps": 4, "sequences": 4, "evaluate_every": 2, "plot": False}
    rows = []
    for device in ("cpu", "cuda"):
        chosen = compile if device == "cuda" else "off"
        report = run(model, tmp_path / device, "heal", device, samples=14, compile=chosen, **values)
        rows.append(report.rows)
    for one, other in zip(*rows, strict=True):
        assert one["heldout_loss"] == pytest.approx(other["heldout_loss"], rel=1e-3)


@pytest.mark.parametrize("packing", [{"method": "rtn", "bits": 4, "group_size": 32}])
def test_training_beside_codes_is_as_beside_their_weights(model, tmp_path, packing):
    run(model, tmp_path / "packed", "quantize", "cuda", **packing)
    values = {"steps": 4, "sequences": 4, "evaluate_every": 2, "plot": False}
    rows = []
    for method in ("lora", "qlora"):
        target = tmp_path / method
        source = tmp_path / "packed"
        tokens = model.parent / "tokens.npy"
        report = run(source, target, "heal", "cuda", tokens, samples=14, method=method, **values)
        rows.append(report.rows)
    for one, other in zip(*rows, strict=True):
        assert one["heldout_loss"] == pytest.approx(other["heldout_loss"], rel=1e-3)
