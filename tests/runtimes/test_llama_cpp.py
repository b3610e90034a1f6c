"""Running GGUF files in llama.cpp, each time in a process of its own."""

import shutil
from importlib import import_module

import pytest
import torch
from exporting import run_export
from tiny_models import build, tokens

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, GateError, ResourceError
from compresso.runtimes import llama_cpp
from compresso.runtimes.engine import engine, ready_engine
from compresso.runtimes.llama_cpp_model import Model, open_library

PROMPT = tokens(1, 12)


def llama_cpp_package():
    return import_module("llama_cpp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf")
    build("llama").save_pretrained(path / "source")
    run_export(Checkpoint(path / "source"), path / "out", "gguf", verify=False)
    return path / "out"


def test_what_lies_there_says_whether_it_is_for_llama_cpp(folder):
    assert llama_cpp.accepts(folder) and llama_cpp.accepts(folder / "model.gguf")
    assert not llama_cpp.accepts(folder / "compresso.json")
    assert not llama_cpp.accepts(folder.parent / "source")
    assert engine("llama.cpp") is llama_cpp


def test_two_models_in_a_folder_are_one_too_many(folder, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(folder / "model.gguf", tmp_path / name)
    with pytest.raises(CheckpointError, match=r"one GGUF file, but holds `a.gguf`, `b.gguf`"):
        llama_cpp.logits(tmp_path, PROMPT)


def test_corrections_beside_a_file_are_its_own(folder, tmp_path, monkeypatch):
    """Named by its file or by its folder, an export with an adapter is the same model."""
    jobs = []
    monkeypatch.setattr(llama_cpp, "apart", lambda code, job, **_: jobs.append(job))
    for name in ("model.gguf", "lora.gguf"):
        shutil.copy(folder / "model.gguf", tmp_path / name)
    for path in (tmp_path, tmp_path / "model.gguf"):
        llama_cpp.logits(path, PROMPT)
    assert jobs[0] == jobs[1] and jobs[0]["corrections"] == [str(tmp_path / "lora.gguf")]
    shutil.copy(folder / "model.gguf", tmp_path / "other.gguf")
    llama_cpp.logits(tmp_path / "model.gguf", PROMPT)
    assert jobs[2]["corrections"] == []


def test_llama_cpp_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    assert "pip install 'compresso-llm[gguf]'" in llama_cpp.missing()
    with pytest.raises(ResourceError, match="needs package `llama-cpp-python`"):
        ready_engine("llama.cpp")
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(ResourceError, match="needs the package `llama-cpp-python`"):
        open_library()


@pytest.mark.runtimes
def test_logits_and_text_are_those_of_the_model(folder):
    model = build("llama")
    with torch.no_grad():
        expected = model(input_ids=PROMPT).logits
    found = llama_cpp.logits(folder, PROMPT)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    text = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 12:]
    for cache in (True, False):
        assert llama_cpp.generate(folder, PROMPT, 8, cache=cache) == text.tolist()


@pytest.mark.runtimes
def test_what_llama_cpp_says_of_a_failure_is_in_the_error(folder, monkeypatch):
    file = str(folder / "model.gguf")
    with pytest.raises(GateError, match=r"does not load in llama.cpp: .*general.type"):
        Model(file, [file])
    model = Model(file, [])
    model.make_room(8, 1)
    with pytest.raises(GateError, match=r"fails to run the model: .*token"):
        model.run([10**6], 0)
    monkeypatch.setattr(llama_cpp_package(), "llama_init_from_model", lambda *_: None)
    with pytest.raises(GateError, match="has no room for 8 tokens"):
        model.make_room(8, 1)


@pytest.mark.runtimes
def test_speed_is_measured(folder):
    found = llama_cpp.speed(folder, PROMPT, 4)
    assert min(found.prefill, found.decode, found.first_token, found.load) > 0
    assert found.peak_memory >= found.base_memory > 0
    assert found.disk_bytes == (folder / "model.gguf").stat().st_size
    assert len(found.continuation) == 4


@pytest.mark.runtimes
def test_a_file_that_llama_cpp_aborts_on_is_an_error_here(folder, tmp_path):
    """Cut short: the tensors that its header speaks of are not there."""
    whole = (folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GateError, match=r"model.gguf"):
        llama_cpp.logits(tmp_path, PROMPT)
