"""Verification: every layout that is written passes it, and every change of one fails it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from correcting import (
    RUNTIME,
    calm,
    corrections,
    put_beside,
    run_quantize,
    save_mixed,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, GateError, ResourceError
from compresso.provenance import RECORD
from compresso.proving import prove_in
from compresso.recipe import make_step
from compresso.run import run_step
from compresso.runtimes import engine as engines
from compresso.settings import CalibrationSettings
from compresso.stages.contents import shortened
from compresso.stages.verify import check_verification, print_verification, verify


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "llama"
    calm("llama").save_pretrained(path)
    return Checkpoint(path)


def stage(source, target, name, **values):
    step = make_step(name, values, where="test")
    run_step(step, source, CalibrationSettings(), target, RUNTIME)
    return Checkpoint(target)


@pytest.fixture
def quantized(dense, tmp_path):
    return run_quantize(dense, tmp_path / "q", method="rtn", bits=4, group_size=32)


def rewrite(path, name, change):
    """Change the tensors of the file that holds a tensor of that name."""
    for file in path.glob("model*.safetensors"):
        if name in (tensors := load_file(file)):
            break
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


MADE = {
    "dense": lambda source, path: stage(source, path, "prune", drop=[1]),
    "restructured": lambda source, path: stage(source, path, "prune", drop=["a1"]),
    "uniform": lambda source, path: run_quantize(source, path, method="rtn", bits=3, group_size=32),
    "asymmetric": lambda source, path: run_quantize(
        source, path, method="rtn", bits=4, group_size=32, symmetric=False
    ),
    "coded": lambda source, path: run_quantize(source, path, method="higgs", bits=3),
    "nf4": lambda source, path: run_quantize(source, path, method="nf4"),
    "int8": lambda source, path: run_quantize(source, path, method="int8"),
}


@pytest.mark.parametrize("layout", MADE)
def test_every_layout_that_a_stage_writes(layout, dense, tmp_path):
    written = MADE[layout](dense, tmp_path / "out")
    found = verify(str(written.path), [], RUNTIME)
    check_verification(found)
    (entry,) = found["runtimes"]
    assert entry["loads_and_equals"] and entry["difference"] <= entry["tolerance"]
    assert entry["runtime"] == "transformers" and entry["generated"] == 16
    assert found["expected"] == f"the fingerprint in `{RECORD}`" and found["tokens"] == 64
    assert found["bytes"] == written.stored_bytes
    assert found["bytes_of_source"] == dense.stored_bytes
    assert {*found["packed"], *found["kept"]} == set(written.weight_names())
    linears = [n for n in written.weight_names() if "_proj" in n] if written.packed else []
    assert found["packed"] == linears
    gone = [n for n in dense.names() if n not in written.weight_names()]
    assert found["only_here"] == [] and found["only_in_source"] == gone
    assert json.loads(json.dumps(found)) == found


def test_an_adapter_beside_codes(dense, tmp_path, monkeypatch):
    base = save_mixed(calm("llama"), tmp_path / "mixed")
    written = put_beside(base, tmp_path / "out", corrections(base), monkeypatch)
    found = verify(str(written.path), [], RUNTIME)
    check_verification(found)
    assert found["runtimes"][0]["adapter"] == "peft"
    assert found["bytes"] == written.stored_bytes
    assert sum(name.startswith("adapter of") for name in found["kept"]) == 13
    shutil.rmtree(written.path / "adapter")
    found = verify(str(written.path), [], RUNTIME)
    with pytest.raises(GateError, match=r"in transformers: .*is not the model it was in memory"):
        check_verification(found)


def test_an_original_is_held_against_our_own_evaluation(dense):
    found = verify(str(dense.path), ["transformers"], RUNTIME)
    check_verification(found)
    assert found["expected"] == "compresso's own evaluation, block by block"
    assert found["packed"] == [] and "source" not in found


def test_codes_that_were_changed_on_the_disk(quantized):
    name = "model.layers.1.mlp.up_proj.weight_packed"
    rewrite(quantized.path, name, lambda tensors: tensors[name].bitwise_not_())
    found = verify(str(quantized.path), [], RUNTIME)
    with pytest.raises(GateError, match=r"in transformers: .*logits differ by up to"):
        check_verification(found)
    assert found["runtimes"][0]["loads_and_equals"] is False


def failure_of(path, match):
    """What fails of a model that runs as it did, within rounding."""
    found = verify(str(path), [], RUNTIME)
    assert all(entry["loads_and_equals"] for entry in found["runtimes"])
    with pytest.raises(GateError, match=match):
        check_verification(found)
    return found


def test_a_change_that_is_lost_in_rounding(quantized):
    name = "model.layers.0.input_layernorm.weight"

    def nudge(tensors):
        tensors[name][3] += 1e-6

    rewrite(quantized.path, name, nudge)
    found = failure_of(quantized.path, r"^`model-00001-of-.*` has changed since it was made$")
    assert len(found["changed"]) == 1 and found["gone"] == []


def test_tensors_that_were_swapped(quantized):
    names = [f"model.layers.0.mlp.{one}_proj.weight_packed" for one in ("up", "gate")]

    def swap(tensors):
        up, gate = (tensors[name].clone() for name in names)
        tensors.update(dict(zip(names, (gate, up), strict=True)))

    rewrite(quantized.path, names[0], swap)
    found = verify(str(quantized.path), [], RUNTIME)
    with pytest.raises(GateError, match=r"in transformers: .*logits differ.*; and 1 more"):
        check_verification(found)


def test_another_tokenizer(tmp_path):
    """It has no part in the logits of tokens."""
    written = stage(Checkpoint(save_tiny(tmp_path / "tiny")), tmp_path / "out", "prune", drop=[1])
    found = verify(str(written.path), [], RUNTIME)
    check_verification(found)
    assert found["changed"] == found["gone"] == []
    (written.path / "README.md").write_text("a card of mine\n")
    check_verification(verify(str(written.path), [], RUNTIME))
    file = written.path / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"a": ', '"a_": ').replace('"b": ', '"a": ', 1))
    failure_of(written.path, r"^`tokenizer\.json` has changed since it was made$")
    file.unlink()
    failure_of(written.path, r"^`tokenizer\.json` is gone$")
    file.write_text(text)
    check_verification(verify(str(written.path), [], RUNTIME))


def test_a_tensor_that_is_gone(dense, tmp_path):
    written = stage(dense, tmp_path / "out", "prune", drop=[1])
    values = json.loads((written.path / "model.safetensors.index.json").read_text())
    del values["weight_map"]["model.norm.weight"]
    (written.path / "model.safetensors.index.json").write_text(json.dumps(values))
    for file in written.path.glob("model-*.safetensors"):
        tensors = load_file(file)
        tensors.pop("model.norm.weight", None)
        save_file(tensors, file, metadata={"format": "pt"})
    found = verify(str(written.path), [], RUNTIME)
    assert "model.norm.weight" in found["only_in_source"]
    with pytest.raises(GateError, match=r"1 tensors are missing, first `model\.norm\.weight`"):
        check_verification(found)


def test_a_source_that_is_gone(dense, tmp_path):
    shutil.copytree(dense.path, tmp_path / "copy")
    written = stage(Checkpoint(tmp_path / "copy"), tmp_path / "out", "prune", drop=[1])
    shutil.rmtree(tmp_path / "copy")
    found = verify(str(written.path), [], RUNTIME)
    check_verification(found)
    assert found["source"] == f"`{tmp_path / 'copy'}` is gone"


def test_what_nobody_can_say_anything_of(tmp_path):
    model = build("llama")
    model.config.model_type = "own"
    model.save_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(values | {"model_type": "own"}))
    with pytest.raises(CheckpointError, match=r"to hold it against, and compresso cannot run a"):
        verify(str(tmp_path / "m"), [], RUNTIME)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is nothing that a runtime here loads"):
        verify(str(tmp_path / "empty"), [], RUNTIME)


def test_names_are_shown_shortly():
    names = ["model.layers.1.a.weight", "model.layers.12.a.weight", "model.norm.weight"]
    assert shortened(names) == ["model.layers.*.a.weight (2)", "model.norm.weight"]


def test_it_is_shown(quantized, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_verification(verify(str(quantized.path), [], RUNTIME))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "model.layers.*.mlp.up_proj.weight 4 bits, groups of 32, symmetric yes 2" in shown
    assert "packed tensors 14 kept tensors 7" in shown
    assert "loads and equals yes" in shown


def test_names_are_whole_on_a_narrow_terminal(quantized, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_verification(verify(str(quantized.path), [], RUNTIME))
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    rows = [line.strip("│ ").split("│") for line in out.split("\nstored ")[0].splitlines()]
    names = "".join(row[0].strip() for row in rows)
    assert "model.layers.*.post_attention_layernorm.weight" in names


# ---------------------------------------------------------------- other runtimes


class Other:
    """Runs a model in memory; its answers can be tampered with."""

    NAME = "other"

    def __init__(self, model):
        self.model, self.wrong = model, {}

    def missing(self):
        return self.wrong.get("missing")

    def version(self):
        return "1"

    def accepts(self, path):
        return path.suffix == ".own" or path.is_dir()

    @torch.no_grad()
    def logits(self, path, tokens, *, trust_remote_code=False):
        return self.model(tokens).logits + self.wrong.get("logits", 0)

    def generate(self, path, tokens, new, *, cache=True, trust_remote_code=False):
        found = self.model.generate(tokens, max_new_tokens=new, eos_token_id=None, do_sample=False)
        found = found[0, tokens.shape[1] :].tolist()
        return found if cache else [*found[:5], self.wrong.get("token", found[5]), *found[6:]]


@pytest.fixture
def other(dense):
    return Other(AutoModelForCausalLM.from_pretrained(dense.path).eval())


@pytest.fixture
def said(other):
    ids = tokens(1, 40)
    return Fingerprint(ids, other.logits(None, ids), torch.float32)


def test_a_runtime_that_agrees(other, said, dense):
    proof = prove_in(other, dense.path, said)
    assert proof.difference == 0 and proof.generated == 16 and proof.top_agreement == 1


def test_a_runtime_that_says_something_else(other, said, dense):
    other.wrong["logits"] = 0.01
    with pytest.raises(GateError, match="not the model it was in memory"):
        prove_in(other, dense.path, said)
    lenient = Fingerprint(said.tokens, said.logits, torch.float32, 0.05)
    assert prove_in(other, dense.path, lenient).difference == pytest.approx(0.01, rel=0.01)


def test_a_runtime_whose_cache_is_wrong(other, said, dense):
    right = other.generate(None, said.tokens[:, :24], 16)[5]
    other.wrong["token"] = (right + 1) % 128
    with pytest.raises(GateError, match="with a cache than without: at new token 6 one is"):
        prove_in(other, dense.path, said)


def test_near_ties_end_the_comparison(other, said, dense):
    right = other.generate(None, said.tokens[:, :24], 16)[5]
    other.wrong["token"] = (right + 1) % 128
    lenient = Fingerprint(said.tokens, said.logits, torch.float32, 10.0)
    assert prove_in(other, dense.path, lenient).generated == 5


def test_runtimes_that_are_asked_for(other, dense, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "other_runtime", other)
    monkeypatch.setitem(engines.ENGINES, "other", "other_runtime")
    found = verify(str(dense.path), [], RUNTIME)
    assert [entry["runtime"] for entry in found["runtimes"]] == ["transformers", "other"]
    check_verification(found)
    other.wrong["logits"] = 1.0
    found = verify(str(dense.path), ["other"], RUNTIME)
    with pytest.raises(GateError, match=r"in other: .* is not the model it was in memory"):
        check_verification(found)
    other.wrong = {"missing": "package `x`: pip install x"}
    with pytest.raises(ResourceError, match="runtime `other` needs package `x`"):
        verify(str(dense.path), ["other"], RUNTIME)
    verify(str(dense.path), [], RUNTIME)
    assert "not verified in other, which needs package `x`" in capsys.readouterr().err
    (tmp_path / "m.own").write_text("")
    with pytest.raises(CheckpointError, match="nothing that runtime `transformers` loads") as no:
        verify(str(tmp_path / "m.own"), ["transformers"], RUNTIME)
    assert no.value.hint == "it is for `other`"
    other.wrong = {}
    with pytest.raises(CheckpointError, match="there is no fingerprint beside"):
        verify(str(tmp_path / "m.own"), [], RUNTIME)
