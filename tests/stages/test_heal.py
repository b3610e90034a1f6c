"""Healing: what moves and what does not, what is written, and what is said of it."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from restructured import STRUCTURES, save
from tiny_checkpoint import save_tiny
from tiny_models import BLOCKS, build, tokens
from transformers import AutoModelForCausalLM

from compresso import config
from compresso.calibration.data import load_calibration, load_heldout
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import (
    CheckpointError,
    CompressoError,
    ConfigError,
    Interrupted,
    NumericalError,
    ResourceError,
)
from compresso.models.adapter import ModelAdapter
from compresso.pipeline import run_recipe
from compresso.provenance import read_record
from compresso.recipe import Recipe, make_step
from compresso.run import run_step
from compresso.runtime import make_runtime
from compresso.settings import CalibrationSettings, RuntimeSettings
from compresso.stages import heal_disk, heal_memory, heal_text
from compresso.stages.heal_choice import Trained, beside_removed, draw, trained
from compresso.stages.heal_memory import Load, needed
from compresso.stages.heal_text import followed
from compresso.stages.training_plot import write_training
from compresso.step_data import load_data
from compresso.training import loop, processes
from compresso.training.model import TrainingModel
from compresso.training.options import History
from compresso.training.share import Share

RUNTIME = make_runtime(RuntimeSettings(dtype="float32", device="cpu"))
LINEAR = "_proj.weight"
FEW = {"steps": 4, "sequences": 4, "evaluate_every": 2, "heldout": 4, "rate": 1e-2, "plot": False}


def run(stage, source, target, *, samples=18, length=16, runtime=RUNTIME, **values):
    """The report of one stage on the ids beside the source; `.target` is its checkpoint."""
    step = make_step(stage, values, where="test")
    data = {"dataset": str(target.parent / "tokens.npy"), "samples": samples, "length": length}
    if not (target.parent / "tokens.npy").exists():
        # Of random ids nothing can be learned but themselves: the held-out end repeats the start.
        ids = tokens(18, 16, seed=5)
        np.save(target.parent / "tokens.npy", torch.cat((ids, ids[:2])).numpy())
    settings = config.build(CalibrationSettings, data, where="test")
    return run_step(step, source, settings, target, runtime).report


def heal(source, target, method, **values):
    report = run("heal", source, target, method=method, **FEW | values)
    return report, Checkpoint(target)


def model(path, family="llama", **changes):
    build(family, **changes).save_pretrained(path)
    return Checkpoint(path)


def pruned(path, drop, **changes):
    source = model(path / "whole", **changes)
    run("prune", source, path / "pruned", method="manual", drop=drop)
    return Checkpoint(path / "pruned")


def quantized(path, method="rtn", **settings):
    """Weights of 4 bits, of a model that leaves room for other families of codes."""
    source = model(path / "whole", intermediate_size=128)
    run("quantize", source, path / "packed", method=method, **settings)
    return Checkpoint(path / "packed")


def changed(source, healed):
    """Names of the stored tensors that are not the same to the bit."""
    assert source.names() == healed.names()
    before, after = source.load(source.names()), healed.load(healed.names())
    for name in before:
        assert before[name].dtype == after[name].dtype
    return {name for name in before if not torch.equal(before[name], after[name])}


def of_blocks(source, *blocks):
    prefixes = tuple(f"model.layers.{block}." for block in blocks)
    return {name for name in source.names() if name.startswith(prefixes)}


ENDS = {"model.norm.weight", "lm_head.weight"}
EXPECTED = {
    "lora": lambda source: {name for name in source.names() if name.endswith(LINEAR)},
    "full": lambda source: set(source.names()),
    "last-k": lambda source: of_blocks(source, 3, 4, 5) | ENDS,
    "norms": lambda source: {name for name in source.names() if "norm" in name},
}


@pytest.mark.parametrize("method", EXPECTED)
def test_what_is_trained_changes_and_nothing_else(checkpoints, tmp_path, method):
    source = checkpoints("llama")
    report, healed = heal(source, tmp_path / "out", method)
    expected = EXPECTED[method](source)
    assert changed(source, healed) == expected
    summary = report.summary
    assert summary["unchanged_tensors"] == len(source.names()) - len(expected)
    assert summary["ppl_healed"] < summary["ppl_unhealed"]
    assert summary["best_step"] == summary["steps"] == 4 and summary["ended"] == "all steps"
    assert summary["tokens_seen"] == 4 * 4 * 16 and summary["epochs"] == 1
    assert healed.config == source.config and healed.adapter is None


def test_lisa_moves_a_few_blocks_at_a_time(checkpoints, tmp_path):
    source = checkpoints("llama")
    report, healed = heal(source, tmp_path / "out", "lisa", active=2, interval=2)
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    step = make_step("heal", {"method": "lisa"}, where="test")
    moving = trained(adapter, source, step)
    drawn = set()
    for number in range(4):
        names = [moving.tensors[i] for i in draw(moving, active=2, interval=2, seed=0, step=number)]
        blocks = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert len(blocks) == 2
        assert set(names) == of_blocks(source, *blocks) | ENDS | {"model.embed_tokens.weight"}
        drawn |= blocks
    assert 2 <= len(drawn) <= 4
    assert changed(source, healed) == of_blocks(source, *drawn) | ENDS | {
        "model.embed_tokens.weight"
    }
    assert "anew" in report.summary["optimizer_memory"]
    every = {
        n for s in range(0, 200, 20) for n in draw(moving, active=2, interval=20, seed=0, step=s)
    }
    assert every == set(range(len(moving.tensors)))


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path):
    source = model(tmp_path / "tied", "qwen3")
    _, healed = heal(source, tmp_path / "out", "last-k", last=1)
    embedding = {"model.embed_tokens.weight", "model.norm.weight"}
    assert changed(source, healed) == of_blocks(source, BLOCKS - 1) | embedding


def test_neighbours_are_the_blocks_beside_a_gap(tmp_path):
    source = pruned(tmp_path, [1, 2, "a4"])
    assert beside_removed(source, 4, 1) == [0, 1, 2]  # blocks 0, 3 and 4 of the original
    _, healed = heal(source, tmp_path / "out", "neighbours")
    assert changed(source, healed) == of_blocks(source, 0, 1, 2)
    run("prune", healed, tmp_path / "again", method="manual", drop=[0])
    again = Checkpoint(tmp_path / "again")
    assert beside_removed(again, 3, 1) == [0, 1] and beside_removed(again, 3, 2) == [0, 1, 2]
    with pytest.raises(ConfigError, match="nothing was removed"):
        heal(model(tmp_path / "plain"), tmp_path / "not", "neighbours")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_shared_linears_stay_shared(tmp_path, method):
    source = save(build("llama"), STRUCTURES["everything"], tmp_path / "source")
    report, healed = heal(source, tmp_path / "out", method, rate=1e-3)
    linears = {name for name in source.names() if name.endswith(LINEAR)}
    linears = {name for name in linears if ".correction_" not in name}
    assert changed(source, healed) == (linears if method == "lora" else set(source.names()))
    assert healed.parameters == source.parameters
    assert report.summary["ppl_healed"] < report.summary["ppl_unhealed"]


def test_last_blocks_train_what_they_borrow(tmp_path):
    source = save(build("llama"), STRUCTURES["shared"], tmp_path / "source")
    _, healed = heal(source, tmp_path / "out", "last-k", last=1)
    borrowed = {name for name in of_blocks(source, 3) if name.endswith(LINEAR)}
    assert changed(source, healed) == borrowed | of_blocks(source, 5) | ENDS


def test_a_merged_correction_is_what_an_adapter_is(tmp_path):
    source = model(tmp_path / "model")
    merged, _ = heal(source, tmp_path / "merged", "lora")
    beside, healed = heal(source, tmp_path / "beside", "lora", merge=False)
    assert not changed(source, healed) and len(healed.adapter.paths) == 7 * BLOCKS
    assert beside.summary["ppl_healed"] == pytest.approx(merged.summary["ppl_healed"], rel=1e-5)
    ids = tokens(1, 12)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    weights = healed.load_weights(healed.weight_names())
    whole = build("llama")
    whole.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, dense, atol=1e-3, rtol=1e-3)
    further, again = heal(healed, tmp_path / "further", "lora", merge=False)
    assert further.summary["ppl_unhealed"] == pytest.approx(beside.summary["ppl_healed"], rel=1e-4)
    assert further.summary["ppl_healed"] < beside.summary["ppl_healed"]
    assert not changed(source, again)
    with pytest.raises(ConfigError, match="would lose the adapter"):
        heal(healed, tmp_path / "not", "norms")


@pytest.mark.parametrize("linears", ["all", "mlp"])
def test_an_adapter_that_is_trained_on_is_merged_as_a_whole(tmp_path, linears):
    """Also what of it is in linears that would get no correction now."""
    source = model(tmp_path / "model")
    beside, adapted = heal(source, tmp_path / "beside", "lora", merge=False)
    report, healed = heal(adapted, tmp_path / "out", "lora", linears=linears)
    before, after = beside.summary["ppl_healed"], report.summary["ppl_healed"]
    assert report.summary["ppl_unhealed"] == pytest.approx(before, rel=1e-4) and after < before
    assert healed.adapter is None
    assert changed(source, healed) == EXPECTED["lora"](source)
    assert report.summary["unchanged_tensors"] == len(source.names()) - 7 * BLOCKS


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_beside_codes_an_adapter_is_written(tmp_path, method):
    source = quantized(tmp_path, bits=2, group_size=32)
    report, healed = heal(source, tmp_path / "out", method, linears="mlp", rank=2)
    assert not changed(source, healed)
    assert report.summary["unchanged_tensors"] == len(source.names())
    assert set(healed.adapter.ranks.values()) == {2}
    assert all(".mlp." in path for path in healed.adapter.paths)
    assert report.summary["ppl_healed"] < report.summary["ppl_unhealed"]
    assert report.summary["recovered"] > 0


def test_codes_in_memory_train_as_their_weights_do(tmp_path):
    source = quantized(tmp_path, bits=3, group_size=32)
    rows = [heal(source, tmp_path / m, m)[0].rows for m in ("lora", "qlora")]
    for one, other in zip(*rows, strict=True):
        assert one["heldout_loss"] == pytest.approx(other["heldout_loss"], rel=1e-4)


def test_norms_train_beside_codes(tmp_path):
    source = quantized(tmp_path, bits=4, group_size=32)
    _, healed = heal(source, tmp_path / "out", "norms")
    assert changed(source, healed) == {name for name in source.names() if "norm" in name}


@pytest.mark.parametrize("method", ["full", "last-k", "lisa", "neighbours"])
def test_codes_cannot_be_trained(tmp_path, method):
    pruned(tmp_path, [1], intermediate_size=128)
    run("quantize", Checkpoint(tmp_path / "pruned"), tmp_path / "packed", method="rtn", bits=4)
    with pytest.raises(
        ConfigError, match=rf"`{method}` trains weights, but .* stored as codes"
    ) as e:
        heal(Checkpoint(tmp_path / "packed"), tmp_path / "out", method)
    assert "qlora" in e.value.hint


def test_what_does_not_fit_together_is_refused(checkpoints, tmp_path):
    source = checkpoints("llama")
    with pytest.raises(ConfigError, match=r"trains beside codes, but .* are dense") as error:
        heal(source, tmp_path / "out", "qlora")
    assert "quantize first" in error.value.hint
    with pytest.raises(ConfigError, match="cannot be merged into the codes"):
        heal(quantized(tmp_path, bits=4, group_size=32), tmp_path / "out", "lora", merge=True)
    for name, count in (("last-k", "last"), ("lisa", "active")):
        with pytest.raises(ConfigError, match=f"--{count} 7`: there are 6 blocks"):
            heal(source, tmp_path / "out", name, **{count: 7})
    with pytest.raises(ConfigError, match="give only one of"):
        heal(source, tmp_path / "out", "lora", tokens=5)
    for values in ({"top": 4}, {"teacher": "disk"}, {"distill": "hidden", "temperature": 2.0}):
        with pytest.raises(ConfigError, match="does nothing with `distill`"):
            heal(source, tmp_path / "out", "lora", **values)
    half = make_runtime(RuntimeSettings(dtype="float16", device="cpu"))
    with pytest.raises(ConfigError, match="gradients do not fit float16"):
        heal(source, tmp_path / "out", "lora", runtime=half)


def test_too_little_text_is_refused(checkpoints, tmp_path):
    source = checkpoints("llama")
    with pytest.raises(CheckpointError, match="gives 3 sequences to learn from, fewer than the 4"):
        heal(source, tmp_path / "out", "lora", samples=3)
    with pytest.raises(CheckpointError, match="18 sequences beside those kept back to judge by"):
        heal(source, tmp_path / "out", "lora", samples=20)
    np.save(tmp_path / "tokens.npy", tokens(1, 16).numpy())
    with pytest.raises(CheckpointError, match="too little to learn from and to judge by"):
        heal(source, tmp_path / "out", "lora", samples=1, sequences=1)


def test_held_out_text_is_what_nothing_was_learned_from(tmp_path):
    """Of ids, the last tenth, which `eval` then finds as perplex as the report says."""
    source = Checkpoint(save_tiny(tmp_path / "model"))
    report, healed = heal(source, tmp_path / "out", "lora")
    ids = np.load(tmp_path / "tokens.npy")
    (tmp_path / "last").mkdir()
    np.save(tmp_path / "last" / "tokens.npy", ids[18:])
    assert report.summary["heldout"]["sequences_used"] == 2
    for name, checkpoint in (("unhealed", source), ("healed", healed)):
        values = {"dataset": str(tmp_path / "last" / "tokens.npy"), "speed": False}
        found = run("eval", checkpoint, tmp_path / name, against=str(checkpoint.path), **values)
        assert found.rows[0]["ppl"] == pytest.approx(report.summary[f"ppl_{name}"], rel=1e-5)
    assert report.rows[0]["heldout_ppl"] == report.summary["ppl_unhealed"]


def test_a_recipe_keeps_back_what_it_judges_by(tmp_path):
    """Also where a step in front of it reads the same text, all of it."""
    source = model(tmp_path / "model")
    data = str(tmp_path / "tokens.npy")
    np.save(data, tokens(20, 16, seed=5).numpy())
    steps = tuple(
        make_step(stage, values, where="test")
        for stage, values in (
            ("prune", {"method": "shortgpt", "blocks": 1}),
            ("heal", {"method": "norms", **FEW}),
        )
    )

    def recipe(samples):
        text = CalibrationSettings(dataset=data, samples=samples, length=16)
        return Recipe(str(source.path), text, RuntimeSettings(), steps)

    with pytest.raises(CheckpointError, match="18 sequences beside those kept back to judge by"):
        run_recipe(recipe(20), tmp_path / "all", RUNTIME)
    outcomes = run_recipe(recipe(18), tmp_path / "most", RUNTIME)
    assert outcomes[1].report.summary["heldout"]["sequences_used"] == 2
    report = run("heal", Checkpoint(outcomes[0].path), tmp_path / "alone", method="norms", **FEW)
    assert report.rows == outcomes[1].report.rows
    assert Checkpoint(tmp_path / "alone").key == outcomes[1].key


def test_as_much_is_read_as_is_used(tmp_path):
    """Unless told otherwise; of ids all there are, and no text more often than it has parts."""
    source = Checkpoint(save_tiny(tmp_path / "model"))
    many = {"steps": 50, "sequences": 8}
    report, _ = heal(source, tmp_path / "few", "norms", samples=None)
    assert report.summary["epochs"] == 1 and report.summary["tokens_seen"] == 4 * 4 * 16
    assert read_record(tmp_path / "few")["calibration"]["sequences_used"] == 16
    heal(source, tmp_path / "all", "norms", samples=None, evaluate_every=50, **many)
    assert read_record(tmp_path / "all")["calibration"]["sequences_used"] == 18
    text = tmp_path / "text.txt"
    text.write_text("abcdefg" * 1000)

    def read(method="norms", stage="heal", samples=None, **values):
        step = make_step(stage, {"method": method, **values}, where="test")
        asked = CalibrationSettings(dataset=str(text), length=16, samples=samples)
        return load_data(step, source, asked, RUNTIME, tmp_path).record["sequences_used"]

    assert read(**many) == 6300 // 16 and read(samples=7, **many) == 7
    assert read(steps=3) == read(tokens=3 * 8 * 16 + 5) == 24
    assert read("gptq", "quantize") == read("rilq", "compensate") == 128
    text.write_text("abcdefg" * 50)  # of a short text as much as ever
    assert read(**many) == 128


def test_a_local_text_keeps_its_end_back(tmp_path):
    checkpoint = Checkpoint(save_tiny(tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(ord("a") + number % 7) for number in range(900)) + "z" * 100)
    settings = CalibrationSettings(dataset=str(text), samples=64, length=16)
    learned = torch.cat(load_calibration(settings, checkpoint, keep_back=True).batches)
    judged = torch.cat(load_heldout(settings, checkpoint, kept_back=True).batches)
    assert len(judged) == 6 and not set(judged.unique().tolist()) & set(learned.unique().tolist())


def test_what_is_said(tmp_path):
    source = pruned(tmp_path, [2])
    report, healed = heal(source, tmp_path / "out", "full", plot=True, steps=5)
    summary, rows = report.summary, report.rows
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    with (tmp_path / "out" / report.files["training"]).open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == list(range(6))
    assert all(row["loss"] and row["rate"] and row["gradient"] for row in table[1:])
    assert (tmp_path / "out" / report.files["plot"]).read_bytes().startswith(b"\x89PNG")
    lost = log(summary["ppl_unhealed"] / summary["ppl_original"])
    gained = log(summary["ppl_unhealed"] / summary["ppl_healed"])
    if lost > 0:
        assert summary["recovered"] == pytest.approx(gained / lost)
    assert summary["tokens_per_second"] > 0
    assert read_record(tmp_path / "out")["step"]["method"] == "full"
    assert not (tmp_path / "out" / "work").exists()
    run("quantize", healed, tmp_path / "next", method="rtn", bits=8, group_size=32)
    assert not list((tmp_path / "next").glob("training.*"))
    with pytest.raises(ResourceError, match="cannot write"):
        write_training(History(), tmp_path / "no", original=None, title="", draws=False)


def test_an_original_that_is_gone_is_a_warning_where_it_is_not_needed(tmp_path):
    source = pruned(tmp_path, [2])
    (tmp_path / "whole").rename(tmp_path / "moved")
    report, _ = heal(source, tmp_path / "out", "norms")
    assert any("is gone" in message for message in report.warnings)
    assert "ppl_original" not in report.summary
    with pytest.raises(CompressoError, match="is gone"):
        heal(source, tmp_path / "not", "norms", distill="logits")
    named = str(tmp_path / "moved")
    report, _ = heal(source, tmp_path / "with", "norms", distill="logits", original=named)
    assert report.summary["ppl_original"] > 1


@pytest.mark.parametrize("original", [None, "whole"])
def test_the_original_is_trusted_as_the_model_is(tmp_path, monkeypatch, original):
    """Where its tokenizer has to be compared, that may be code of its own."""
    source, trusted = pruned(tmp_path, [2]), []
    find = heal_text.original_of

    def found(*values, trust_remote_code=False):
        trusted.append(trust_remote_code)
        return find(*values, trust_remote_code=trust_remote_code)

    monkeypatch.setattr(heal_text, "original_of", found)
    trusting = replace(RUNTIME, trust_remote_code=True)
    named = original and str(tmp_path / original)
    heal(source, tmp_path / "out", "norms", original=named, steps=1, runtime=trusting)
    assert trusted == [True]


@pytest.mark.parametrize(
    ("distill", "teacher"), [("logits", "disk"), ("tail", "disk"), ("hidden", "resident")]
)
def test_an_original_teaches(tmp_path, distill, teacher):
    source = pruned(tmp_path, [2, "m3"])
    values = {"distill": distill, "teacher": teacher, "distill_weight": 0.7}
    report, _ = heal(source, tmp_path / "out", "lora", **values)
    first, last = report.rows[0], report.rows[-1]
    parts = {
        "logits": {"divergence": 0.7},
        "tail": {"divergence": 0.7, "blocks": 0.7},
        "hidden": {"hidden": 0.7, "blocks": 0.7},
    }[distill]
    expected = 0.3 * first["heldout_next_token"]
    expected += sum(share * first[f"heldout_{name}"] for name, share in parts.items())
    assert first["heldout_loss"] == pytest.approx(expected, rel=1e-5)
    assert last["heldout_loss"] < first["heldout_loss"]


def test_a_block_in_front_of_a_gap_learns_what_the_gap_gave():
    assert followed([0, 1, 2, 3], 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert followed([0, 3, 4], 6) == {0: 2, 1: 3, 2: 5}


def test_much_reading_of_little_text_is_a_warning(checkpoints, tmp_path):
    report, _ = heal(checkpoints("llama"), tmp_path / "out", "norms", samples=4, steps=9)
    assert any("read 9 times" in message for message in report.warnings)


def test_no_gain_writes_the_same_model(checkpoints, tmp_path):
    source = checkpoints("llama")
    values = {"rate": 50.0, "patience": 1, "steps": 20}
    report, healed = heal(source, tmp_path / "out", "full", **values)
    assert not changed(source, healed) and report.summary["ended"] == "no further gain"
    assert any("nothing has changed" in message for message in report.warnings)


def test_a_budget_of_tokens_is_steps(checkpoints, tmp_path):
    report, _ = heal(checkpoints("llama"), tmp_path / "out", "norms", steps=None, tokens=200)
    assert report.summary["steps"] == 3 and report.summary["tokens_seen"] == 192


def test_a_rate_that_is_far_too_large_is_said_to_be(checkpoints, tmp_path):
    values = {"rate": 1e38, "evaluate_every": 20, "steps": 20}
    with pytest.raises(NumericalError, match="not finite at step 2") as error:
        heal(checkpoints("llama"), tmp_path / "out", "full", **values)
    assert error.value.exit_code == 4 and "--rate" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_memory_is_asked_for_before_anything_is_loaded(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    load = Load(sequences=4, length=16, rank=0, packed=False)
    everything = Trained(tensors=source.names())
    again, whole = (needed(adapter, source, everything, load, again=a) for a in (True, False))
    assert 24 * source.parameters < again < whole
    adapted = Trained(linears=["model.layers.0.mlp.up_proj"])
    low = Load(sequences=4, length=16, rank=8, packed=False)
    difference = needed(adapter, source, adapted, low, again=False) - needed(
        adapter, source, Trained(), low, again=False
    )
    assert difference == heal_memory.TRAINED_BYTES * 8 * (96 + 64)
    lisa = Trained(
        tensors=everything.tensors, drawn=[[name] for name in everything.tensors], active=1
    )
    at_once = max(source.load(source.names()).values(), key=torch.numel).numel()
    resting = source.parameters - at_once
    assert again - needed(adapter, source, lisa, load, again=True) == 12 * resting
    assert lisa.at_once(source) == at_once and everything.at_once(source) == source.parameters
    for free, asked, message in (
        (whole - 1, "off", "--checkpointing auto"),
        (again - 1, "auto", "--batch-size 1"),
    ):
        monkeypatch.setattr(processes, "free_memory", lambda free=free: free)
        with pytest.raises(ResourceError, match=r"about .*B, but .*B are free") as error:
            heal_memory.decide_checkpointing(adapter, source, everything, load, asked)
        assert message in error.value.hint
    monkeypatch.setattr(processes, "free_memory", lambda: whole - 1)
    assert heal_memory.decide_checkpointing(adapter, source, everything, load, "auto")
    monkeypatch.setattr(processes, "free_memory", lambda: 10**6)
    with pytest.raises(ResourceError, match="are free") as error:
        heal(source, tmp_path / "out", "full")
    assert error.value.hint.endswith("`--seqlen`, or `--method qlora` on quantized weights")


def test_running_blocks_again_gives_the_same_model(checkpoints, tmp_path):
    source = checkpoints("llama")
    found = [
        heal(source, tmp_path / s, "lora", dropout=0.2, checkpointing=s)[1] for s in ("on", "off")
    ]
    assert not changed(*found)
    assert found[0].key == found[1].key  # so that what ran out of memory can go on


def test_a_run_that_took_too_much_memory_goes_on_with_less(checkpoints, tmp_path, monkeypatch):
    """To the same bits; what is trained is no part of what was kept of another setting."""
    source, left = checkpoints("llama"), [3]
    whole = heal(source, tmp_path / "whole", "lora")[1]
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    keep = KeptState.keep

    def killed(self, *values):
        keep(self, *values)
        left[0] -= 1
        if not left[0]:
            raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(KeptState, "keep", killed)
        heal(source, tmp_path / "out", "lora", checkpointing="off")
    assert not changed(heal(source, tmp_path / "out", "lora", checkpointing="on")[1], whole)


def test_the_disk_is_asked_for_before_anything_is_trained(checkpoints, tmp_path, monkeypatch):
    """For the state twice, as it is replaced, or once, and the result."""
    source = checkpoints("llama")
    usage = type("Usage", (), {"free": 32 * source.parameters - 1})
    monkeypatch.setattr(heal_disk.shutil, "disk_usage", lambda _: usage())
    monkeypatch.setattr(TrainingModel, "__enter__", None)  # it does not come to that
    with pytest.raises(ResourceError, match=r"take about .*B on the disk, but .*B free") as error:
        heal(source, tmp_path / "out", "full")
    assert "-o" in error.value.hint and error.value.exit_code == 5
    usage.free += 1
    with pytest.raises(TypeError):
        heal(source, tmp_path / "out", "full")


def test_where_the_teacher_was_is_said(tmp_path):
    report, _ = heal(pruned(tmp_path, [2]), tmp_path / "out", "norms", distill="logits", top=1)
    assert report.summary["teacher"] == "disk"


def test_lisa_says_how_much_it_may_train(checkpoints, tmp_path):
    """Not what the last draw let move."""
    source = checkpoints("llama")
    report, _ = heal(source, tmp_path / "out", "lisa", active=1)
    assert report.summary["trained_parameters"] == source.parameters


@pytest.mark.parametrize("backward", [True, False])
def test_a_run_that_is_stopped_keeps_all_of_its_steps(checkpoints, tmp_path, monkeypatch, backward):
    """In a step, and while it measures; what it took counts on."""
    source, left, passed = checkpoints("llama"), [3], [0.0]
    whole = heal(source, tmp_path / "whole", "full")[1]
    measure, now = Share.measure, time.monotonic

    def stopped(self, *values, **options):
        passed[0] += 1000.0
        left[0] -= options["backward"] is backward
        if not left[0]:
            raise KeyboardInterrupt
        return measure(self, *values, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Share, "measure", stopped)
        patched.setattr(loop.time, "monotonic", lambda: now() + passed[0])
        patched.setattr(loop, "SECONDS_BETWEEN_SAVES", 10.0**9)
        steps = 2 if backward else 4
        with pytest.raises(Interrupted, match=rf"parts and training up to step {steps} are saved"):
            heal(source, tmp_path / "out", "full")
    report, healed = heal(source, tmp_path / "out", "full")
    assert not changed(healed, whole)
    assert 4000 < report.summary["seconds"] < 10_000


def test_a_run_that_is_stopped_does_not_wait_for_a_slow_save(checkpoints, tmp_path, monkeypatch):
    source, left, measure = checkpoints("llama"), [3], Share.measure

    def stopped(self, *values, **options):
        left[0] -= options["backward"]
        if not left[0]:
            raise KeyboardInterrupt
        return measure(self, *values, **options)

    monkeypatch.setattr(Share, "measure", stopped)
    monkeypatch.setattr(loop, "DISK_BYTES_PER_SECOND", 16 * source.parameters / 3.1)
    with pytest.raises(Interrupted, match="0 finished parts are saved"):
        heal(source, tmp_path / "out", "full")
