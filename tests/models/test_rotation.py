"""A rotated model computes what the original does, is a plain checkpoint, and has no outliers."""

import json
import shutil

import pytest
import torch
from restructured import STRUCTURES, save
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, TINY_MODELS, build, tokens
from transformers import AutoModelForCausalLM
from walking import difference

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.models.rotation import CHUNK, ROTATABLE, rotated
from compresso.models.structure import MODELING_FILE

TOKENS = tokens(2, 24)
VARIANTS = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "uneven": {"hidden_size": 96, "head_dim": 20, "intermediate_size": 56},
}


def strong_norms(model):
    """Norm weights far from one, of both signs, with an outlier: and still no chaos."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "k_norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2 + 0.5)
                parameter[3] = 5
            elif parameter.ndim == 2:
                parameter /= 2
    return model


def write(view, path):
    """The checkpoint on disk that a view shows, as a stage would write it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(view.config))
    weights = view.load_weights(view.weight_names())
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if "auto_map" in view.config:
        shutil.copy(MODELING_FILE, path)


def loaded(path):
    """The model that transformers makes of it, and nothing of it left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family_name", ROTATABLE)
def test_logits_stay(tmp_path, family_name, variant):
    model = strong_norms(build(family_name, **VARIANTS[variant]))
    model.save_pretrained(tmp_path / "original")
    source = Checkpoint(tmp_path / "original")
    view = rotated(source, seed=0)
    write(view, tmp_path / "rotated")
    turned = loaded(tmp_path / "rotated")
    assert turned.config.model_type == family_name and not turned.config.tie_word_embeddings
    assert difference(logits(turned), logits(model)) < 1e-5
    # Norms are all ones but for those of queries and keys, and no other tensor stays as it is.
    before, after = model.state_dict(), turned.state_dict()
    for name, weight in after.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(weight, before[name])
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        elif name.endswith("weight"):
            assert difference(weight, before[name]) > 0.1


def test_walked_block_by_block_it_says_the_same(models, checkpoints):
    view = rotated(checkpoints("qwen3"), seed=0)
    adapter = ModelAdapter.open(view, dtype=torch.float32, device=torch.device("cpu"))
    assert adapter.unmapped_tensors() == []
    hidden, arguments = adapter.enter(view, TOKENS)
    for index in range(adapter.count):
        block = adapter.load_block(index, view)
        hidden = block(hidden, *arguments[index].positional, **arguments[index].named)
    assert difference(adapter.logits(view, hidden), logits(models("qwen3"))) < 1e-5


@pytest.mark.parametrize("structure", ["first attention", "both kinds"])
def test_without_some_halves(tmp_path, structure):
    model = strong_norms(build("qwen2"))
    original = save(model, STRUCTURES[structure], tmp_path / "original")
    shutil.copy(MODELING_FILE, original.path)
    write(rotated(original, seed=0), tmp_path / "rotated")
    found = logits(loaded(tmp_path / "rotated"))
    assert difference(found, logits(loaded(original.path))) < 1e-5


def test_names_without_the_name_of_the_body(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    assert "embed_tokens.weight" in source.names()
    view = rotated(source, seed=0)
    model.save_pretrained(tmp_path / "full")
    full = rotated(Checkpoint(tmp_path / "full"), seed=0)
    for name, weight in full.load_weights(full.names()).items():
        assert torch.equal(view.load([name.removeprefix("model.")]).popitem()[1], weight)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)])
def test_weights_are_rounded_once(tmp_path, dtype, limit):
    build("llama").to(dtype).save_pretrained(tmp_path / "half")
    build("llama").to(dtype).float().save_pretrained(tmp_path / "whole")
    half, whole = (rotated(Checkpoint(tmp_path / name), seed=0) for name in ("half", "whole"))
    exact = whole.load_weights(whole.names())
    for name, weight in half.load_weights(half.names()).items():
        assert weight.dtype == dtype
        error = (weight.float() - exact[name]).abs()
        assert (error <= torch.finfo(dtype).eps * exact[name].abs() + 1e-7).all()
    write(half, tmp_path / "rotated")
    assert difference(logits(loaded(tmp_path / "rotated")), logits(build("llama"))) < limit


def test_large_tensors_are_rotated_in_parts(tmp_path, monkeypatch):
    build("phi3").save_pretrained(tmp_path)
    view = rotated(Checkpoint(tmp_path), seed=0)
    whole = view.load_weights(view.names())
    monkeypatch.setattr("compresso.models.rotation.CHUNK", 1)
    assert CHUNK > 1
    for name, weight in view.load_weights(view.names()).items():
        assert difference(weight, whole[name]) < 1e-6


def kurtosis(weight):
    """Of the fourth power mean of an entry, relative to that of a normal one: 1 if it is normal."""
    scaled = weight / weight.pow(2).mean().sqrt()
    return scaled.pow(4).mean().item() / 3


def test_outliers_go(tmp_path):
    model = build("llama", hidden_size=96, num_attention_heads=6)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # a few channels of the residual stream are far larger
                weight.normal_(generator=generator)
                stream = (
                    weight.T if name.endswith(("o_proj.weight", "down_proj.weight")) else weight
                )
                stream[:, [5, 70]] *= 30
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    view = rotated(source, seed=0)
    for name in view.names():
        if "norm" not in name:
            before, after = (one.load_weights([name])[name] for one in (source, view))
            assert kurtosis(before) > 8 and kurtosis(after) < 1.5
            assert after.abs().max() < before.abs().max() / 3
            if "norm" not in name and "embed" in name:
                assert difference(after.norm(), before.norm()) < 1e-6


def test_a_tied_head_gets_its_own_weights(checkpoints):
    source = checkpoints("qwen3")  # tied
    view = rotated(source, seed=0)
    assert "lm_head.weight" not in source.names() and "lm_head.weight" in view.names()
    size = view.info("lm_head.weight").nbytes
    assert view.added_bytes == size == view.stored_bytes - source.stored_bytes
    assert view.parameters == source.parameters + size // 4
    assert view.names() == sorted(view.names()) == view.weight_names()
    assert (view.path, view.dtype, view.packed) == (source.path, source.dtype, False)
    keys = {source.key, view.key, rotated(source, seed=1).key}
    assert len(keys) == 3 and rotated(source, seed=0).key == view.key
    assert view.config == {**source.config, "tie_word_embeddings": False}
    assert source.config["tie_word_embeddings"]
    untied = checkpoints("llama")
    assert rotated(untied, seed=0).added_bytes == 0
    assert rotated(untied, seed=0).stored_bytes == untied.stored_bytes


def test_the_seed_decides(checkpoints):
    source = checkpoints("llama")
    name = "model.layers.2.self_attn.v_proj.weight"
    first, again, other = (rotated(source, seed=seed).load([name])[name] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_source_is_left_alone(tmp_path, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(source, "load", lambda names: {name: held[name] for name in names})
    view = rotated(source, seed=0)
    view.load_weights(view.names())
    for name, weight in held.items():
        assert torch.equal(weight, model.get_parameter(name))


REASONS = {
    "gpt2": "subtract the mean",
    "gpt_neox": "subtract the mean",
    "opt": "subtract the mean",
    "gemma2": "passes a norm",
    "gemma3_text": "passes a norm",
    "olmo2": "passes a norm",
}


@pytest.mark.parametrize("family_name", sorted(set(TINY_MODELS) - set(ROTATABLE)))
def test_what_cannot_be_rotated_is_refused(checkpoints, family_name):
    with pytest.raises(ConfigError, match=f"`{family_name}`, cannot be rotated: .*") as caught:
        rotated(checkpoints(family_name), seed=0)
    assert REASONS[family_name] in str(caught.value)
    assert "llama" in caught.value.hint


def test_families_that_nobody_looked_at_are_refused(checkpoints, monkeypatch):
    monkeypatch.setattr("compresso.models.rotation.ROTATABLE", ("qwen2",))
    with pytest.raises(ConfigError, match="not among those known"):
        rotated(checkpoints("llama"), seed=0)


@pytest.mark.parametrize("structure", ["shared", "corrected"])
def test_shared_and_corrected_linears_are_refused(tmp_path, structure):
    source = save(build("llama"), STRUCTURES[structure], tmp_path / "original")
    with pytest.raises(ConfigError, match="blocks with other norms share"):
        rotated(source, seed=0)


def test_packed_weights_are_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    packed = {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(1, 1, dtype=torch.int32)}
    save_file(load_file(tmp_path / "model.safetensors") | packed, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="its weights are packed"):
        rotated(Checkpoint(tmp_path), seed=0)


def with_tensor(path, name, config=None):
    """A tiny Llama with one tensor more."""
    build("llama").save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    if name is not None:
        save_file(tensors | {name: torch.ones(2)}, path / "model.safetensors")
    if config is not None:
        stored = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(stored | config))
    return Checkpoint(path)


@pytest.mark.parametrize(
    "name", [f"model.layers.{BLOCKS}.self_attn.q_proj.weight", "model.layers.0.gate.weight"]
)
def test_tensors_of_unknown_use_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"nobody knows what that makes of `{name}`"):
        rotated(with_tensor(tmp_path, name), seed=0)


def test_old_rotary_tables_are_carried(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    view = rotated(with_tensor(tmp_path, name), seed=0)
    assert torch.equal(view.load([name])[name], torch.ones(2))


def test_a_wrong_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"invalid config\.json: "):
        rotated(with_tensor(tmp_path, None, {"num_hidden_layers": "many"}), seed=0)


def test_absent_tensors_are_refused(checkpoints):
    view = rotated(checkpoints("llama"), seed=0)
    with pytest.raises(CheckpointError, match=r"no tensor `model\.nothing`"):
        view.load(["model.nothing"])


def test_every_family_is_rotated_or_refused():
    assert all(family_of(name) for name in ROTATABLE)
    assert set(ROTATABLE) | set(REASONS) == set(TINY_MODELS)
