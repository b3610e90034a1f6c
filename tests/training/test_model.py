"""A whole model in memory: what it says, what trains, and that codes stay codes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from coding import affine, save_coded, vector
from restructured import STRUCTURES, reference, save
from tiny_models import BLOCKS, build, tokens

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.families import family_of
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.recipe import make_step
from compresso.runtime import make_runtime
from compresso.settings import RuntimeSettings
from compresso.stages.quantize import quantize
from compresso.training import packed_product
from compresso.training.model import TrainingModel

TOKENS = tokens(2, 20, seed=3)
SHAPES = {"last mlp", "shared", "corrected", "everything"}


def opened(source, dtype=torch.float32):
    return ModelAdapter.open(source, dtype=dtype, device=torch.device("cpu"))


def paths_of(adapter, source):
    ends = tuple(f".{path}.weight" for path in adapter.family.all_linears)
    return [name.removesuffix(".weight") for name in source.weight_names() if name.endswith(ends)]


def said(model):
    return model.logits(model.hidden(TOKENS))


def factors(source, paths, rank=3, seed=4):
    """Random corrections of linears."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path in paths:
        rows, columns = source.weight_info(f"{path}.weight").shape
        if family_of(source.config["model_type"]).transposed:
            rows, columns = columns, rows
        up = torch.randn(rows, rank, generator=generator) / 8
        found[path] = LowRank(up, torch.randn(rank, columns, generator=generator) / 8)
    return found


@torch.no_grad()
def test_it_says_what_the_model_says(checkpoints, models, family_name):
    source = checkpoints(family_name)
    adapter = opened(source)
    expected = models(family_name)(TOKENS).logits
    with TrainingModel(adapter, source) as model:
        assert torch.equal(said(model), expected)
        model.add_low_rank(paths_of(adapter, source), 4, seed=0)
        model.train_tensors(source.weight_names())
        assert torch.equal(said(model), expected)
    assert all(parameter.is_meta for parameter in adapter.model.parameters())
    with TrainingModel(adapter, source) as model:  # leaving took back all that was changed
        assert torch.equal(said(model), expected)
        assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


@torch.no_grad()
def test_what_trains_is_used_as_it_will_be_stored(tmp_path):
    build("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    adapter = opened(source, torch.bfloat16)
    with TrainingModel(adapter, source) as model:
        expected = said(model)
        masters = model.train_tensors(source.weight_names())
        assert all(master.dtype == torch.float32 for master in masters)
        assert torch.equal(said(model), expected)
        for master in masters:
            master.mul_(1 + 2**-12)  # lost in bfloat16
        assert torch.equal(said(model), expected)
        stored = source.load(source.names())
        for name, tensor in model.trained_tensors().items():
            assert torch.equal(tensor, stored[name])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_corrections_are_what_merged_weights_are(checkpoints, family):
    source = checkpoints(family)
    adapter = opened(source)
    start = factors(source, paths_of(adapter, source))
    whole = build(family)
    for path, factor in start.items():
        parameter = whole.get_parameter(f"{path}.weight")
        product = factor.product()
        parameter.add_(product.T if adapter.family.transposed else product)
    with TrainingModel(adapter, source) as model:
        model.add_low_rank(start, 3, alpha=7.0, seed=0, start=start)
        torch.testing.assert_close(said(model), whole(TOKENS).logits, atol=2e-4, rtol=1e-4)
        for path, factor in model.low_ranks().items():
            torch.testing.assert_close(factor.product(), start[path].product())


def test_a_correction_begins_as_nothing_and_by_its_seed(checkpoints):
    source = checkpoints("llama")
    adapter = opened(source)
    paths = paths_of(adapter, source)
    downs = []
    for seed in (0, 0, 1):
        with TrainingModel(adapter, source) as model:
            found = model.add_low_rank(paths, 4, seed=seed)
            assert len(found) == 2 * len(paths)
            assert all(one.requires_grad and one.dtype == torch.float32 for one in found)
            assert sum(parameter.numel() for parameter in found) == model.trained_parameters()
            assert all(not factor.up.any() for factor in model.low_ranks().values())
            downs.append([factor.down for factor in model.low_ranks().values()])
    assert all(torch.equal(*pair) for pair in zip(downs[0], downs[1], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(downs[0], downs[2], strict=True))


@torch.no_grad()
def test_pooled_corrections_see_sums_of_inputs(checkpoints):
    source = checkpoints("llama")
    adapter = opened(source)
    path = "model.layers.1.self_attn.q_proj"
    small = LowRank(torch.randn(64, 2) / 8, torch.randn(2, 8) / 8)
    wide = LowRank(small.up, small.down.repeat_interleave(8, 1))
    answers = []
    for factor, pooled in ((small, 8), (wide, None)):
        with TrainingModel(adapter, source) as model:
            model.add_low_rank([path], 2, seed=0, start={path: factor}, pooled=pooled)
            answers.append(said(model))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dropout_leaves_out_inputs_only_in_training(checkpoints):
    source = checkpoints("llama")
    adapter = opened(source)
    start = factors(source, paths_of(adapter, source))
    with TrainingModel(adapter, source) as model:
        model.add_low_rank(start, 3, dropout=0.5, seed=0, start=start)
        expected = said(model)
        assert torch.equal(said(model), expected)
        model.training(True)
        assert not torch.allclose(said(model), expected)
        model.training(False)
        assert torch.equal(said(model), expected)


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restructured_models_are_run_and_share_what_they_share(tmp_path, family, name):
    source = save(build(family), STRUCTURES[name], tmp_path / "source")
    adapter = opened(source)
    expected = reference(family, STRUCTURES[name])(TOKENS).logits
    paths = paths_of(adapter, source)
    with TrainingModel(adapter, source) as model:
        torch.testing.assert_close(said(model), expected, atol=1e-4, rtol=1e-4)
        low_rank = model.add_low_rank(paths, 2, seed=0)
        weights = model.train_tensors([f"{path}.weight" for path in paths])
        said(model).square().mean().backward()
        assert all(weight.grad is not None for weight in weights)
        assert all(factor.grad is not None for factor in low_rank)
        used = {id(parameter) for parameter in adapter.model.parameters()}
        assert used >= {id(parameter) for parameter in [*weights, *low_rank]}


@torch.no_grad()
def test_a_shared_correction_counts_for_every_user(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "source")
    adapter = opened(source)
    start = factors(source, paths_of(adapter, source))
    whole = build("llama")
    for block, owner in enumerate(STRUCTURES["shared"].shared):
        for path in adapter.family.all_linears:
            product = start[f"model.layers.{owner}.{path}"].product()
            owned = whole.get_parameter(f"model.layers.{owner}.{path}.weight")
            if block == owner:
                owned.add_(product)
            whole.get_parameter(f"model.layers.{block}.{path}.weight").copy_(owned)
    with TrainingModel(adapter, source) as model:
        model.add_low_rank(start, 3, seed=0, start=start)
        torch.testing.assert_close(said(model), whole(TOKENS).logits, atol=2e-4, rtol=1e-4)


def quantized(tmp_path, method, **settings):
    """What the quantize stage writes, without its proof."""
    build("llama", intermediate_size=128).save_pretrained(tmp_path / "dense")
    source = Checkpoint(tmp_path / "dense")
    step = make_step("quantize", {"method": method, **settings}, where="test")
    runtime = make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
    with CheckpointWriter(tmp_path / "packed", key="test", parts=BLOCKS + 1) as writer:
        report = quantize(source, step, None, writer, runtime)
        writer.finalize(config=report.config, side_files={}, expected=report.expected)
        writer.publish()
    return Checkpoint(tmp_path / "packed")


CODES = {
    "uniform": lambda path: quantized(path, "rtn", bits=3, group_size=32),
    "asymmetric": lambda path: quantized(path, "rtn", bits=2, group_size=32, symmetric=False),
    "nf4": lambda path: quantized(path, "nf4"),
    "int8": lambda path: quantized(path, "int8"),
    "affine": lambda path: save_coded(build("llama"), path, affine(3)).coded,
    "vector, transposed": lambda path: save_coded(build("gpt2"), path, vector()).coded,
    "shared": lambda path: (
        save_coded(build("llama"), path, affine(3), structure=STRUCTURES["everything"]).coded
    ),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_stay_codes_and_give_what_their_weights_give(tmp_path, monkeypatch, kind):
    source = CODES[kind](tmp_path)
    adapter = opened(source)
    paths = list(source.packing.shapes)
    start = factors(source, paths)
    decode, decoded = packed_product.PackedWeight.decode, []
    monkeypatch.setattr(
        packed_product.PackedWeight, "decode", lambda self: decoded.append(self) or decode(self)
    )
    found, held = [], []
    for packed in (False, True):
        with TrainingModel(adapter, source, packed=packed) as model:
            low_rank = model.add_low_rank(paths, 3, seed=0, start=start)
            logits = said(model)
            logits.square().mean().backward()
            found.append([logits.detach(), *(factor.grad for factor in low_rank)])
            held.append(sum(parameter.numel() for parameter in adapter.model.parameters()))
    assert (
        len(decoded) > len({id(weight) for weight in decoded}) == len(paths)
    )  # also on the way back
    dense = sum(rows * columns for rows, columns in source.packing.shapes.values())
    assert held[0] - held[1] == dense
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    assert all(parameter.is_meta for parameter in adapter.model.parameters())
    adapter.load_block(0, source)


def test_codes_cannot_be_trained(tmp_path):
    source = CODES["uniform"](tmp_path)
    model = TrainingModel(opened(source), source, packed=True)
    with model, pytest.raises(ValueError, match="stored as codes"):
        model.train_tensors(["model.layers.0.mlp.up_proj.weight"])


def test_kernels_of_bitsandbytes_give_what_decoding_gives(tmp_path):
    for bits in (None, 8):
        source = quantized(tmp_path / str(bits), "nf4", scale_bits=bits)
        path = "model.layers.1.mlp.down_proj"
        weight = packed_product.PackedWeight(
            source, path, transposed=False, dtype=torch.float32, device=torch.device("cpu")
        )
        parts = source.load(source.packing.names(path))
        found = []
        for kernel in (None, packed_product.four_bit_kernel(path, parts)):
            weight.kernel = kernel
            inputs = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
            inputs.requires_grad_()
            output = packed_product.product(inputs, weight, torch.ones(64))
            output.square().sum().backward()
            found += [(output.detach(), inputs.grad)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("again", "compiled"), [(True, False), (False, True), (True, True)])
def test_blocks_run_otherwise_give_the_same(checkpoints, monkeypatch, again, compiled):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    source = checkpoints("llama")
    adapter = opened(source)
    paths = paths_of(adapter, source)
    found = []
    for changed in (False, True):
        with TrainingModel(adapter, source) as model:
            low_rank = model.add_low_rank(paths, 2, seed=0)
            if changed:
                model.run_blocks(again=again, compiled=compiled)
            logits = said(model)
            logits.square().mean().backward()
            found.append([logits.detach(), *(factor.grad for factor in low_rank)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert not any("forward" in vars(module) for module in adapter.model.modules())
