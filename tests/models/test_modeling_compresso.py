"""Restructured models compute what stock models do whose halves are silent and weights copied."""

import copy
import pickle

import pytest
import torch
from restructured import STRUCTURES, linears, reference, save, scalars
from tiny_models import BLOCKS, build, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache, cache_utils
from walking import difference

from compresso.families import family_of
from compresso.models import modeling_compresso
from compresso.models.structure import MODELING_FILES, Structure

IDS = tokens(2, 20)
NEW = 8


def load(checkpoint, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, output_loading_info=True, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def restructured(name, structure, path, **changes):
    """The model of a restructured checkpoint, loaded as users load it."""
    return load(save(build(name, **changes), structure, path / "restructured"))


def generate(model, **options):
    """Greedy tokens, and the logits of each."""
    found = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits), found.past_key_values


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", STRUCTURES)
def test_logits_and_generation(family_name, kind, tmp_path):
    structure = STRUCTURES[kind]
    model = restructured(family_name, structure, tmp_path)
    expected = logits(reference(family_name, structure))
    exact = not structure.corrected
    assert difference(logits(model), expected) <= (0 if exact else 2e-5)
    assert difference(logits(build(family_name)), expected) > 1e-3
    tokens_without, logits_without, _ = generate(model, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        tokens_with, logits_with, cache = generate(model, **options)
        assert torch.equal(tokens_with, tokens_without)
        assert difference(logits_with, logits_without) < 1e-4
        empty = [index for index, layer in enumerate(cache.layers) if layer.keys is None]
        assert empty == list(structure.no_attention) and len(cache.layers) == BLOCKS


@pytest.mark.parametrize("kind", STRUCTURES)
def test_one_copy_on_disk_and_in_memory(family_name, kind, tmp_path):
    structure = STRUCTURES[kind]
    checkpoint = save(build(family_name), structure, tmp_path / "restructured")
    model = load(checkpoint)
    stock, family = build(family_name), family_of(family_name)
    expected = scalars(stock)
    for index, block in enumerate(stock.get_submodule(family.blocks)):
        gone = [*linears(family)] if structure.owner(index) != index else []
        if index in structure.no_attention:
            gone += [family.attention, *family.attention_norms]
        if index in structure.no_mlp:
            gone += [*family.mlp, *family.mlp_norms]
        parameters = {p for path in gone for p in block.get_submodule(path).parameters()}
        expected -= sum(parameter.numel() for parameter in parameters)
    added = [p for name, p in model.named_parameters() if "correction" in name]
    assert scalars(model) - sum(p.numel() for p in added) == expected
    assert checkpoint.parameters == scalars(model)
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["everything", "both kinds"])
def test_saving_and_loading_again(family_name, kind, tmp_path):
    model = restructured(family_name, STRUCTURES[kind], tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = load(type("Saved", (), {"path": tmp_path / "again"}))
    assert torch.equal(logits(again), logits(model))
    assert sorted(again.state_dict()) == sorted(model.state_dict())
    assert again.config.compresso == model.config.compresso
    for file in MODELING_FILES:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


MIXED = ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("name", MIXED)
def test_all_attentions_of_one_type_removed(name, kind, tmp_path):
    types = build(name).config.layer_types
    gone = tuple(index for index, found in enumerate(types) if found == kind)
    assert 0 < len(gone) < BLOCKS
    structure = Structure(no_attention=gone)
    model = restructured(name, structure, tmp_path)
    assert torch.equal(logits(model), logits(reference(name, structure)))
    expected = generate(model, use_cache=False)[0]
    assert torch.equal(generate(model)[0], expected)
    assert torch.equal(generate(model, cache_implementation="static")[0], expected)


def test_each_use_of_a_shared_block_has_its_own_cache(tmp_path):
    model = restructured("llama", STRUCTURES["shared"], tmp_path)
    cache = generate(model)[2]
    assert cache.layers[0].keys.shape == cache.layers[1].keys.shape
    assert difference(cache.layers[0].keys, cache.layers[1].keys) > 0.01


def test_attention_that_is_not_sdpa(tmp_path):
    structure = STRUCTURES["everything"]
    checkpoint = save(build("llama"), structure, tmp_path / "restructured")
    eager = load(checkpoint, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert load(checkpoint).config._attn_implementation == "sdpa"
    assert difference(logits(eager), logits(load(checkpoint))) < 1e-5
    attentions = eager(IDS, output_attentions=True).attentions
    assert len(attentions) == BLOCKS - len(structure.no_attention)


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_uses(name, tmp_path):
    structure = STRUCTURES["shared"]
    found = gradients(restructured(name, structure, tmp_path))
    expected = gradients(reference(name, structure))
    family = family_of(name)
    for path in linears(family):
        for owner, users in {0: [0, 1], 2: [2], 3: [3, 4, 5]}.items():
            weight = f"{family.blocks}.{{}}.{path}.weight"
            total = sum(expected[weight.format(user)] for user in users)
            assert difference(found[weight.format(owner)], total) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_gradient_checkpointing_changes_no_gradient(name, tmp_path):
    changes = {"opt": {"dropout": 0.0}}.get(name, {})
    model = restructured(name, STRUCTURES["everything"], tmp_path, **changes).train()
    expected = gradients(model)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model)
        assert all(difference(found[n], g) < 1e-5 for n, g in expected.items() if g.any())


def test_compiled_as_one_graph(tmp_path):
    structure = STRUCTURES["everything"]
    model = restructured("llama", structure, tmp_path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(IDS, use_cache=False).logits, logits(model)) < 1e-5
        cache = StaticCache(config=model.config, max_cache_len=32)
        compiled(IDS[:, :12], past_key_values=cache)
        rest = compiled(IDS[:, 12:], past_key_values=cache).logits
    assert difference(rest, logits(model)[:, 12:]) < 1e-5


def test_copies_and_pickles_share_among_themselves(tmp_path):
    model = restructured("llama", STRUCTURES["everything"], tmp_path)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
        assert torch.equal(logits(copied), expected)
        copied.model.layers[0].mlp.up_proj.weight.data.zero_()
        assert difference(logits(copied), expected) > 1e-3
        model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)


def test_classes_are_made_for_any_base_and_once():
    config_class = modeling_compresso.CompressoMixtralConfig
    assert config_class is modeling_compresso.CompressoMixtralConfig
    assert config_class.model_type == "compresso_mixtral"
    model_class = modeling_compresso.CompressoMixtralForCausalLM
    assert model_class.config_class is config_class
    for name in ("CompressoNothingConfig", "CompressoBertViT", "CompressoCLIPForCausalLM", "Other"):
        with pytest.raises(AttributeError, match=f"no attribute `{name}`"):
            getattr(modeling_compresso, name)


def test_a_config_without_a_structure_is_refused():
    config = modeling_compresso.CompressoLlamaConfig(**LlamaConfig().to_dict())
    assert config.kv_sharing_modes is None
    with pytest.raises(ValueError, match="config of CompressoLlamaForCausalLM has no `compresso`"):
        modeling_compresso.CompressoLlamaForCausalLM(config)


@pytest.mark.parametrize(
    "changes", [{"shared": [0, 0]}, {"corrected": [6]}, {"shared": [0, 1, 2, 3, 4, 6]}]
)
def test_a_structure_of_another_number_of_blocks_is_refused(changes, tmp_path):
    checkpoint = save(build("llama"), STRUCTURES["corrected"], tmp_path / "restructured")
    config = load(checkpoint).config
    config.compresso |= changes
    with pytest.raises(ValueError, match="is not about a model of 6 blocks"):
        AutoModelForCausalLM.from_config(config)


def test_an_older_transformers_is_named(monkeypatch, tmp_path):
    checkpoint = save(build("llama"), STRUCTURES["shared"], tmp_path / "restructured")
    monkeypatch.delattr(cache_utils, "DummyLayer")
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or later, not 5\."):
        load(checkpoint)
