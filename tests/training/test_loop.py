"""Training: against a plain loop with torch's optimizer, and what it keeps, ends and repeats."""

from __future__ import annotations

from collections import Counter
from math import cos, exp, pi

import pytest
import torch
from tiny_models import build, tokens
from torch import nn

from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, NumericalError, ResourceError
from compresso.models.adapter import ModelAdapter
from compresso.training import loop, processes
from compresso.training.loop import TrainOptions, train
from compresso.training.model import TrainingModel
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.order import rows_of_step

DATA = tokens(12, 16, seed=1)
HELDOUT = DATA[:5]  # of random ids, nothing but themselves can be learned
NEXT = MixedObjective(Shares(next_token=1.0))
OPTIONS = {"steps": 6, "sequences": 4, "micro": 4, "rate": 3e-3, "evaluate_every": 2, "patience": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    build("llama").save_pretrained(path)
    return Checkpoint(path)


def run(source, *, objective=NEXT, low_rank=False, dropout=0.0, store=None, choose=None, **changes):
    """The history, and all tensors of the model as they are left, or the corrections."""
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    with TrainingModel(adapter, source) as model:
        if low_rank:
            names = [name.removesuffix(".weight") for name in source.names() if "_proj" in name]
            parameters = model.add_low_rank(names, 4, seed=0, dropout=dropout)
        else:
            parameters = model.train_tensors(source.names())
        options = TrainOptions(**OPTIONS | changes)
        history = train(
            model, parameters, objective, DATA, HELDOUT, options, store=store, choose=choose
        )
        if low_rank:
            return history, {path: one.product() for path, one in model.low_ranks().items()}
        return history, model.trained_tensors()


def losses(history):
    return [row["loss"] for row in history.rows if "loss" in row]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def cross_entropy(model, rows):
    logits = model(rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def test_it_is_adamw_with_warmup_cosine_and_clipping(source):
    """The reference is a stock model, torch's own optimizer and a loop that hides nothing."""
    options = {"warmup": 2, "weight_decay": 0.1, "clip": 1.5, "steps": 5, "evaluate_every": 5}
    history, left = run(source, **options)
    model = build("llama")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1)
    expected, lengths = [], []
    for step in range(5):
        rows = rows_of_step(step, sequences=4, available=12, seed=0)
        loss = cross_entropy(model, DATA[rows])
        optimizer.zero_grad()
        loss.backward()
        lengths.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.5)))
        share = (step + 1) / 2 if step < 2 else 0.5 * (1 + cos(pi * (step - 2) / 3))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * share
        optimizer.step()
        expected.append(float(loss.detach()))
    rows = [row for row in history.rows if "loss" in row]
    assert losses(history) == pytest.approx(expected, rel=1e-5)
    assert [row["gradient"] for row in rows] == pytest.approx(lengths, rel=1e-4)
    assert max(lengths) > 1.5 and history.best_step == 5
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, model.get_parameter(name).detach(), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        held = float(cross_entropy(model, HELDOUT))
    assert history.heldout(5)["heldout_loss"] == pytest.approx(held, rel=1e-5)
    assert history.heldout(5)["heldout_ppl"] == pytest.approx(exp(held), rel=1e-5)


def test_what_is_run_at_once_changes_nothing_but_rounding(source):
    whole, left = run(source)
    for micro in (1, 3):
        parts, other = run(source, micro=micro)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
        for name in left:
            torch.testing.assert_close(left[name], other[name], atol=2e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_and_another_does_not(source):
    one, other, third = (run(source, low_rank=True, dropout=0.2, seed=s) for s in (0, 0, 1))
    assert losses(one[0]) == losses(other[0]) and same(one[1], other[1])
    assert losses(one[0]) != losses(third[0])


def test_every_sequence_comes_once_before_any_comes_again():
    seen = [r for step in range(6) for r in rows_of_step(step, sequences=5, available=10, seed=3)]
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    many = rows_of_step(0, sequences=25, available=10, seed=3)
    assert set(Counter(many).values()) == {2, 3}


def test_the_rate_may_stay():
    constant = TrainOptions(**OPTIONS | {"warmup": 3, "schedule": "constant"})
    assert [constant.rate_at(step) for step in (0, 2, 5)] == pytest.approx([1e-3, 3e-3, 3e-3])


def test_training_ends_without_gain_and_leaves_the_best_state(source):
    history, left = run(source, rate=30.0, steps=40, patience=3)
    assert history.ended == "no further gain"
    assert history.rows[-1]["step"] == 6 and history.best_step == 0
    assert same(left, source.load(source.names()))


def test_frozen_tensors_keep_every_bit(source):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    with TrainingModel(adapter, source) as model:
        parameters = model.train_tensors(["model.norm.weight"])
        train(model, parameters, NEXT, DATA, HELDOUT, TrainOptions(**OPTIONS))
        stored = source.load(source.names())
        for name, parameter in adapter.model.named_parameters():
            assert torch.equal(parameter, stored[name]) == (name != "model.norm.weight")
            assert (parameter.grad is None) or name == "model.norm.weight"


def test_parameters_that_rest_are_not_moved_and_begin_anew(source):
    """The third step is the first of a new run, for what moves in it and not in the second."""
    names = source.names()
    odd = [number for number in range(len(names)) if number % 2]
    even = [number for number in range(len(names)) if not number % 2]
    _, left = run(source, choose=lambda _: even)
    stored = source.load(names)
    for number, name in enumerate(names):
        assert torch.equal(left[name], stored[name]) == (number in odd)
    state = {}

    class Watched:
        def kept(self, name):
            return None

        def keep(self, name, tensors, values):
            state.update(values)

    run(source, choose=lambda step: even if step < 4 else odd, store=Watched())
    assert [state["moves"][number] for number in even] == [0] * len(even)
    assert [state["moves"][number] for number in odd] == [2] * len(odd)


class Fails:
    """The next-token objective, until it is asked for a certain step."""

    def __init__(self, step, how):
        self.left, self.how = step, how

    def __call__(self, model, tokens, rows):
        parts = NEXT(model, tokens, rows)
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left < 0:
                return self.how(parts)
        return parts


def stop(parts):
    raise KeyboardInterrupt


def not_a_number(parts):
    return {name: part * float("nan") for name, part in parts.items()}


def not_a_slope(parts):
    return parts | {"loss": parts["loss"] + (parts["loss"] - parts["loss"].clone()).sqrt()}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(source, tmp_path, monkeypatch, low_rank, stopped):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    options = {"low_rank": low_rank, "dropout": 0.3 * low_rank, "warmup": 2}
    choose = None if low_rank else lambda step: range(step // 2, 9)
    whole, expected = run(source, choose=choose, **options)
    store = KeptState(tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        run(source, objective=Fails(stopped, stop), choose=choose, store=store, **options)
    again = Fails(6 - stopped, stop)
    resumed, left = run(source, objective=again, choose=choose, store=store, **options)
    assert same(left, expected) and again.left == 0
    assert losses(resumed) == losses(whole) and resumed.best_step == whole.best_step
    finished, left = run(source, objective=Fails(0, stop), store=store, **options)
    assert same(left, expected) and losses(finished) == losses(whole)


@pytest.mark.parametrize("how", [not_a_number, not_a_slope])
def test_a_loss_that_is_no_number_ends_training_with_the_best_state_kept(source, tmp_path, how):
    _, expected = run(source, steps=6)
    kept = run(source, objective=Fails(4, not_a_number), steps=4)[1]
    store = KeptState(tmp_path / "work")
    with pytest.raises(NumericalError, match="not finite at step 5; the state after step 4") as e:
        run(source, objective=Fails(4, how), store=store)
    assert "same command again" in e.value.hint and "--fresh" in e.value.hint
    history, left = run(source, objective=Fails(0, stop), store=store)
    assert history.ended == "diverged" and history.best_step == 4
    assert not same(left, expected)
    for name, tensor in kept.items():  # the rate there ends at 0, here it does not yet
        torch.testing.assert_close(left[name], tensor, atol=0.02, rtol=0.5)


@pytest.mark.parametrize("patience", [1, 2])
def test_a_loss_that_is_no_number_is_not_taken_for_no_gain(source, patience):
    """Where held-out text is measured after every step, and says nothing of it."""
    with pytest.raises(NumericalError, match="not finite at step 1"):
        run(source, objective=Fails(0, not_a_number), evaluate_every=1, patience=patience)


def test_a_loss_that_is_no_number_from_the_start_is_no_result(source, tmp_path):
    store = KeptState(tmp_path / "work")
    for _ in range(2):
        with pytest.raises(NumericalError, match="not finite at step 1") as error:
            run(source, objective=Fails(0, not_a_number), store=store)
        assert "--rate" in error.value.hint
        assert "--fresh" in error.value.hint  # the state that is kept is of the other rate


def test_a_model_without_a_loss_is_not_trained(source, tmp_path):
    """No rate is to blame then, and there is nothing to throw away."""
    store = KeptState(tmp_path / "work")
    nothing = lambda model, tokens, rows: not_a_number(NEXT(model, tokens, rows))  # noqa: E731
    with pytest.raises(NumericalError, match="before the first step") as error:
        run(source, objective=nothing, store=store)
    assert "--rate" not in error.value.hint and store.kept("training") is None


def test_saves_take_a_small_share_of_the_time(source, monkeypatch):
    """A save that takes long is made less often; a quick one every minute."""
    assert loop.pause_after(0.0) == loop.pause_after(2.9) == 60
    assert loop.pause_after(30.0) == 600
    now, kept = [0.0], []

    class Slow:
        def kept(self, name):
            return None

        def keep(self, name, tensors, values):
            now[0] += 12.0
            kept.append(len(values["history"]["rows"]))

    def takes(parts):
        now[0] += 61.0
        return parts

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    run(source, objective=Fails(0, takes), store=Slow(), steps=10)
    assert [rows - 1 for rows in kept] == [1, 5, 9, 10]  # after 240 s each, and at the end


def test_what_is_split_is_put_together_for_the_first_process_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "whole", lambda tensor: asked.append(tensor) or tensor + 0)
    tensors = [("a", torch.arange(3)), ("b", torch.arange(2))]
    assert processes.gathered(iter(tensors), first=False) == {} and len(asked) == 2
    found = processes.gathered(iter(tensors), first=True)
    assert same(found, dict(tensors)) and len(asked) == 4


def test_kept_state_is_whole_or_not_there(tmp_path):
    store = KeptState(tmp_path / "work")
    assert store.kept("a") is None
    store.keep("a", {"x": torch.arange(3)}, {"step": 1})
    store.keep("a", {"x": torch.arange(4)}, {"step": 2})
    tensors, values = store.kept("a")
    assert torch.equal(tensors["x"], torch.arange(4)) and values == {"step": 2}
    KeptState(tmp_path / "work", writes=False).keep("a", {}, {"step": 3})
    assert store.kept("a")[1] == {"step": 2}
    path = tmp_path / "work" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        store.kept("a")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        KeptState(tmp_path / "file").keep("a", {}, {})
