"""Dropping blocks gives the model that transformers would compute without them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import BLOCKS, build, tokens
from transformers import AutoModelForCausalLM
from walking import Identity

from compresso.errors import ConfigError
from compresso.families import Family, family_of
from compresso.models.depth import drop_blocks, rename_blocks
from compresso.models.substitution import replaced

KEEP = [0, 2, 3, 5]
IDS = tokens(2, 20)
GENERATED = 8


def without_blocks(model, family):
    """The full model with the dropped blocks doing nothing: no config is edited for it."""
    gone = [index for index in range(BLOCKS) if index not in KEEP]
    return replaced(model, {f"{family.blocks}.{index}": Identity() for index in gone})


def reload_without(config, model, family, path):
    """Write the pruned checkpoint and load it by its path alone."""
    new = drop_blocks(config, family, KEEP)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        del state[name]
    names = rename_blocks(state, prefix=f"{family.blocks}.", count=BLOCKS, keep=KEEP)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(new))
    stored = {new_name: state[name] for name, new_name in names.items()}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def greedy(model, ids):
    """Greedy generation without a cache."""
    for _ in range(GENERATED):
        scores = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, *, use_cache):
    return model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=GENERATED,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
    )


@torch.no_grad()
def test_a_pruned_checkpoint_computes_what_the_blocks_left_over_do(models, family_name, tmp_path):
    family, model = family_of(family_name), models(family_name)
    loaded = reload_without(model.config.to_diff_dict(), model, family, tmp_path / "pruned")
    with without_blocks(model, family):
        expected, expected_ids = model(IDS, use_cache=False).logits, greedy(model, IDS)
    assert (loaded(IDS, use_cache=False).logits - expected).abs().max() == 0
    assert torch.equal(generate(loaded, use_cache=True), expected_ids)
    assert torch.equal(generate(loaded, use_cache=False), expected_ids)
    full = model(IDS, use_cache=False).logits
    assert (full - expected).abs().max() > 0.01  # the dropped blocks did something


# How checkpoints on the hub leave the lists out, for transformers to make them from a rule.
RULES = {
    "qwen2": ("layer_types",),
    "qwen3": ("layer_types",),
    "gemma2": ("layer_types",),
    "gemma3_text": ("layer_types", "_sliding_window_pattern"),
    "smollm3": ("layer_types", "no_rope_layers"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_lists_made_from_a_rule_are_written_out(models, name, tmp_path):
    family, model = family_of(name), models(name)
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in RULES[name]}
    if name == "gemma3_text":
        config["sliding_window_pattern"] = 3
    loaded = reload_without(config, model, family, tmp_path / "pruned")
    with without_blocks(model, family):
        expected = model(IDS, use_cache=False).logits
    assert (loaded(IDS, use_cache=False).logits - expected).abs().max() == 0
    assert loaded.config.layer_types == [model.config.layer_types[index] for index in KEEP]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3_text", "smollm3"])
def test_cutting_a_list_short_would_be_noticed(models, name, tmp_path):
    family, model = family_of(name), models(name)
    loaded = reload_without(model.config.to_diff_dict(), model, family, tmp_path / "pruned")
    right = loaded(IDS, use_cache=False).logits
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    for field in family.block_lists:
        config[field] = getattr(model.config, field)[: len(KEEP)]
    (tmp_path / "pruned" / "config.json").write_text(json.dumps(config))
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert (wrong(IDS, use_cache=False).logits - right).abs().max() > 1e-3


def test_the_config_is_otherwise_left_alone():
    config = {**build("qwen2").config.to_diff_dict(), "note": {"any": [1, 2]}}
    before = json.dumps(config)
    new = drop_blocks(config, family_of("qwen2"), KEEP)
    assert json.dumps(config) == before
    changed = {name for name in config if new[name] != config[name]}
    assert changed == {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert new["max_window_layers"] == 2
    assert new["num_hidden_layers"] == 4


def test_a_second_word_for_the_count_does_not_survive():
    config = build("gpt2").config.to_diff_dict()
    config["num_hidden_layers"] = config.pop("n_layer")
    new = drop_blocks(config, family_of("gpt2"), KEEP)
    assert new["n_layer"] == 4 and "num_hidden_layers" not in new


def test_lists_of_indices_are_renumbered():
    config = {**build("llama").config.to_diff_dict(), "odd_blocks": [1, 3, 5]}
    new = drop_blocks(config, Family(index_lists=("odd_blocks",)), KEEP)
    assert new["odd_blocks"] == [2, 3]


def test_a_list_that_nobody_knows_is_an_error():
    config = {**build("llama").config.to_diff_dict(), "strange": list("abcdef")}
    with pytest.raises(
        ConfigError, match=r"`strange` in config\.json may hold one entry per block"
    ):
        drop_blocks(config, family_of("llama"), KEEP)


def test_a_list_that_is_too_short_is_an_error():
    config = {**build("smollm3").config.to_diff_dict(), "no_rope_layers": [1, 0]}
    with pytest.raises(ConfigError, match=r"`no_rope_layers` in config\.json has 2 entries, not 6"):
        drop_blocks(config, family_of("smollm3"), KEEP)


def test_maths_that_depends_on_the_index_is_refused():
    config = build("gpt2", scale_attn_by_inverse_layer_idx=True).config.to_diff_dict()
    with pytest.raises(ConfigError, match="`scale_attn_by_inverse_layer_idx` is true"):
        drop_blocks(config, family_of("gpt2"), KEEP)
    assert drop_blocks(config, family_of("gpt2"), [0, 1, 2])["n_layer"] == 3


def test_settings_of_single_blocks_are_refused():
    config = {**build("llama").config.to_diff_dict(), "per_layer_config": {"1": {"skip": ["mlp"]}}}
    with pytest.raises(ConfigError, match="`per_layer_config` is not supported"):
        drop_blocks(config, family_of("llama"), KEEP)


@pytest.mark.parametrize("keep", [[], [2, 1], [0, 0], [0, 6]])
def test_blocks_to_keep_must_ascend(keep):
    with pytest.raises(ValueError, match="must ascend"):
        drop_blocks(build("llama").config.to_diff_dict(), family_of("llama"), keep)


def test_names_are_renumbered():
    names = ["h.0.w", "h.1.w", "h.2.attn.bias", "h.10.w", "h.3.w", "wte.w", "h.norm.w"]
    assert rename_blocks(names, prefix="h.", count=10, keep=[0, 2, 3]) == {
        "h.0.w": "h.0.w",
        "h.2.attn.bias": "h.1.attn.bias",
        "h.3.w": "h.2.w",
        "h.10.w": "h.3.w",
        "wte.w": "wte.w",
        "h.norm.w": "h.norm.w",
    }
