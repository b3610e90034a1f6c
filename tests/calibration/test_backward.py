"""Gradients block by block are those of the whole model, whatever memory there is."""

from __future__ import annotations

import pytest
import torch
from restructured import STRUCTURES, save
from tiny_models import BLOCKS, build, tokens
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from walking import BATCHES, RAM, difference, real

from compresso.calibration import backward
from compresso.calibration.backward import head_gradient, walk_back
from compresso.errors import ConfigError, NumericalError, ResourceError
from compresso.families import family_of
from compresso.models.adapter import ModelAdapter

TARGETS = sum(batch[:, 1:].numel() for batch in BATCHES)


def opened(source, dtype=torch.float32):
    return ModelAdapter.open(source, dtype=dtype, device=torch.device("cpu"))


def whole_model(family, batches):
    """The mean loss of all tokens, and the gradients of every block, by name."""
    model = build(family)
    lost = [
        cross_entropy(model(b, use_cache=False).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten())
        * b[:, 1:].numel()
        for b in batches
    ]
    loss = sum(lost) / sum(b[:, 1:].numel() for b in batches)
    loss.backward()
    blocks = model.get_submodule(family_of(family).blocks)
    return loss.item(), [{n: p.grad for n, p in b.named_parameters()} for b in blocks]


def walked(source, *, dtype=torch.float32, batches=BATCHES, budget=RAM, **options):
    """The loss, and the gradients of every block, by name, in the order of the model."""
    adapter = opened(source, dtype)
    found, loss = [], None
    options = {"spill_dir": None, **options}
    for block in walk_back(adapter, source, batches, budget=budget, **options):
        found.insert(0, {n: p.grad.clone() for n, p in block.module.named_parameters()})
        loss = block.loss
        assert block.index == BLOCKS - len(found)
        assert block.tokens == sum(b[:, 1:].numel() for b in batches)
    return loss, found


def test_gradients_and_loss_are_those_of_the_whole_model(checkpoints, family_name):
    loss, gradients = walked(checkpoints(family_name))
    expected_loss, expected = whole_model(family_name, BATCHES)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.keys() == wanted.keys()
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for name, gradient in found.items():
            assert (gradient - wanted[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("switch", [torch.no_grad, torch.enable_grad])
def test_the_callers_switch_for_gradients_does_not_matter_and_stays(checkpoints, switch):
    source = checkpoints("llama")
    expected = walked(source)[1]
    with switch():
        before = torch.is_grad_enabled()
        for block in walk_back(opened(source), source, BATCHES, budget=RAM, spill_dir=None):
            assert torch.is_grad_enabled() == before
            for name, parameter in block.module.named_parameters():
                assert torch.equal(parameter.grad, expected[block.index][name])
        assert torch.is_grad_enabled() == before


# In float32 a batch has room for 3 * 20 * 64 numbers, rounded up to pages; seven sets of states.
@pytest.mark.parametrize("budget", [0, 50_000, 200_000])
def test_spilling_changes_nothing(checkpoints, family_name, tmp_path, budget):
    source = checkpoints(family_name)
    loss, gradients = walked(source)
    spilled_loss, spilled = walked(source, budget=budget, spill_dir=tmp_path)
    assert loss == spilled_loss
    for found, expected in zip(spilled, gradients, strict=True):
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert list(tmp_path.iterdir()) == []


def test_one_block_is_loaded_at_a_time(checkpoints, monkeypatch):
    source = checkpoints("qwen3")  # tied: the head must not bring blocks, nor stay
    adapter = opened(source)
    loads = []

    def load(index, *arguments):
        assert real(adapter) == []
        loads.append(index)
        return ModelAdapter.load_block(adapter, index, *arguments)

    monkeypatch.setattr(adapter, "load_block", load)
    for block in walk_back(adapter, source, BATCHES, budget=RAM, spill_dir=None):
        prefix = f"{adapter.family.blocks}.{block.index}."
        assert real(adapter) and all(name.startswith(prefix) for name in real(adapter))
    assert real(adapter) == []
    assert loads == [*range(BLOCKS), *reversed(range(BLOCKS))]


def test_a_walk_that_is_given_up_frees_its_block(checkpoints):
    source = checkpoints("llama")
    adapter = opened(source, torch.bfloat16)
    walk = walk_back(adapter, source, BATCHES, budget=RAM, spill_dir=None)
    next(walk)
    walk.close()
    assert real(adapter) == []
    assert {parameter.dtype for parameter in adapter.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


def test_a_bfloat16_model_gets_float32_gradients_near_the_exact_ones(checkpoints, family_name):
    loss, gradients = walked(checkpoints(family_name), dtype=torch.bfloat16)
    exact_loss, exact = walked(checkpoints(family_name))
    assert loss == pytest.approx(exact_loss, rel=0.02)
    for found, expected in zip(gradients, exact, strict=True):
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        rows = [torch.cat([g[name].flatten() for name in g]) for g in (found, expected)]
        assert torch.cosine_similarity(*rows, dim=0) > 0.97


def test_parts_of_batches_can_be_taken_one_by_one(checkpoints):
    source = checkpoints("llama")
    expected = walked(source)[1]
    squares, sums = {}, {}

    def take(batch, block):
        for name, parameter in block.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            sums[name] = sums.get(name, 0) + gradient
            squares.setdefault(name, []).append(batch)

    for block in walk_back(
        opened(source), source, BATCHES, budget=RAM, spill_dir=None, after_batch=take
    ):
        for name, total in sums.items():
            assert difference(total, expected[block.index][name]) < 1e-4
            assert squares[name] == [0, 1, 2]
        sums.clear()
        squares.clear()


def test_the_head_is_taken_in_pieces(checkpoints, monkeypatch):
    source = checkpoints("gemma2")  # with a soft cap
    whole_loss, whole = walked(source)
    monkeypatch.setattr(backward, "LOGITS_BYTES", 4 * 128 * 3 * 7)  # 7 positions of a batch
    loss, gradients = walked(source)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for found, expected in zip(gradients, whole, strict=True):
        assert all(difference(found[name], expected[name]) < 1e-4 for name in expected)


def test_the_gradient_of_any_score_at_the_last_hidden_states(checkpoints):
    source = checkpoints("gpt2")
    adapter = opened(source)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    kept = hidden.clone()
    total, gradient = head_gradient(
        adapter, source, hidden, lambda logits, part: logits.square().sum() * 1e-3, positions=5
    )
    leaf = hidden[:, :5].clone().requires_grad_()
    expected = adapter.logits(source, leaf).square().sum() * 1e-3
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradient[:, :5], leaf.grad) < 1e-5
    assert gradient.shape == hidden.shape and not gradient[:, 5:].any()
    assert torch.equal(hidden, kept)


def test_a_sequence_of_one_token_adds_nothing(checkpoints):
    source = checkpoints("llama")
    loss, gradients = walked(source, batches=[BATCHES[0], tokens(1, 1)])
    expected_loss, expected = walked(source, batches=BATCHES[:1])
    assert loss == expected_loss
    assert all(torch.equal(gradients[2][name], expected[2][name]) for name in expected[2])
    with pytest.raises(ConfigError, match="no token of the calibration has a next one"):
        walked(source, batches=[tokens(4, 1)])


def test_states_that_fit_nowhere_are_refused(checkpoints):
    with pytest.raises(ResourceError, match=r"hidden states need 0\.00 GB, but `max_memory`"):
        walked(checkpoints("llama"), budget=1000)


def test_a_loss_or_gradient_that_is_not_finite_is_refused(checkpoints, monkeypatch):
    source = checkpoints("llama")
    with monkeypatch.context() as changed:
        changed.setattr(
            backward, "head_gradient", lambda *_, **__: (1.0, torch.full((3, 20, 64), torch.nan))
        )
        with pytest.raises(NumericalError, match="the gradient before block `5` is not finite"):
            walked(source, batches=BATCHES[:1])
    impossible = torch.full((128,), -torch.inf)
    impossible[0] = 0
    monkeypatch.setattr(
        ModelAdapter, "logits", lambda self, _, hidden: 0 * hidden[..., :1] + impossible
    )
    with pytest.raises(NumericalError, match="the loss is not finite"):
        walked(source)


@pytest.mark.parametrize("kind", ["first attention", "shared", "everything"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_models_that_lack_or_share_parts(kind, family, tmp_path):
    source = save(build(family), STRUCTURES[kind], tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    adapter = opened(source)
    own = f"{adapter.family.blocks}."
    found = {}
    for _ in walk_back(adapter, source, BATCHES, budget=RAM, spill_dir=None):
        for name, parameter in adapter.model.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad
    for batch in BATCHES:
        logits = reference(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        lost = cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        (lost / TARGETS).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if n.startswith(own)}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * largest, name
