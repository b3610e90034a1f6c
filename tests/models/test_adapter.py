"""The adapter finds, fills, runs and frees the parts of every family's model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, build, tokens
from walking import difference, real

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.models.adapter import ModelAdapter

CPU = torch.device("cpu")
IDS = tokens(2, 20)


def opened(source, dtype=torch.float32):
    return ModelAdapter.open(source, dtype=dtype, device=CPU)


def saved(path, model, *, rename=lambda name: name, extra=None, without=()):
    """Save a model's tensors under other names, with further ones or without some."""
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    state = {rename(name): tensor for name, tensor in state.items() if name not in without}
    save_file({**state, **(extra or {})}, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)


def run(adapter, source, ids):
    """Logits, block by block."""
    hidden, arguments = adapter.enter(source, ids)
    for index in range(adapter.count):
        block = adapter.load_block(index, source)
        hidden = block(hidden, *arguments[index].positional, **arguments[index].named)
        adapter.unload_block(index)
    return adapter.logits(source, hidden)


def test_logits_are_the_models_own(models, checkpoints, family_name):
    source = checkpoints(family_name)
    with torch.no_grad():
        expected = models(family_name)(IDS, use_cache=False).logits
    found = run(opened(source), source, IDS)
    assert found.dtype == torch.float32
    assert difference(found, expected) < 1e-5


def test_the_embeddings_are_what_block_0_gets(models, checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    given = []
    first = models(family_name).get_submodule(adapter.family.blocks)[0]
    handle = first.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    models(family_name)(IDS, use_cache=False)
    handle.remove()
    assert torch.equal(adapter.enter(source, IDS)[0], given[0])
    assert adapter.enter(source, IDS)[0].shape == (2, 20, 64)


def test_every_tensor_has_its_place(models, checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    assert adapter.count == BLOCKS
    inside = [name for index in range(BLOCKS) for name in adapter.block_tensors(index)]
    assert sorted(inside + adapter.outside_tensors()) == source.names()
    assert adapter.unmapped_tensors() == []
    for index in range(BLOCKS):
        prefix = adapter.block_prefix(index)
        assert prefix == f"{adapter.family.blocks}.{index}."
        assert all(name.startswith(prefix) for name in adapter.block_tensors(index))


def test_weights_are_there_only_while_loaded(models, checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    assert real(adapter) == []
    adapter.enter(source, IDS)[0]
    assert not any(".1." in name or name.startswith("lm_head") for name in real(adapter))
    adapter.unload_outside()
    assert real(adapter) == []
    block = adapter.load_block(3, source)
    reference = models(family_name).get_submodule(adapter.family.blocks)[3].state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in block.state_dict().items())
    prefix = f"{adapter.family.blocks}.3."
    assert real(adapter) and all(name.startswith(prefix) for name in real(adapter))
    adapter.unload_block(3)
    assert real(adapter) == []


def test_the_type_to_compute_in_is_not_the_stored_one(models, checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source, torch.bfloat16)
    reference = type(models(family_name)).from_pretrained(source.path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits.float()
    assert {p.dtype for p in adapter.load_block(0, source).parameters()} == {torch.bfloat16}
    assert difference(run(adapter, source, IDS), expected) == 0


def test_weights_are_out_by_in_whichever_way_they_are_stored(checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    block = adapter.load_block(1, source)
    for path in (path for group in adapter.family.linears for path in group):
        weight, linear = adapter.weight(block, path), block.get_submodule(path)
        inputs = torch.randn(3, weight.shape[1])
        bias = 0 if linear.bias is None else linear.bias
        torch.testing.assert_close(linear(inputs), inputs @ weight.T + bias)
        new = torch.randn(weight.shape)
        adapter.set_weight(block, path, new)
        kept = new.clone()
        new.zero_()
        assert torch.equal(adapter.weight(block, path), kept)
        torch.testing.assert_close(linear(inputs), inputs @ kept.T + bias)
    with pytest.raises(ValueError, match="cannot take a weight of shape"):
        adapter.set_weight(block, path, torch.zeros(3, 5))


def test_a_block_can_be_filled_from_given_tensors(checkpoints):
    source = checkpoints("llama")
    adapter = opened(source)
    given = {name: torch.ones(source.info(name).shape) for name in adapter.block_tensors(2)}
    block = adapter.load_block(2, source, {**given, "lm_head.weight": torch.zeros(1)})
    adapter.set_weight(block, "mlp.down_proj", torch.zeros(64, 96))
    assert all(tensor.eq(1).all() for tensor in given.values())
    assert block.self_attn.q_proj.weight.eq(1).all() and block.mlp.down_proj.weight.eq(0).all()


OLD_BUFFERS = {
    "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.5.attn.bias": torch.ones(1)},
    "opt": {},
}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_the_prefix_of_the_base_model_may_be_missing(models, name, tmp_path):
    prefix = f"{models(name).base_model_prefix}."
    source = saved(
        tmp_path / "bare",
        models(name),
        rename=lambda stored: stored.removeprefix(prefix),
        extra=OLD_BUFFERS[name],
    )
    adapter = opened(source)
    assert adapter.unmapped_tensors() == sorted(OLD_BUFFERS[name])
    assert adapter.block_prefix(4) == f"{adapter.family.blocks.removeprefix(prefix)}.4."
    assert all(stored.startswith(adapter.block_prefix(4)) for stored in adapter.block_tensors(4))
    with torch.no_grad():
        expected = models(name)(IDS, use_cache=False).logits
    assert difference(run(adapter, source, IDS), expected) < 1e-5


def test_the_head_may_have_its_old_name(models, checkpoints, tmp_path):
    assert "embed_out.weight" in checkpoints("gpt_neox").names()  # as transformers writes it
    source = saved(
        tmp_path / "new", models("gpt_neox"), rename=lambda n: n.replace("embed_out", "lm_head")
    )
    assert "lm_head.weight" in opened(source).outside_tensors()


def test_buffers_of_old_checkpoints_are_listed(models, tmp_path):
    old = {f"gpt_neox.layers.1.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    adapter = opened(saved(tmp_path / "old", models("gpt_neox"), extra=old))
    assert adapter.unmapped_tensors() == sorted(old)
    assert len(adapter.block_tensors(1)) == len(adapter.block_tensors(0)) == 12


def test_a_tied_head_shares_the_embedding(models, checkpoints):
    source = checkpoints("qwen3")
    assert "lm_head.weight" not in source.names()
    adapter = opened(source)
    adapter.enter(source, IDS)[0]
    adapter.logits(source, torch.zeros(1, 2, 64))
    assert adapter.model.lm_head.weight is adapter.model.model.embed_tokens.weight
    assert adapter.outside_tensors() == ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("stored_as", ["head only", "both, different"])
def test_tied_tensors_are_read_as_transformers_reads_them(models, tmp_path, stored_as):
    table = models("qwen3").model.embed_tokens.weight.detach()
    if stored_as == "head only":
        gone, extra = ("model.embed_tokens.weight",), {"lm_head.weight": table.clone()}
    else:
        gone, extra = (), {"lm_head.weight": table.flip(0).contiguous()}
    source = saved(tmp_path / "tied", models("qwen3"), extra=extra, without=gone)
    reference = type(models("qwen3")).from_pretrained(source.path).eval()
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
        tied = models("qwen3")(IDS, use_cache=False).logits
    assert ((expected - tied).abs().max() == 0) == (stored_as == "head only")
    found = run(opened(source), source, IDS)
    assert difference(found, expected) < 1e-5


def test_the_head_can_be_replaced(models, checkpoints):
    source = checkpoints("gpt_neox")
    adapter = opened(source)
    assert not adapter.tied
    assert adapter.head_tensor == "embed_out.weight"
    hidden = torch.randn(2, 5, 64)
    before, weight = adapter.logits(source, hidden), torch.randn(128, 64)
    adapter.set_head(weight)
    after = adapter.logits(source, hidden)
    assert difference(after, adapter.head_input(source, hidden) @ weight.T) < 1e-5
    assert difference(after, before) > 0.1
    tied = opened(checkpoints("qwen3"))
    assert tied.tied
    assert tied.head_tensor == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match="a tied head"):
        tied.set_head(weight)


def test_the_head_reads_the_last_norm(models, checkpoints, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    norm = models(family_name).get_submodule(adapter.family.final_norm)
    hidden = torch.randn(2, 5, 64)
    assert difference(adapter.head_input(source, hidden), norm(hidden)) == 0
    assert all(name.startswith(adapter.family.body) for name in real(adapter))


def test_another_source_is_not_confused_with_the_first(models, checkpoints, tmp_path):
    first, adapter = checkpoints("llama"), opened(checkpoints("llama"))
    adapter.enter(first, IDS)[0]
    other = saved(
        tmp_path / "other",
        models("llama"),
        extra={"model.embed_tokens.weight": torch.ones(128, 64)},
    )
    assert adapter.enter(other, IDS)[0].eq(1).all()


def test_a_missing_tensor_is_named(models, tmp_path):
    gone = "model.layers.2.mlp.up_proj.weight"
    source = saved(tmp_path / "holes", models("llama"), without=(gone,))
    with pytest.raises(CheckpointError, match=f"has no tensor `{gone}`"):
        opened(source)


def test_a_wrong_shape_is_named(models, tmp_path):
    extra = {"model.layers.2.mlp.up_proj.weight": torch.zeros(5, 64)}
    source = saved(tmp_path / "shape", models("llama"), extra=extra)
    with pytest.raises(CheckpointError, match=r"up_proj.weight` in .*\(5, 64\).*\(96, 64\)"):
        opened(source)


def test_a_config_that_makes_no_sense_is_the_checkpoints_fault(models, tmp_path):
    source = saved(tmp_path / "config", models("llama"))
    config = {**source.config, "num_attention_heads": 5}
    (source.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has an invalid config\.json: .*attention"):
        opened(Checkpoint(source.path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "`do_layer_norm_before` false"),
        ("opt", {"_remove_final_layer_norm": True}, "`_remove_final_layer_norm` true"),
        ("opt", {"word_embed_proj_dim": 32}, "projected embeddings"),
        ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` true"),
    ],
)
def test_variants_that_cannot_work_are_refused(tmp_path, name, changes, message):
    source = saved(tmp_path / "variant", build(name, **changes))
    with pytest.raises(ConfigError, match=f"`{name}` with {message}.* not supported"):
        opened(source)


def test_an_unknown_family_is_refused(models, tmp_path):
    source = saved(tmp_path / "unknown", models("llama"))
    config = {**source.config, "model_type": "from-the-future"}
    (source.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unsupported architecture: `from-the-future`"):
        opened(Checkpoint(source.path))
