"""Checkpoints with an adapter: written, proved, read by every stage, loaded by plain PEFT."""

import importlib.util

import peft
import pytest
import torch
from coding import affine, save_coded, vector
from correcting import (
    CPU,
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
    sums,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from restructured import STRUCTURES, save
from tiny_checkpoint import save_tiny
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compresso import run
from compresso.checkpoint.merged import merged
from compresso.checkpoint.proof import Fingerprint, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, GateError
from compresso.models.coded_linear import CodedLinear
from compresso.provenance import read_record
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtimes import transformers as engine
from compresso.settings import CalibrationSettings
from compresso.stages.inspect import inspect_checkpoint, print_inspection

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
    warned = any("after the loaded model has run once" in w for w in record["report"]["warnings"])
    assert warned == (base == "packed mixed")
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
    model = load(written)
    assert (logits(model) - expected).abs().max() < limit
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > limit


def load(written, **options):
    """As users do; mixed codes become weights with the first forward, and PEFT asks for these."""
    base = AutoModelForCausalLM.from_pretrained(written.path, dtype="auto", **options)
    if len(written.config.get("quantization_config", {}).get("config_groups", [])) > 1:
        with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
            PeftModel.from_pretrained(base, written.path / "adapter")
        base(PROBE)
    return PeftModel.from_pretrained(base, written.path / "adapter")


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """A dense checkpoint with an adapter."""
    source = stock("llama", tmp_path / "dense")
    return put_beside(source, tmp_path / "corrected", corrections(source), monkeypatch)


@pytest.fixture
def coded(tmp_path, monkeypatch):
    """A coded checkpoint with an adapter."""
    source = save_coded(build("llama"), tmp_path, [vector(), affine()], head=True).coded
    return put_beside(source, tmp_path / "corrected", corrections(source), monkeypatch)


def test_the_adapter_alone_finds_its_base(coded):
    """At the place where it was published."""
    alone = AutoPeftModelForCausalLM.from_pretrained(coded.path / "adapter")
    assert torch.equal(logits(alone), logits(load(coded)))


# ---------------------------------------------------------------- the proof


@pytest.mark.parametrize("reader", ["peft", "compresso"])
def test_other_corrections_than_in_memory(reader, tmp_path, monkeypatch):
    source = stock("llama", tmp_path / "dense")
    if reader == "compresso":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    put_adapter = run.put_adapter

    def forget_one(written, report, *rest):
        del report.adapter[next(iter(report.adapter))]
        return put_adapter(written, report, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "put_adapter", forget_one)
        with pytest.raises(GateError, match="is not the model it was in memory"):
            put_beside(source, tmp_path / "out", corrections(source), monkeypatch)
    assert not (tmp_path / "out").exists()
    written = put_beside(source, tmp_path / "out", corrections(source), monkeypatch)
    proof = read_record(written.path)["proof"]
    assert proof["adapter"] == reader and (proof["generated"] is None) == (reader == "compresso")


def test_a_model_that_is_too_large_is_proved_without_peft(tmp_path, monkeypatch):
    small = RUNTIME.__class__(CPU, torch.float32, 10**5, trust_remote_code=False)
    monkeypatch.setattr("correcting.RUNTIME", small)
    source = stock("llama", tmp_path / "dense")
    written = put_beside(source, tmp_path / "out", corrections(source), monkeypatch)
    assert read_record(written.path)["proof"]["adapter"] == "compresso"


def test_peft_takes_in_other_factors(dense, monkeypatch):
    saved = peft.get_peft_model_state_dict

    def changed(model, **options):
        found = saved(model, **options)
        return found | {min(found): found[min(found)] + 1}

    fingerprint = Fingerprint(PROBE, logits(load(dense)))
    prove(dense.path, fingerprint, dtype=torch.float32)
    monkeypatch.setattr(peft, "get_peft_model_state_dict", changed)
    with pytest.raises(GateError, match=r"adapter` does not load as it is: PEFT has another `base"):
        prove(dense.path, fingerprint, dtype=torch.float32)


# ---------------------------------------------------------------- PEFT and codes


@pytest.mark.parametrize("safe_merge", [False, True])
def test_codes_refuse_to_be_merged(coded, safe_merge):
    """And the model goes on as before."""
    model = load(coded)
    before = logits(model)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(RuntimeError, match="stored as codes: an adapter stays beside it"):
            merge(safe_merge=safe_merge)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in stored.items())
    plain = model.unload()
    assert torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(coded.path)))


def test_a_dense_base_can_be_merged(dense, tmp_path):
    load(dense).merge_and_unload().save_pretrained(tmp_path / "merged")
    expected, found = merged(dense), Checkpoint(tmp_path / "merged")
    weights = found.load(found.names())
    for name, tensor in expected.load(expected.names()).items():
        torch.testing.assert_close(weights[name], tensor)


def test_new_adapters_are_trained_on_codes(tmp_path):
    """With every linear found by PEFT itself, and the same gradients as over dense weights."""
    pair = save_coded(build("llama"), tmp_path, [vector(), affine()])
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    gradients = []
    for source in (pair.coded, pair.dense):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(source.path), config).train()
        model(PROBE, labels=PROBE).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found, expected = gradients
    assert set(found) == set(expected) and len(found) == 2 * 7 * 6
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_the_weight_of_codes_can_be_read_and_not_written(coded):
    model = AutoModelForCausalLM.from_pretrained(coded.path)
    linear = next(m for m in model.modules() if isinstance(m, CodedLinear))
    weight, before = linear.weight, linear.weight.clone()
    assert isinstance(linear, torch.nn.Linear) and "weight" not in dict(linear.named_parameters())
    assert type(weight + 1) is type(weight @ torch.ones(weight.shape[1])) is torch.Tensor
    assert type(before) is type(torch.zeros_like(before).add_(weight)) is torch.Tensor
    changes = [
        lambda: weight.add_(1),
        lambda: weight.data.add_(1),
        lambda: weight.detach().zero_(),
        lambda: weight.__setitem__(0, 1),
        lambda: setattr(weight, "data", before),
        lambda: torch.add(weight, 1, out=weight),
        lambda: torch.nn.init.normal_(weight),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="the weight of a CodedLinear cannot be changed"):
            change()
    with pytest.raises(KeyError, match="'weight' already exists"):
        linear.weight = torch.nn.Parameter(before)
    assert torch.equal(linear.weight, before)


def test_codes_are_not_quantized_again(coded):
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="are codes: they cannot be quantized again"):
        AutoModelForCausalLM.from_pretrained(coded.path, quantization_config=config)


# ---------------------------------------------------------------- the other stages


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "bits": 4, "group_size": 32, "ignore": ["re:.*up_proj"]},
        {"method": "rtn", "bits": 4, "group_size": 32, "lm_head": True},
        {"method": "hqq", "bits": 3, "group_size": 32, "rotate": True},
    ],
    ids=["some dense", "head", "rotated"],
)
def test_the_sum_is_quantized(settings, tmp_path, monkeypatch):
    """As if it had been merged before: to the bit, and what stays dense is the sum as well."""
    source = stock("llama", tmp_path / "dense", dtype=torch.bfloat16)
    both = put_beside(source, tmp_path / "both", corrections(source), monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    view = merged(both)
    model.load_state_dict(view.load(view.names()))
    model.save_pretrained(tmp_path / "merged")
    outputs = [
        run_quantize(one, tmp_path / f"packed {number}", **settings)
        for number, one in enumerate((both, Checkpoint(tmp_path / "merged")))
    ]
    assert outputs[0].adapter is None and not (outputs[0].path / "adapter").exists()
    found, expected = (one.load(one.names()) for one in outputs)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


@pytest.mark.parametrize("stage", ["prune", "fold"])
def test_stages_that_copy_refuse(stage, dense, tmp_path):
    values = {"drop": [1]} if stage == "prune" else {"method": "recursive", "slots": 2}
    step = make_step(stage, values, where="test")
    with pytest.raises(ConfigError, match=f"`{stage}` would lose the adapter beside") as caught:
        run_step(step, dense, CalibrationSettings(), tmp_path / "out", RUNTIME)
    assert "`--merge`" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_it_is_evaluated_and_analyzed(tmp_path, monkeypatch):
    source = Checkpoint(save_tiny(tmp_path / "tiny"))
    written = put_beside(source, tmp_path / "out", corrections(source), monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    given = {"dataset": str(text), "samples": 2, "length": 32}
    step = make_step("eval", {**given, "speed": False}, where="test")
    report = run_step(step, written, CalibrationSettings(), tmp_path / "eval", RUNTIME).report
    original, row = report.rows
    assert row["size"] == written.stored_bytes > original["size"] == source.stored_bytes
    assert row["parameters"] == original["parameters"] and row["kl"] > 1e-4
    model = AutoModelForCausalLM.from_pretrained(source.path)
    view = merged(written)
    model.load_state_dict(view.load(view.names()))
    model.save_pretrained(tmp_path / "merged")
    for name in source.side_files():
        if not (tmp_path / "merged" / name).exists():
            (tmp_path / "merged" / name).write_bytes((source.path / name).read_bytes())
    step = make_step("analyze", {}, where="test")
    found, expected = (
        run_step(
            step, one, CalibrationSettings(**given), tmp_path / f"analysis {n}", RUNTIME
        ).report.rows
        for n, one in enumerate((written, Checkpoint(tmp_path / "merged")))
    )
    assert found == expected


def test_runtimes_run_it_too(dense):
    ids = tokens(1, 8)
    model = load(dense)
    expected = model.generate(
        ids, max_new_tokens=16, eos_token_id=None, do_sample=False, pad_token_id=0
    )
    speed = engine.speed(dense.path, ids, 16)
    assert speed.continuation == expected[0, 8:].tolist()
    assert speed.disk_bytes == dense.stored_bytes
    assert torch.allclose(engine.logits(dense.path, ids), model(ids).logits, atol=1e-5)


def test_it_is_inspected(dense, capsys):
    found = inspect_checkpoint(dense)
    assert found["adapter"] == {
        "linears": 13,
        "lowest_rank": 1,
        "highest_rank": 3,
        "bytes": dense.adapter.nbytes,
    }
    print_inspection(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "13 linears, ranks 1 to 3," in shown
    assert found["stored_bytes"] == dense.stored_bytes
