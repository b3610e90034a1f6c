"""Coded checkpoints compute exactly what dense ones of the decoded weights do."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from coding import KINDS, affine, eight, is_symmetric, save_coded, uniform, vector
from restructured import STRUCTURES, scalars
from tiny_models import BLOCKS, build, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from walking import PROBE, difference

from compresso.calibration.replay import replay
from compresso.checkpoint.coded import describe, pack
from compresso.checkpoint.proof import Fingerprint, prove
from compresso.checkpoint.reader import Checkpoint
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter
from compresso.models.coded_linear import CodedLinear
from compresso.models.structure import (
    MODELING_FILES,
    Structure,
    needs_code,
    restructure,
    structure_of,
)

IDS = tokens(2, 20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(path, **options):
    options = {"dtype": "auto", **options}
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def generate(model, **options):
    mask = torch.ones_like(IDS)
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **options
    )


def coded_linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, CodedLinear)}


def assert_same(found, expected, family):
    """Bit for bit, but where the product is one of another layout."""
    if family.transposed:
        assert difference(found.float(), expected.float()) < 1e-5
    else:
        assert torch.equal(found, expected)


def test_every_family(family_name, tmp_path):
    model = build(family_name)
    head = not model.config.tie_word_embeddings
    pair = save_coded(model, tmp_path, [vector(), affine()], head=head)
    family = family_of(family_name)
    found, dense = load(pair.coded.path), load(pair.dense.path)
    assert len(coded_linears(found)) == BLOCKS * len(family.all_linears) + head
    assert structure_of(pair.coded.config) == Structure() and needs_code(pair.coded.config)
    assert_same(logits(found), logits(dense), family)
    assert torch.equal(generate(found), generate(dense))
    assert torch.equal(generate(found, cache_implementation="static"), generate(dense))
    assert difference(logits(found), logits(build(family_name))) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind(kind, dtype, tmp_path):
    pair = save_coded(build("llama", dtype=dtype).to(dtype), tmp_path, KINDS[kind], head=True)
    found, dense = load(pair.coded.path), load(pair.dense.path)
    assert found.dtype == dtype
    for name, linear in coded_linears(found).items():
        assert linear.weight.dtype == dtype
        assert torch.equal(linear.weight, dense.get_parameter(f"{name}.weight"))
    assert torch.equal(logits(found), logits(dense))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "opt"])
def test_blocks_that_are_not_whole(name, structure, tmp_path):
    pair = save_coded(build(name), tmp_path, [affine(), vector()], structure=STRUCTURES[structure])
    assert structure_of(pair.coded.config) == STRUCTURES[structure]
    found, dense = load(pair.coded.path), load(pair.dense.path)
    assert_same(logits(found), logits(dense), family_of(name))
    assert torch.equal(generate(found), generate(dense))
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(found))


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_loaded_in_another_type(stored, wanted, tmp_path):
    model = build("llama", dtype=stored).to(stored)
    eights = [eight(uniform(2, 8)), eight(vector(256, 2, 16))]
    pair = save_coded(model, tmp_path, [vector(), affine(), *eights], head=True)
    found = load(pair.coded.path, dtype=wanted)
    dense = load(pair.dense.path, dtype=wanted)
    assert found.dtype == wanted and torch.equal(logits(found), logits(dense))
    cast = load(pair.coded.path).to(wanted)
    assert torch.equal(logits(cast), logits(load(pair.dense.path).to(wanted)))
    logits(cast)
    back = cast.to(torch.bfloat16).to(wanted)  # what is cast is never the codes
    for name, linear in coded_linears(back).items():
        eight_bits = linear.kind.get("scale_bits") == 8
        dtype = (linear.weight_row_scale if eight_bits else linear.weight_scale).dtype
        assert dtype == stored and linear.weight_codes.dtype == torch.int32
        expected = pair.dense.load([f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(linear.weight, expected)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("computed", DTYPES)
def test_only_parameters_are_cast(stored, computed, tmp_path):
    """As in a proof."""
    pair = save_coded(build("llama", dtype=stored).to(stored), tmp_path, [vector(), affine()])
    models = [load(pair.coded.path), load(pair.dense.path)]
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(computed)
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize(
    ("stored", "structure"),
    [(torch.float32, None), (torch.float32, "everything"), (torch.bfloat16, None)],
)
def test_it_can_be_proved(stored, structure, tmp_path):
    model = build("llama", dtype=stored).to(stored)
    plan = STRUCTURES[structure] if structure else None
    pair = save_coded(model, tmp_path, [vector(), affine()], structure=plan)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "trust_remote_code": False}
    expected = replay(pair.dense, PROBE, **options)
    assert torch.equal(replay(pair.coded, PROBE, **options), expected)
    report = prove(pair.coded.path, Fingerprint(PROBE, expected), dtype=torch.float32)
    assert report.difference < 1e-4 and report.top_agreement == 1 and report.generated == 16


def test_autocast_does_not_reach_the_decoding(tmp_path):
    pair = save_coded(build("llama"), tmp_path, vector())
    found, dense = load(pair.coded.path), load(pair.dense.path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(found), logits(dense))
    assert torch.equal(logits(found), logits(dense))


# ---------------------------------------------------------------- what is held and saved


def test_codes_are_held_and_the_weight_from_the_first_forward_on(tmp_path):
    pair = save_coded(build("llama"), tmp_path, affine(), head=True)
    model = load(pair.coded.path)
    linears = coded_linears(model).values()
    assert all(linear._kept is None for linear in linears)
    assert scalars(model) == scalars(load(pair.dense.path)) - sum(
        linear.in_features * linear.out_features for linear in linears
    )
    stored = {k: v for k, v in model.state_dict().items() if not k.endswith("inv_freq")}
    assert sum(t.nbytes for t in stored.values()) == pair.coded.stored_bytes
    logits(model)
    kept = [linear._kept for linear in linears]
    logits(model)
    assert all(linear._kept is weight for linear, weight in zip(linears, kept, strict=True))
    assert list(model.state_dict()) == [*stored]
    model.to(torch.float64).to(torch.float32)
    assert all(linear._kept is None for linear in linears)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("ran", [True, False])
def test_saving_and_loading_again(name, ran, tmp_path):
    model = build(name, dtype=torch.bfloat16).to(torch.bfloat16)
    head = name != "gpt2"
    pair = save_coded(model, tmp_path, [vector(), affine(), eight(uniform(3, 8))], head=head)
    model = load(pair.coded.path)
    if ran:
        logits(model)
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    expected = pair.coded.load(pair.coded.names())
    found = again.load(again.names())
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())
    assert again.config["compresso"] == pair.coded.config["compresso"]
    for file in MODELING_FILES:
        assert (again.path / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits(load(again.path)), logits(model))
    weights = pair.dense.load_weights(pair.dense.names())
    assert again.weight_names() == pair.dense.names()
    assert all(torch.equal(again.load_weights([n])[n], weights[n]) for n in weights)


def test_copies_and_pickles(tmp_path):
    pair = save_coded(build("llama"), tmp_path, vector())
    model = load(pair.coded.path)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)


def test_a_model_of_a_config_alone_decodes_to_numbers(tmp_path):
    pair = save_coded(build("llama"), tmp_path, vector())
    config = load(pair.coded.path).config
    model = AutoModelForCausalLM.from_config(config)
    assert all(not linear.weight.any() for linear in coded_linears(model).values())
    assert torch.isfinite(logits(model)).all()


# ---------------------------------------------------------------- training and compiling


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_rest(checkpointing, tmp_path):
    pair = save_coded(build("qwen2"), tmp_path, [vector(), affine()])
    found, dense = load(pair.coded.path).train(), load(pair.dense.path).train()
    with torch.inference_mode():
        found(IDS)  # what is kept then must not be in the way
    if checkpointing:
        found.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (found, dense):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters()}
    grads = {name: p.grad for name, p in found.named_parameters()}
    assert len(grads) == len(expected) - len(coded_linears(found))
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


def test_compiled_as_one_graph(tmp_path):
    pair = save_coded(build("llama"), tmp_path, [vector(), affine()])
    model = load(pair.coded.path)
    expected = logits(load(pair.dense.path))
    logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(IDS, use_cache=False).logits, expected) < 1e-5


# ---------------------------------------------------------------- the linear itself


@pytest.mark.parametrize("shape", [(5, 32), (700, 256), (3000, 96), (1, 1024)])
@pytest.mark.parametrize(
    "kind", ["p2n256", "p4n256", "p1n8", "8 bits", "p2n256 s8", "4 bits z8 s8", "symmetric s8"]
)
def test_it_is_bit_identical_to_the_reader(shape, kind, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        codes = KINDS[kind](*shape, dtype, 1)
        symmetric = is_symmetric(codes)
        (entry,) = describe({"x": codes}, symmetric=symmetric)["coded_kinds"].values()
        linear = CodedLinear(nn.Linear(shape[1], shape[0]), json.loads(json.dumps(entry)))
        packed = pack("x", codes, symmetric=symmetric)
        tensors = {name.removeprefix("x."): t for name, t in packed.items()}
        linear.load_state_dict({**tensors, "bias": torch.zeros(shape[0])})
        assert linear.weight.dtype == dtype
        assert torch.equal(linear.weight.float(), codes.decode())


def test_it_takes_the_place_of_both_kinds_of_linear():
    kind = {"kind": "affine", "dtype": "float32", "bits": 2, "group_size": 8}
    for linear in (nn.Linear(16, 24), Conv1D(24, 16), nn.Linear(16, 24, bias=False)):
        coded = CodedLinear(linear, kind)
        assert coded.bias is linear.bias
        assert coded.weight.shape == (24, 16) and coded(torch.ones(3, 16)).shape == (3, 24)


# ---------------------------------------------------------------- seen by compresso


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("structure", [None, "everything"])
def test_the_adapter_is_dense(name, structure, tmp_path):
    plan = STRUCTURES[structure] if structure else None
    head = name == "gpt_neox"
    pair = save_coded(build(name), tmp_path, [vector(), affine()], structure=plan, head=head)
    assert pair.coded.packed and not pair.dense.packed
    assert pair.coded.weight_names() == pair.dense.names()
    assert pair.coded.parameters == pair.dense.parameters
    adapters = [
        ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
        for source in (pair.coded, pair.dense)
    ]
    found, dense = adapters
    assert not coded_linears(found.model) and found.structure == dense.structure
    assert found.block_tensors(3) == dense.block_tensors(3)
    assert found.outside_tensors() == dense.outside_tensors()
    assert found.unmapped_tensors() == []
    block = found.load_block(0, pair.coded).state_dict()
    expected = dense.load_block(0, pair.dense).state_dict()
    assert list(block) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in block.items())


def test_config_goes_there_and_back(tmp_path):
    pair = save_coded(build("llama"), tmp_path, affine(), structure=STRUCTURES["shared"])
    config, structure = pair.coded.config, STRUCTURES["shared"]
    assert restructure(config, structure) == pair.dense.config
    coded = {key: config["compresso"][key] for key in ("coded", "coded_kinds")}
    assert restructure(pair.dense.config, structure, coded=coded) == config
    stock = restructure(config, Structure())
    assert not needs_code(stock) and "compresso" not in stock
    assert restructure(stock, structure, coded=coded) == config
