"""Each group's damage against whole models, and what is left of a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, build, tokens
from torch.nn import functional as F

from compresso.calibration import sensitivity
from compresso.calibration.levels import Ladder, Levels, changed_in, places
from compresso.calibration.sensitivity import Ledger, Sensitivity, damage_ledger, noise_ledger
from compresso.calibration.streams import Streams
from compresso.errors import CheckpointError, ResourceError
from compresso.families import FAMILIES
from compresso.kernels.gptq import relative_error
from compresso.kernels.linearity import fit_line, noise_levels
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

BATCHES = [tokens(3, 16, seed=1), tokens(1, 16, seed=2)]
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


class Rounded:
    def __init__(self, weight, bits):
        self.weight, self.step = weight, 2.0 ** (1 - bits)

    def decode(self):
        return (self.weight / self.step).round() * self.step


def ladder(calibrated=False, seen=None):
    def quantize(weight, gram, bits):
        assert (gram is not None) == calibrated
        if seen is not None:
            seen.append((tuple(weight.shape), bits, None if gram is None else gram.clone()))
        return Rounded(weight, bits)

    return Ladder(
        bits=(2, 4),
        quantize=quantize,
        nbytes=lambda shape, bits: shape[0] * shape[1] * bits // 8,
        calibrated=calibrated,
        key="rounded",
    )


class Bench:
    def __init__(self, source, work, family="llama", steps=None):
        self.source, self.work = source, work
        self.adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
        self.groups = [list(FAMILIES[family].linears) for _ in range(BLOCKS)]
        self.ladder = steps or ladder()
        self.levels = Levels(
            work / "levels", self.adapter, source, self.groups, self.ladder, key="test"
        )
        self.sensitivity = Sensitivity(
            self.adapter, source, self.groups, BATCHES, runtime=RUNTIME, spill_dir=work
        )

    def ledger(self):
        return damage_ledger(self.sensitivity, self.levels, self.work, calibration="text")

    def damage(self):
        ledger = self.ledger()
        wanted = dict.fromkeys(self.sensitivity.unknown(ledger), self.ladder.bits)
        self.levels.build(wanted, BATCHES, runtime=RUNTIME, spill_dir=self.work)
        return self.sensitivity.damage(self.levels, ledger)


@torch.no_grad()
def kl(model, original):
    lost, count = 0.0, 0
    for batch in BATCHES:
        logits = model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        expected = original(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        lost += F.kl_div(logits, expected, reduction="sum", log_target=True)
        count += batch[:, 1:].numel()
    return (lost / count).item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_damage_is_of_the_model_with_one_group_rounded(family, checkpoints, models, tmp_path):
    bench = Bench(checkpoints(family), tmp_path, family)
    damage = bench.damage()
    assert list(damage) == places(bench.groups)
    for place in [(0, 0), (2, 2), (5, 3)]:
        for number, bits in enumerate((2, 4)):
            model = build(family)
            block = model.get_submodule(FAMILIES[family].blocks)[place[0]]
            stacked = []
            with torch.no_grad():
                for path in bench.groups[0][place[1]]:
                    weight = block.get_submodule(path).weight
                    decoded = Rounded(weight, bits).decode()
                    stacked.append((weight.clone(), decoded))
                    weight.copy_(decoded)
            assert damage[place][number] == pytest.approx(kl(model, models(family)), rel=1e-3)
            lost = sum(float((a - b).square().sum()) for a, b in stacked)
            whole = sum(float(a.square().sum()) for a, _ in stacked)
            assert bench.levels.error(place, bits) == pytest.approx(lost / whole, rel=1e-5)
    errors = bench.sensitivity.errors(bench.ledger())
    assert errors[2, 2] == [bench.levels.error((2, 2), bits) for bits in (2, 4)]


def test_grams_are_those_of_the_whole_model(checkpoints, models, tmp_path):
    seen = []
    bench = Bench(checkpoints("llama"), tmp_path, steps=ladder(calibrated=True, seen=seen))
    wanted = {(1, 0): [2], (3, 3): [2, 4]}
    bench.levels.build(wanted, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert [(shape, bits) for shape, bits, _ in seen] == [
        ((128, 64), 2),
        ((64, 96), 2),
        ((64, 96), 4),
    ]
    rows = []
    down = models("llama").model.layers[3].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in BATCHES:
            models("llama")(batch, use_cache=False)
    handle.remove()
    x = torch.cat(rows).double()
    assert torch.allclose(seen[1][2].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_noise_gives_a_slope_of_each_group(checkpoints, tmp_path):
    bench = Bench(checkpoints("llama"), tmp_path)
    ledger = noise_ledger(bench.sensitivity, tmp_path)
    lines = bench.sensitivity.noise(ledger)
    assert list(lines) == places(bench.groups)
    name = bench.sensitivity.name((4, 2))
    assert name == "4:mlp.gate_proj+mlp.up_proj"
    assert lines[4, 2] == fit_line(noise_levels(), ledger.get(name))
    assert all(line.slope > 0 and line.fit > 0.5 for line in lines.values())


def test_noise_is_drawn_from_the_linear_and_the_level(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "noise_levels", lambda: [0.01])
    first, again = (shaken(Bench(checkpoints("llama"), tmp_path / name)) for name in "ab")
    assert first == again
    assert len(set(first.values())) == len(first)


def test_slope_times_error_predicts_small_damage(checkpoints, tmp_path):
    """What noise says of a group holds for another error of the same size."""
    bench = Bench(checkpoints("llama"), tmp_path)
    lines = bench.sensitivity.noise(noise_ledger(bench.sensitivity, tmp_path))
    bench.damage()
    damage, errors = bench.damage(), bench.sensitivity.errors(bench.ledger())
    predicted = [lines[place].slope * errors[place][1] for place in damage]
    assert sum(predicted) == pytest.approx(sum(kls[1] for kls in damage.values()), rel=0.5)


def damaged(bench):
    return bench.damage()


def shaken(bench):
    return bench.sensitivity.noise(noise_ledger(bench.sensitivity, bench.work))


@pytest.mark.parametrize("measure", [damaged, shaken])
def test_a_killed_run_goes_on(measure, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "noise_levels", lambda: [0.01, 0.02])
    source = checkpoints("llama")
    expected = measure(Bench(source, tmp_path / "whole"))
    put, score, calls = Ledger.put, Streams.score, []

    def stop(self, values):
        put(self, values)
        calls.append(self.path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(Bench(source, tmp_path / "killed"))
    monkeypatch.setattr(Ledger, "put", put)
    assert len(json.loads(calls[-1].read_text())["measured"]) == 2 * 4
    calls.clear()

    def counted(*arguments, **named):
        calls.append(arguments)
        return score(*arguments, **named)

    monkeypatch.setattr(Streams, "score", counted)
    assert measure(Bench(source, tmp_path / "killed")) == expected
    assert len(calls) == BLOCKS - 2
    assert measure(Bench(source, tmp_path / "killed")) == expected
    assert len(calls) == BLOCKS - 2


def test_levels_are_quantized_once_and_belong_to_a_key(checkpoints, tmp_path):
    seen = []
    bench = Bench(checkpoints("llama"), tmp_path, steps=ladder(seen=seen))
    bench.levels.build({(0, 0): [2]}, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    bench.levels.build({(0, 0): [2, 4]}, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert [bits for _, bits, _ in seen] == [2, 4]
    bench.levels.build({(0, 0): [2, 4]}, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert len(seen) == 2
    names = [f"model.layers.0.{path}.weight" for path in bench.groups[0][0]]
    found = bench.levels.tensors(0, (4, None, None, None))
    assert sorted(found) == sorted(names)
    whole = bench.source.load_weights(names)
    for name in names:
        assert torch.equal(found[name], Rounded(whole[name], 4).decode())
        assert relative_error(whole[name], found[name]) > 0
    Levels(tmp_path / "levels", bench.adapter, bench.source, bench.groups, ladder(), key="other")
    assert list((tmp_path / "levels").iterdir()) == [tmp_path / "levels" / "key"]
    bench.levels.remove()
    assert not (tmp_path / "levels").exists()


def test_shared_linears_change_wherever_they_are_used(checkpoints):
    adapter = ModelAdapter.open(
        checkpoints("llama"), dtype=torch.float32, device=torch.device("cpu")
    )
    assert changed_in(adapter, {1: "a"}).versions == ((1, "a"),)
    shared = type(adapter.structure)(shared=(0, 1, 1, 3, 1, 5))
    adapter.structure = shared
    assert changed_in(adapter, {1: "a", 3: "b"}).versions == (
        (1, "a"),
        (2, "a"),
        (3, "b"),
        (4, "a"),
    )


def test_ledgers_are_found_by_what_was_measured(tmp_path):
    first = Ledger(tmp_path, "noise", {"source": "a"})
    first.put({"x": 1.5})
    assert Ledger(tmp_path, "noise", {"source": "a"}).get("x") == 1.5
    assert Ledger(tmp_path, "noise", {"source": "b"}).get("x") is None
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
    first.path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Ledger(tmp_path, "noise", {"source": "a"})


def test_a_disk_that_cannot_be_written(checkpoints, tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, "noise", {})
    bench = Bench(checkpoints("llama"), tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResourceError, match=r"cannot write .*: No space left on device"):
        ledger.put({"x": 1})
    with pytest.raises(ResourceError, match=r"cannot write .*2.safetensors.*No space") as raised:
        bench.levels.build({(0, 0): [2]}, BATCHES, runtime=RUNTIME, spill_dir=tmp_path)
    assert "once for each width" in raised.value.hint
