"""Adapters on disk: ours, those that PEFT saved, and those that cannot be used."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from correcting import PROBE, corrections, modules, sums
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compresso.checkpoint import adapter_folder
from compresso.checkpoint.adapter_folder import FOLDER, write_adapter
from compresso.checkpoint.merged import merged
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ResourceError
from compresso.kernels.lowrank import LowRank


def copied(source: Checkpoint, path: Path) -> Checkpoint:
    shutil.copytree(source.path, path)
    return Checkpoint(path)


def corrected(source: Checkpoint, path: Path, **options: Any) -> Checkpoint:
    """A copy with an adapter."""
    copied(source, path)
    given = {"modules": modules(source), "base": path, "dtype": torch.float32, **options}
    write_adapter(path, corrections(source), **given)
    return Checkpoint(path)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=PROBE).logits.float()


@pytest.fixture
def llama(checkpoints: Callable[[str], Checkpoint], tmp_path: Path) -> Checkpoint:
    return corrected(checkpoints("llama"), tmp_path / "llama")


# ---------------------------------------------------------------- what is written and read


def test_factors_come_back_in_every_type(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = checkpoints("llama")
    for dtype in (torch.float32, torch.bfloat16):
        written = corrected(source, tmp_path / f"{dtype}", dtype=dtype)
        expected = corrections(source)
        assert written.adapter is not None and written.adapter.paths == sorted(expected)
        found = written.adapter.load([*expected, "model.norm", "model.layers.0.self_attn.k_proj"])
        assert set(found) == set(expected)
        for path, factor in expected.items():
            assert torch.equal(found[path].up, factor.up)
            assert torch.equal(found[path].down, factor.down)
            assert found[path].up.dtype == torch.float32
            count = factor.up.numel() + factor.down.numel()
            assert written.adapter.sizes[path] == count * dtype.itemsize


def test_ranks_differ_without_touching_each_other(llama: Checkpoint) -> None:
    config = json.loads((llama.path / FOLDER / "adapter_config.json").read_text())
    assert llama.adapter is not None
    ranks = llama.adapter.ranks
    assert {1, 2, 3} == set(ranks.values())
    assert config["target_modules"] == sorted(ranks)
    assert {**dict.fromkeys(ranks, config["r"]), **config["rank_pattern"]} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama.path), llama.path / FOLDER
    )
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    found = {name.removeprefix("base_model.model."): m.r["default"] for name, m in layers.items()}
    assert found == ranks
    assert all(layer.scaling == {"default": 1.0} for layer in layers.values())


def test_the_names_of_the_hubs_gpt2(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """They lack the prefix that transformers gives the modules."""
    short = copied(checkpoints("gpt2"), tmp_path / "short")
    stored = load_file(short.path / "model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(stored, short.path / "model.safetensors", {"format": "pt"})
    short = Checkpoint(short.path)
    written = corrected(short, tmp_path / "corrected", fan_in_fan_out=True)
    assert written.adapter is not None and "h.0.attn.c_attn" in written.adapter.paths
    dense = sums(short, corrections(short))
    found = written.load_weights(dense)
    assert all(torch.equal(found[name], weight) for name, weight in dense.items())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_peft_saved_is_read(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path, family: str, rslora: bool
) -> None:
    source = copied(checkpoints(family), tmp_path / "model")
    linears = {"llama": ["q_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=linears.get(family, ["dense", "lm_head"]),
        rank_pattern={"1.attn.c_attn": 2, "1.self_attn.q_proj": 2},
        alpha_pattern={"2.attn.c_attn": 5, "lm_head": 7},
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source.path), config)
    expected = logits(model)
    model.save_pretrained(source.path / FOLDER, save_embedding_layers=False)
    found = Checkpoint(source.path)
    weights = found.load_weights(found.weight_names())
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    before = logits(plain)
    assert found.adapter is not None
    with torch.no_grad():
        for path in found.adapter.paths:
            plain.get_parameter(f"{modules(source)[path]}.weight").copy_(weights[f"{path}.weight"])
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the checkpoint around it


def test_it_is_part_of_the_key_and_no_side_file(
    checkpoints: Callable[[str], Checkpoint], llama: Checkpoint
) -> None:
    source = checkpoints("llama")
    folder = llama.path / FOLDER
    (folder / "README.md").write_text("of PEFT")
    assert not any(name.startswith(FOLDER) for name in Checkpoint(llama.path).side_files())
    assert not any(name.startswith(FOLDER) for name in Checkpoint(llama.path).left_out_files())
    keys = {source.key, llama.key}
    # the recorded key is that of the recorded adapter
    record = {"key": "recorded"}
    (llama.path / "compresso.json").write_text(json.dumps(record))
    keys.add(Checkpoint(llama.path).key)
    assert llama.adapter is not None
    record[FOLDER] = llama.adapter.key
    (llama.path / "compresso.json").write_text(json.dumps(record))
    assert Checkpoint(llama.path).key == "recorded"
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    assert Checkpoint(llama.path).key == "recorded"
    path.write_text(json.dumps({**config, "lora_alpha": 3}))
    keys.add(Checkpoint(llama.path).key)
    shutil.rmtree(folder)
    keys.add(Checkpoint(llama.path).key)
    assert len(keys) == 5 and "recorded" not in keys


def test_other_folders_of_that_name_are_carried(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = copied(checkpoints("llama"), tmp_path / "model")
    (source.path / FOLDER).mkdir()
    (source.path / FOLDER / "notes.txt").write_text("mine")
    assert f"{FOLDER}/notes.txt" in source.side_files() and source.adapter is None
    assert merged(source) is source


def test_merged_it_reads_as_a_checkpoint_of_the_sums(
    checkpoints: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = checkpoints("llama")
    view = merged(corrected(source, tmp_path / "model"))
    expected = source.load(source.names()) | sums(source, corrections(source))
    found = view.load(view.names())
    assert set(found) == set(expected) and view.adapter is None
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    weights = view.load_weights(view.weight_names())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert view.stored_bytes == source.stored_bytes


def test_its_base_is_named_where_it_is_given_alone(llama: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="holds a PEFT adapter") as caught:
        Checkpoint(llama.path / FOLDER)
    assert f"`{llama.path}`" in str(caught.value.hint)


# ---------------------------------------------------------------- what is refused


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_factors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


UP = "base_model.model.lm_head.lora_B.weight"
DOWN = "base_model.model.lm_head.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "cannot read .*adapter_config"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks its shard"),
    "another kind": (lambda f: change_config(f, peft_type="LOHA"), "is no LoRA adapter"),
    "more than factors": (lambda f: change_config(f, use_dora=True), "has `use_dora`"),
    "other tensors": (
        lambda f: change_factors(f, lambda t: t.update({"base_model.model.x": torch.ones(1)})),
        "holds `base_model.model.x`, which cannot be read",
    ),
    "nothing": (lambda f: change_factors(f, lambda t: t.clear()), "holds no corrections"),
    "half": (lambda f: change_factors(f, lambda t: t.pop(UP)), "corrects `lm_head`, but the"),
    "another shape": (
        lambda f: change_factors(f, lambda t: t.update({DOWN: torch.ones(2, 65)})),
        "corrects `lm_head`, but the checkpoint has no linear of that shape",
    ),
    "another linear": (
        lambda f: change_factors(
            f, lambda t: t.update({n.replace("lm_head", "x"): t.pop(n) for n in (UP, DOWN)})
        ),
        "corrects `x`, but the",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_ones(llama: Checkpoint, what: str) -> None:
    change, message = BROKEN[what]
    change(llama.path / FOLDER)
    broken = Checkpoint(llama.path)
    for read in (lambda: broken.adapter, lambda: broken.stored_bytes, lambda: broken.key):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_corrections_that_are_not_finite(llama: Checkpoint) -> None:
    change_factors(llama.path / FOLDER, lambda t: t[UP].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"`lm_head.weight` .*holds NaN or infinity"):
        Checkpoint(llama.path).load_weights(["lm_head.weight"])


class Made(Mapping[str, LowRank]):
    """Corrections that are made as they are asked for. most: that lived at once."""

    def __init__(self, count: int) -> None:
        self.names = [f"a{number}" for number in range(count)]
        self.most = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __getitem__(self, name: str) -> LowRank:
        up = torch.full((3, 2), float(self.names.index(name)))
        self._made = [*(one for one in self._made if one() is not None), weakref.ref(up)]
        self.most = max(self.most, len(self._made))
        return LowRank(up, torch.ones(2, 5))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_correction_is_held_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    made = Made(30)
    options: dict[str, Any] = {"base": tmp_path, "dtype": dtype}
    options["modules"] = {path: path for path in made.names}
    for name in ("made", "held"):
        (tmp_path / name).mkdir()
    write_adapter(tmp_path / "made", made, **options)
    assert made.most <= 2
    write_adapter(tmp_path / "held", dict(made), **options)
    files = [tmp_path / name / FOLDER / "adapter_model.safetensors" for name in ("made", "held")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_would_be_rounded_is_not_written(tmp_path: Path) -> None:
    factor = LowRank(torch.full((3, 1), 0.1), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"the correction of `a` is not exact in torch.bfloat16"):
        write_adapter(
            tmp_path, {"a": factor}, modules={"a": "a"}, base=tmp_path, dtype=torch.bfloat16
        )
    assert not list(tmp_path.iterdir())


def test_no_ranks_no_adapter(tmp_path: Path) -> None:
    none = LowRank(torch.empty(3, 0), torch.empty(0, 2))
    options: dict[str, Any] = {"modules": {"a": "a", "b": "b"}, "base": tmp_path}
    write_adapter(tmp_path, {"a": none}, dtype=torch.float32, **options)
    assert not list(tmp_path.iterdir())
    some = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    write_adapter(tmp_path, {"a": none, "b": some}, dtype=torch.float32, **options)
    config = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert config["target_modules"] == ["b"] and config["rank_pattern"] == {}


def test_codes_are_not_merged(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "packed", True)
    with pytest.raises(ValueError, match="codes take in no correction"):
        merged(llama)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_folder, "write_safetensors", fail)
    some = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    with pytest.raises(ResourceError, match=r"cannot write .*adapter`: No space left"):
        write_adapter(tmp_path, {"a": some}, modules={"a": "a"}, base=tmp_path, dtype=torch.float32)
