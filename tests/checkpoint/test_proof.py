"""Proof: passes what transformers reloads faithfully, and fails every way in which it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import SMALL, fingerprint, make, rewrite
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    dynamic_module_utils,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from compresso.checkpoint import proof
from compresso.checkpoint.proof import Fingerprint, prove
from compresso.errors import ConfigError, GateError, ResourceError

# ---------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Gemma3TextConfig(
            **SMALL,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_faithful_checkpoint(tmp_path: Path, config: Any) -> None:
    model = make(tmp_path / "m", config)
    report = prove(tmp_path / "m", fingerprint(model), dtype=torch.float32)
    assert report.difference == 0
    assert report.top_agreement == 1
    assert report.generated == 16
    assert 0 <= report.cache_difference <= report.tolerance
    assert report.tolerance == pytest.approx(1e-4 * max(1, fingerprint(model).logits.abs().max()))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16])
def test_computing_in_another_type(
    tmp_path: Path, stored: torch.dtype, computed: torch.dtype
) -> None:
    make(tmp_path / "m", LlamaConfig(**SMALL), stored)
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=computed)
    report = prove(tmp_path / "m", fingerprint(memory), dtype=computed)
    assert report.difference == 0


def test_tokens_longer_than_the_model_can_continue(tmp_path: Path) -> None:
    tokens = torch.randint(0, 96, (1, 64), generator=torch.Generator().manual_seed(2))
    model = make(tmp_path / "m", LlamaConfig(**SMALL))
    assert prove(tmp_path / "m", fingerprint(model, tokens), dtype=torch.float32).generated == 16


def test_stop_tokens_and_sampling_in_the_checkpoint_do_not_matter(
    llama: tuple[Path, Fingerprint],
) -> None:
    path, expected = llama
    values = {"eos_token_id": list(range(96)), "do_sample": True, "temperature": 9.0, "top_k": 9}
    (path / "generation_config.json").write_text(json.dumps(values))
    assert prove(path, expected, dtype=torch.float32).generated == 16


def test_it_is_silent_and_restores_what_it_silenced(
    llama: tuple[Path, Fingerprint], capfd: pytest.CaptureFixture[str]
) -> None:
    rewrite(llama[0], lambda tensors: tensors.update(extra=torch.ones(2)))
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    prove(*llama, dtype=torch.float32, carried=["extra"])
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- what fails


def test_another_weight(llama: tuple[Path, Fingerprint]) -> None:
    rewrite(llama[0], lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.01))
    with pytest.raises(GateError, match="not the model it was in memory: logits differ by up to"):
        prove(*llama, dtype=torch.float32)


def test_two_blocks_swapped(llama: tuple[Path, Fingerprint]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    rewrite(llama[0], swap)
    with pytest.raises(GateError, match="not the model it was in memory"):
        prove(*llama, dtype=torch.bfloat16)


def test_layer_types_truncated_instead_of_filtered(tmp_path: Path) -> None:
    """The popular way to shorten a config loads without a word and is another model."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, layer_types=kinds)
    expected = fingerprint(make(tmp_path / "m", config))
    prove(tmp_path / "m", expected, dtype=torch.float32)
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    values["layer_types"] = ["full_attention", *kinds[:3]]
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(GateError, match="not the model it was in memory"):
        prove(tmp_path / "m", expected, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (3, 1)],
            "2 tensors are missing, first `model.layers.1.mlp.up_proj.weight`",
        ),
        (
            lambda tensors: tensors.update({"mtp.weight": torch.ones(2)}),
            "1 tensors are left over, first `mtp.weight`",
        ),
    ],
)
def test_missing_and_left_over_tensors(
    llama: tuple[Path, Fingerprint], change: Any, message: str
) -> None:
    rewrite(llama[0], change)
    with pytest.raises(GateError, match=message):
        prove(*llama, dtype=torch.float32)


def test_a_left_over_tensor_that_is_carried_on_purpose(llama: tuple[Path, Fingerprint]) -> None:
    rewrite(llama[0], lambda tensors: tensors.update({"mtp.weight": torch.ones(2)}))
    assert prove(*llama, dtype=torch.float32, carried={"mtp.weight"}).difference == 0


def test_a_tensor_of_the_wrong_shape(llama: tuple[Path, Fingerprint]) -> None:
    rewrite(llama[0], lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(GateError, match=r"m` does not load"):
        prove(*llama, dtype=torch.float32)


def test_mismatched_keys_are_reported(
    llama: tuple[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For model code that tolerates them."""
    info = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": {("model.norm.weight", (31,), (32,))},
    }
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (None, info))
    with pytest.raises(GateError, match=r"of the wrong shape, first `model.norm.weight`"):
        prove(*llama, dtype=torch.float32)


def test_a_config_that_does_not_load(llama: tuple[Path, Fingerprint]) -> None:
    (llama[0] / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(GateError, match="m` does not load and run") as caught:
        prove(*llama, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_numbers(llama: tuple[Path, Fingerprint]) -> None:
    rewrite(llama[0], lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(GateError, match="differ by up to nan"):
        prove(*llama, dtype=torch.float32)
    path, expected = llama
    rewrite(path, lambda tensors: tensors["model.norm.weight"].fill_(1))
    expected.logits[0, 3, 5] = torch.nan
    with pytest.raises(GateError, match="differ by up to nan"):
        prove(path, expected, dtype=torch.float32)


def test_another_vocabulary(llama: tuple[Path, Fingerprint]) -> None:
    path, expected = llama
    other = Fingerprint(expected.tokens, expected.logits[..., :-1])
    with pytest.raises(GateError, match=r"shape \(1, 20, 96\), not \(1, 20, 95\)"):
        prove(path, other, dtype=torch.float32)


def test_a_wrong_cache(llama: tuple[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicLayer.update

    def forgetful(self: Any, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Any:
        return update(self, keys, values if keys.shape[-2] > 1 else values * 0, *rest, **more)

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    with pytest.raises(GateError, match="otherwise with a cache than without: at new token 2 "):
        prove(*llama, dtype=torch.float32)


def test_a_cache_of_the_wrong_depth(
    llama: tuple[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr(DynamicLayer, "update", fail)
    with pytest.raises(GateError, match="does not load and run: list index out of range"):
        prove(*llama, dtype=torch.float32)


def test_near_ties_end_the_comparison(
    llama: tuple[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def continued(_: Any, __: Any, *, use_cache: bool) -> Any:
        steps = [torch.tensor([[3.0, 1.0]]) for _ in range(16)]
        steps[5] = torch.tensor([[2.0, 2.0 + (1e-5 if use_cache else -1e-5)]])
        steps[6:] = [step if use_cache else -step for step in steps[6:]]
        return SimpleNamespace(logits=steps)

    monkeypatch.setattr(proof, "_continue", continued)
    report = prove(*llama, dtype=torch.float32)
    assert report.generated == 5
    assert report.cache_difference == pytest.approx(2e-5, rel=0.1)


@pytest.mark.parametrize("error", [ImportError("needs `x`"), torch.OutOfMemoryError("no room")])
def test_what_the_machine_lacks(
    llama: tuple[Path, Fingerprint], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ResourceError, match=r"cannot reload .*: n"):
        prove(*llama, dtype=torch.float32)


def test_custom_code_is_not_run_unless_allowed(
    llama: tuple[Path, Fingerprint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    path, expected = llama
    values = json.loads((path / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "code.OwnConfig",
        "AutoModelForCausalLM": "code.OwnForCausalLM",
    }
    values["model_type"] = "own_llama"
    (path / "config.json").write_text(json.dumps(values))
    (path / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ConfigError, match="comes with code that has to be run to load it"):
        prove(path, expected, dtype=torch.float32)
    report = prove(path, expected, dtype=torch.float32, trust_remote_code=True)
    assert report.difference == 0
