"""`quantize --for`: what a runtime runs fast is chosen, and all else refused."""

from __future__ import annotations

import pytest

from compresso.errors import ConfigError
from compresso.quantize_for import restricted, widths_for
from compresso.recipe import load_recipe, make_step
from compresso.runtimes.table import table


def step(runtime, **values):
    return make_step("quantize", {"for": runtime, **values}, where="test").settings


@pytest.mark.parametrize(
    ("runtime", "values", "group_size"),
    [
        ("llama.cpp", {}, 32),
        ("llama.cpp", {"bits": 8}, 32),
        ("llama.cpp", {"bits": 3}, 256),
        ("llama.cpp", {"bits": 2}, 256),
        ("llama.cpp", {"bits": 4, "group_size": 128}, 128),
        ("llama.cpp", {"target_bits": 3.5}, 256),
        ("llama.cpp", {"symmetric": False}, 256),
        ("vllm", {}, 64),
        ("vllm", {"symmetric": False}, 64),
        ("vllm", {"bits": 8, "group_size": -1}, -1),
        ("vllm", {"target_bits": 6.0}, 64),
        ("transformers", {"bits": 3, "symmetric": False, "group_size": 40}, 40),
        ("transformers", {"target_bits": 3.0}, 64),
        ("peft", {"bits": 2, "symmetric": False}, 64),
        ("peft", {"method": "nf4"}, 64),
    ],
)
def test_groups_are_chosen(runtime, values, group_size):
    settings = step(runtime, **values)
    assert settings.group_size == group_size and settings.for_runtime == runtime


@pytest.mark.parametrize(
    ("runtime", "values", "message"),
    [
        ("llama.cpp", {"bits": 3, "group_size": 64}, "symmetric codes of 3 bits in groups of 64"),
        ("llama.cpp", {"bits": 8, "symmetric": False}, "asymmetric codes of 8 bits"),
        ("llama.cpp", {"target_bits": 3.5, "group_size": 64}, "codes of several widths in groups"),
        ("llama.cpp", {"method": "nf4"}, "what `nf4` writes"),
        ("vllm", {"bits": 3}, "symmetric codes of 3 bits"),
        ("vllm", {"bits": 8, "symmetric": False}, "asymmetric codes of 8 bits"),
        ("vllm", {"bits": 4, "group_size": 256}, "in groups of 256"),
        ("vllm", {"method": "higgs"}, "what `higgs` writes"),
        ("transformers", {"target_bits": 3.0, "symmetric": False}, "asymmetric codes of several"),
        ("transformers", {"scale_bits": 8}, "what `gptq` writes with these settings"),
        ("peft", {"target_bits": 3.0}, "symmetric codes of several widths"),
        ("peft", {"method": "hqq"}, "what `hqq` writes"),
        ("vllm", {"bits": 8, "group_size": 8}, "in groups of 8"),
    ],
)
def test_all_else_is_refused(runtime, values, message):
    with pytest.raises(ConfigError) as caught:
        step(runtime, **values)
    assert f"`{runtime}` does not run fast " in str(caught.value) and message in str(caught.value)
    assert caught.value.hint.startswith("it runs fast: ") and "codes" in caught.value.hint


def test_gguf_is_for_llama_cpp():
    assert step("gguf", bits=3) == step("llama.cpp", bits=3)


def test_what_would_do_nothing():
    with pytest.raises(ConfigError, match="`for` would do nothing"):
        step("vllm", pack=False)
    with pytest.raises(ConfigError, match="for_runtime"):
        step("tgi")
    assert restricted("gptq", {"bits": 3}, where="test") == {"bits": 3}


def test_widths_of_a_target():
    assert widths_for(step("vllm", target_bits=6.0)) == (4, 8)
    assert widths_for(step("llama.cpp", target_bits=4.0)) == (2, 3, 4, 8)
    assert widths_for(step("transformers", target_bits=4.0)) == (2, 3, 4, 8)
    assert widths_for(make_step("quantize", {"target_bits": 4.0}, where="test").settings) is None


def test_in_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: reference\nstages:\n  - {stage: quantize, for: llama.cpp, bits: 3}\n")
    found = load_recipe(path).steps[0]
    assert found.settings.group_size == 256
    entry = found.to_json()
    assert entry["for"] == "llama.cpp" and "for_runtime" not in entry
    entry.pop("stage")
    assert make_step("quantize", entry, where="test") == found


def test_every_runtime_has_a_choice():
    for runtime in table()["fast"]:
        assert step(runtime).for_runtime == runtime
