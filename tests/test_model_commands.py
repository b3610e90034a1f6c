"""The commands that run a model, as a user types them: output, errors and exit codes."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny

from compresso.runtimes import transformers as own


@pytest.fixture
def pruned(command, tmp_path):
    save_tiny(tmp_path / "tiny")
    assert command("prune", "tiny", "--drop", "1", "-o", "out")[0] == 0
    return tmp_path / "out"


def test_verify(command, pruned):
    code, out, err = command("verify", "out", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 0 and "loading `out` in transformers" in err
    assert found["runtimes"][0]["loads_and_equals"] and found["tokens"] == 64
    for file in pruned.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            tensors[name] *= 1.05 if "up_proj" in name else 1
        save_file(tensors, file, metadata={"format": "pt"})
    code, out, err = command("verify", "out", "--runtime", "transformers")
    assert code == 6 and "error: in transformers: `out` is not the model it was in memory" in err
    assert "loads and equals" in out and "Traceback" not in err
    code, _, err = command("verify", "out", "--runtime", "llama.cp")
    assert code == 2 and "did you mean `llama.cpp`?" in err
    assert command("verify", "nothing")[0] == 3


def test_bench(command, pruned, monkeypatch):
    monkeypatch.setattr(own, "apart", lambda code, job, **_: own._speed(**job))
    given = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1, "--runtime", "transformers")
    code, out, _ = command("bench", "out", *given, "--json")
    found = json.loads(out)
    models = [row["model"] for row in found["rows"]]
    assert code == 0 and models == [str(pruned.parent / "tiny"), "out"]
    assert found["prompt_tokens"] == 8 and found["new_tokens"] == 4 and found["rounds"] == 1
    assert command("bench", "out", *given)[1].startswith("8 tokens read, 4 written")
