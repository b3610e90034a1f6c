"""The prune stage: planted blocks are found, and the output is the model without them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import BLOCKS, build, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from compresso.calibration import statistics
from compresso.calibration.data import Calibration
from compresso.checkpoint.proof import prove
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.families import FAMILIES
from compresso.recipe import make_step
from compresso.runtime import Runtime
from compresso.stages import prune_choice
from compresso.stages.prune import prune

CALIBRATION = Calibration([tokens(3, 20, seed=1), tokens(1, 20, seed=2)], {"dataset": "test"})
RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)


def run(source, target, method, **settings):
    """The report, once the output is finished and published."""
    step = make_step("prune", {"method": method, **settings}, where="test")
    calibration = CALIBRATION if method in ("shortgpt", "contiguous") else None
    with CheckpointWriter(target, key="test", parts=BLOCKS + 1) as writer:
        report = prune(source, step, calibration, writer, RUNTIME)
        writer.finalize(
            config=report.config, side_files=source.side_files(), expected=report.expected
        )
        writer.publish()
    return report


def dropped(report):
    return [row["block"] for row in report.rows if row["dropped"]]


class Skipped(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


@torch.no_grad()
def logits_without(model, family, drop, ids):
    """What the whole model says if these blocks hand on what they are given."""
    blocks = model.get_submodule(FAMILIES[family].blocks)
    originals = {index: blocks[index] for index in drop}
    for index in drop:
        blocks[index] = Skipped()
    found = model(ids, use_cache=False).logits.float()
    for index, block in originals.items():
        blocks[index] = block
    return found


def save(model, path):
    model.save_pretrained(path)
    return Checkpoint(path)


@torch.no_grad()
def weaken(model, family, blocks, factor=1e-3):
    """Make blocks change the residual stream hardly at all."""
    for index in blocks:
        block = model.get_submodule(FAMILIES[family].blocks)[index]
        for group in (1, 3):
            linear = block.get_submodule(FAMILIES[family].linears[group][0])
            for parameter in linear.parameters():
                parameter.mul_(factor)


@torch.no_grad()
def test_the_output_is_the_model_without_the_blocks(family_name, models, checkpoints, tmp_path):
    source, drop = checkpoints(family_name), [1, 4]
    report = run(source, tmp_path / "out", "manual", drop=[4, 1])
    assert dropped(report) == report.summary["removed_blocks"] == drop
    kept_as = [row.get("kept_as") for row in report.rows]
    assert kept_as == [0, None, 1, 2, None, 3]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = report.fingerprint.tokens[:, :40]
    expected = logits_without(models(family_name), family_name, drop, ids)
    torch.testing.assert_close(report.fingerprint.logits[:, :40], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    prove(tmp_path / "out", report.fingerprint, dtype=torch.float32)


def test_every_tensor_is_kept_bit_for_bit(checkpoints, tmp_path):
    source = checkpoints("qwen3")
    run(source, tmp_path / "out", "manual", drop=[0, 3])
    places = {1: 0, 2: 1, 4: 2, 5: 3}
    output = Checkpoint(tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{part:05d}-of-00005.safetensors" for part in range(1, 6)]
    expected = {}
    for name in source.names():
        if not name.startswith("model.layers."):
            expected[name] = name
        elif int(name.split(".")[2]) in places:
            _, _, index, rest = name.split(".", 3)
            expected[f"model.layers.{places[int(index)]}.{rest}"] = name
    assert output.names() == sorted(expected)
    stored, original = output.load(expected), source.load(expected.values())
    for name, old in expected.items():
        assert torch.equal(stored[name], original[old])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_shortgpt_drops_the_blocks_that_do_least(family, tmp_path):
    model = build(family)
    weaken(model, family, [1, 4])
    report = run(save(model, tmp_path / "model"), tmp_path / "out", "shortgpt", blocks=2)
    assert dropped(report) == [1, 4]
    influence = {row["block"]: row["influence"] for row in report.rows}
    assert max(influence[1], influence[4]) < 1e-4 < min(influence[block] for block in (0, 2, 3, 5))


@torch.no_grad()
def test_contiguous_drops_a_run_that_undoes_itself(tmp_path):
    model = build("gpt2")
    blocks = model.transformer.h
    for block in (blocks[2], blocks[3]):
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            linear.weight.zero_()
            linear.bias.zero_()
    push = torch.full((64,), 5.0)
    push[::2] = -7.0
    blocks[2].mlp.c_proj.bias.copy_(push)
    blocks[3].mlp.c_proj.bias.copy_(-push)
    source = save(model, tmp_path / "model")
    report = run(source, tmp_path / "out", "contiguous", blocks=2)
    assert dropped(report) == [2, 3]
    angles = [row["angle"] for row in report.rows if row["angle"] is not None]
    assert len(angles) == BLOCKS - 1 and angles.index(min(angles)) == 2 and angles[2] < 1e-4
    ids = report.fingerprint.tokens[:, :40]
    unpruned = logits_without(model, "gpt2", [], ids)
    torch.testing.assert_close(report.fingerprint.logits[:, :40], unpruned, rtol=1e-3, atol=1e-3)
    # Block by block, either of the two turns the stream a lot.
    assert dropped(run(source, tmp_path / "other", "shortgpt", blocks=2)) != [2, 3]


def test_the_last_token_can_decide(tmp_path, monkeypatch):
    seen = []
    measure = statistics.measure_blocks
    monkeypatch.setattr(
        prune_choice, "measure_blocks", lambda *a, **k: seen.append(k["angles"]) or measure(*a, **k)
    )
    source = save(build("llama"), tmp_path / "model")
    run(source, tmp_path / "a", "contiguous", blocks=1, tokens="last")
    run(source, tmp_path / "b", "contiguous", blocks=1)
    run(source, tmp_path / "c", "shortgpt", blocks=1)
    assert seen == ["last", "all", None]


def test_tail_keeps_the_last_block(checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path / "out", "tail", blocks=2)
    assert dropped(report) == [3, 4]
    assert "influence" not in report.rows[0] and "angle" not in report.rows[0]


@pytest.mark.parametrize("method", ["shortgpt", "contiguous", "tail"])
def test_the_ratio_is_of_all_parameters(method, checkpoints, tmp_path):
    source = checkpoints("llama")
    report = run(source, tmp_path / "out", method, ratio=0.3)
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96, 2 * 64
    block, outside = attention + mlp + norms, 2 * 128 * 64 + 64
    total = BLOCKS * block + outside
    count = min(range(BLOCKS), key=lambda count: abs(count * block / total - 0.3))
    assert len(dropped(report)) == count
    assert report.summary["removed_share"] == count * block / total
    assert report.summary["asked_share"] == 0.3
    assert report.summary["parameters_before"] == total == source.parameters
    output = Checkpoint(tmp_path / "out")
    assert report.summary["parameters_after"] == total - count * block == output.parameters
    assert report.summary["removed_parameters"] == count * block
    assert report.summary["bytes_before"] == source.stored_bytes
    assert report.summary["bytes_after"] == output.stored_bytes


@pytest.mark.parametrize(
    ("method", "settings", "message", "hint"),
    [
        ("manual", {"drop": [6]}, "there is no block `6`", "blocks are 0 to 5"),
        ("manual", {"drop": [1, 1]}, "`a1` is given twice", None),
        ("manual", {"drop": [0, 1, 2, 3, 4, 5]}, "cannot remove all 6 blocks", "must stay"),
        ("tail", {"blocks": 6}, "cannot remove 6 of 6 blocks", "must stay"),
        ("shortgpt", {"blocks": 9}, "cannot remove 9 of 6 blocks", "must stay"),
        ("contiguous", {"ratio": 0.99}, "0.99 leaves no block", "largest possible ratio is 0.7"),
        ("shortgpt", {"ratio": 0.01}, "0.01 is less than half", "smallest possible ratio is 0.1"),
    ],
)
def test_amounts_that_cannot_be(
    method, settings, message, hint, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(prune_choice, "measure_blocks", None)  # refused before anything is measured
    with pytest.raises(ConfigError, match=message) as raised:
        run(checkpoints("llama"), tmp_path / "out", method, **settings)
    assert (raised.value.hint or "").find(hint or "") >= 0


def test_a_config_that_cannot_be_rewritten_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(prune_choice, "measure_blocks", None)
    model = build("llama")
    model.config.per_block = [1.0] * BLOCKS
    with pytest.raises(ConfigError, match="`per_block` in config"):
        run(save(model, tmp_path / "model"), tmp_path / "out", "shortgpt", blocks=1)


def test_packed_weights_are_refused(checkpoints, tmp_path):
    source = Checkpoint(checkpoints("llama").path)
    source.packed = True
    with pytest.raises(ConfigError, match="are quantized") as raised:
        run(source, tmp_path / "out", "tail", blocks=1)
    assert raised.value.hint == "prune first, then quantize"


def test_tensors_nobody_uses_are_carried(tmp_path):
    from safetensors.torch import load_file, save_file

    build("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    extra = {
        f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.full((8,), float(index))
        for index in range(BLOCKS)
    }
    other = {"extra.weight": torch.ones(3), "model.layers.6.head.weight": torch.ones(2)}
    save_file(tensors | extra | other, path, metadata={"format": "pt"})
    report = run(Checkpoint(tmp_path / "model"), tmp_path / "out", "manual", drop=[0, 2])
    assert report.warnings == [
        "6 tensors that the model has no place for are kept, first `extra.weight`"
    ]
    prove(tmp_path / "out", report.fingerprint, dtype=torch.float32, carried=report.carried)
    output = Checkpoint(tmp_path / "out")
    carried = {name: tensor.tolist() for name, tensor in output.load(output.names()).items()}
    assert carried["extra.weight"] == [1.0] * 3
    assert carried["model.layers.4.head.weight"] == [1.0] * 2
    frequencies = [
        carried[f"model.layers.{place}.self_attn.rotary_emb.inv_freq"][0] for place in range(4)
    ]
    assert frequencies == [1.0, 3.0, 4.0, 5.0]


def test_a_restarted_run_measures_and_writes_nothing_twice(tmp_path, monkeypatch):
    source = save(build("llama"), tmp_path / "model")
    whole = run(source, tmp_path / "whole", "shortgpt", blocks=2)
    step = make_step("prune", {"method": "shortgpt", "blocks": 2}, where="test")
    commit, left = CheckpointWriter.commit, [3]

    def commit_some(self, part, tensors, report, **beside):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        commit(self, part, tensors, report, **beside)

    monkeypatch.setattr(CheckpointWriter, "commit", commit_some)
    writer = CheckpointWriter(tmp_path / "out", key="test", parts=BLOCKS + 1)
    with writer, pytest.raises(KeyboardInterrupt):
        prune(source, step, CALIBRATION, writer, RUNTIME)
    written = {path: path.stat().st_mtime_ns for path in writer.partial.glob("*.safetensors")}
    assert len(written) == 3
    monkeypatch.setattr(CheckpointWriter, "commit", commit)
    monkeypatch.setattr(prune_choice, "measure_blocks", None)
    with CheckpointWriter(tmp_path / "out", key="test", parts=BLOCKS + 1) as writer:
        report = prune(source, step, CALIBRATION, writer, RUNTIME)
        writer.finalize(
            config=report.config, side_files=source.side_files(), expected=report.expected
        )
        assert all(path.stat().st_mtime_ns == time for path, time in written.items())
        writer.publish()
    assert report.to_json() == whole.to_json()
    assert torch.equal(report.fingerprint.logits, whole.fingerprint.logits)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
