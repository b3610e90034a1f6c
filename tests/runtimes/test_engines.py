"""Runtimes: what they are asked for, and that they are reached in a process of their own."""

from __future__ import annotations

import inspect
import json
import os
import signal

import pytest
import torch
from restructured import STRUCTURES, save
from tiny_checkpoint import save_tiny
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

from compresso.checkpoint.reload import blaming
from compresso.errors import ConfigError, GateError, ResourceError
from compresso.runtimes import engine as engines
from compresso.runtimes import transformers as own
from compresso.runtimes.engine import Engine, engine, engines_for, ready_engine
from compresso.runtimes.process import apart


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def here(monkeypatch):
    """Run models in this process, which is as good for what they say, and faster."""

    def call(code, job, **_):
        return getattr(own, code.partition(":")[2])(**job)

    monkeypatch.setattr(own, "apart", call)


def test_transformers_has_all_that_is_asked():
    found = engine("transformers")
    assert found is own and found.NAME == "transformers" and found.missing() is None
    assert found.version() == __import__("transformers").__version__
    for name in ("missing", "version", "accepts", "logits", "generate", "speed"):
        asked = [p for p in inspect.signature(getattr(Engine, name)).parameters if p != "self"]
        assert set(asked) <= set(inspect.signature(getattr(found, name)).parameters), name


def test_it_says_what_transformers_says(tiny, here):
    ids = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        assert torch.equal(own.logits(tiny, ids), model(ids).logits)
    plain = model.generate(ids, max_new_tokens=20, eos_token_id=None, do_sample=False)[0, 9:]
    assert own.generate(tiny, ids, 20) == own.generate(tiny, ids, 20, cache=False) == plain.tolist()


def test_what_the_checkpoint_says_of_sampling_does_not_matter(tiny, tmp_path, here):
    ids = tokens(1, 6)
    expected = own.generate(tiny, ids, 12)
    copy = save_tiny(tmp_path / "copy")
    config = {"do_sample": True, "temperature": 9.0, "eos_token_id": expected[:3]}
    (copy / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 5.0}))
    assert own.generate(copy, ids, 12) == expected


def test_speed_is_of_the_model(tiny):
    """In a process of its own, as are all outside of these tests."""
    speed = own.speed(tiny, tokens(1, 32), 8)
    assert speed.prefill > 0 and speed.decode > 0 and 0 < speed.first_token < speed.load
    assert 10**8 < speed.base_memory <= speed.peak_memory
    # Of a model of 0.2 MB: what libraries take is no part of it.
    assert speed.peak_memory - speed.base_memory < 8e7
    model = AutoModelForCausalLM.from_pretrained(tiny)
    plain = model.generate(tokens(1, 32), max_new_tokens=8, eos_token_id=None, do_sample=False)
    assert speed.continuation == plain[0, 32:].tolist()
    assert speed.disk_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_restructured_checkpoints_run(tmp_path, here):
    source = save(build("llama"), STRUCTURES["everything"], tmp_path / "x")
    ids = tokens(1, 8)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    with torch.no_grad():
        assert torch.equal(own.logits(source.path, ids), model(ids).logits)


def test_who_runs_what(tiny, tmp_path):
    assert own in engines_for(tiny)
    assert engines_for(tmp_path) == []


def test_a_name_that_none_has():
    with pytest.raises(ConfigError, match="unknown runtime `transformer`") as caught:
        engine("transformer")
    assert caught.value.hint == "did you mean `transformers`?"


def test_one_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(own, "missing", lambda: "package `x`: pip install 'compresso-llm[x]'")
    with pytest.raises(ResourceError, match="runtime `transformers` needs package `x`") as caught:
        ready_engine("transformers")
    assert caught.value.hint == "pip install 'compresso-llm[x]'"
    assert engines.engine("transformers") is own


def test_what_does_not_load(tiny, tmp_path, here):
    copy = save_tiny(tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(GateError, match=r"9 tensors are missing, first `model\.layers\.4"):
        own.logits(copy, tokens(1, 4))
    with pytest.raises(GateError, match="does not load and run"):
        own.logits(tmp_path, tokens(1, 4))


@pytest.fixture
def elsewhere(monkeypatch):
    """Functions of this file, for processes of their own."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    )
    where = {"path": "m", "runtime": "llama.cpp"}
    return lambda name, **job: apart(f"ending:{name}", job, **where)


def test_a_tensor_comes_back(elsewhere):
    assert torch.equal(elsewhere("ones"), torch.ones(2, 3))


def test_plain_values_come_back(elsewhere):
    assert elsewhere("echo", a=[1, 2.5, None], b="ä") == {"a": [1, 2.5, None], "b": "ä"}


def test_a_process_that_has_too_little_memory(elsewhere):
    with pytest.raises(ResourceError, match="not enough memory") as caught:
        elsewhere("exhaust")
    assert "more memory" in caught.value.hint


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_too_little_memory_is_no_fault_of_the_model(error, tmp_path):
    with pytest.raises(ResourceError, match="cannot reload") as caught, blaming(tmp_path):
        raise error
    assert "more memory" in caught.value.hint


def test_a_process_that_is_ended_by_its_model(elsewhere):
    with pytest.raises(
        GateError, match=r"`m` makes llama.cpp end with SIGABRT: GGML_ASSERT\(x\) failed"
    ):
        elsewhere("end", how=signal.SIGABRT.value)


def test_a_process_that_is_ended_for_lack_of_memory(elsewhere):
    with pytest.raises(ResourceError, match=r"running `m` in llama.cpp was killed, most likely"):
        elsewhere("end", how=signal.SIGKILL.value)


def test_a_request_to_stop_is_passed_on(elsewhere):
    with pytest.raises(KeyboardInterrupt):
        elsewhere("end", how=signal.SIGTERM.value)


def test_mistakes_show_where_they_are(elsewhere):
    with pytest.raises(RuntimeError, match="ValueError: a mistake"):
        elsewhere("fail")


def test_errors_keep_their_kind_and_hint(elsewhere):
    with pytest.raises(ConfigError, match="no such thing") as caught:
        elsewhere("refuse")
    assert caught.value.hint == "another"
