"""The analyze stage against what hooks on the whole transformers model see."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from math import pi

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import BLOCKS, build, tokens
from torch import nn
from torch.nn.functional import cosine_similarity

from compresso.calibration import sensitivity
from compresso.calibration.data import Calibration
from compresso.calibration.sensitivity import Sensitivity
from compresso.checkpoint.layout import Scheme, pack, quantization_config
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, NumericalError, ResourceError
from compresso.families import FAMILIES
from compresso.kernels.grid import fit_grid, round_to_grid
from compresso.recipe import make_step
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.stages import plots
from compresso.stages.analyze import analyze
from compresso.stages.heatmap import triangle_of

BATCHES = [tokens(3, 20, seed=1), tokens(1, 20, seed=2)]
RECORD = {"dataset": "test", "hash": "text"}


def run(source, target, *, max_memory=10**9, batches=BATCHES, dtype=torch.float32, **settings):
    runtime = Runtime(torch.device("cpu"), dtype, max_memory, trust_remote_code=False)
    step = make_step("analyze", {"plot": False, **settings}, where="test")
    target.mkdir(exist_ok=True)
    return analyze(source, step, Calibration(batches, RECORD), target, runtime)


@torch.no_grad()
def boundaries(model, family):
    """Hidden states (tokens, width) in float64 before, between and after all blocks."""
    blocks = model.get_submodule(FAMILIES[family].blocks)
    seen = [[] for _ in range(len(blocks) + 1)]

    def hook(place):
        def keep(_, inputs, output):
            if place == 0:
                seen[0].append(inputs[0].double())
            seen[place + 1].append((output[0] if isinstance(output, tuple) else output).double())

        return keep

    handles = [block.register_forward_hook(hook(place)) for place, block in enumerate(blocks)]
    for batch in BATCHES:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def cosines(x, y):
    return torch.cat([cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(x, y, strict=True)])


def angle(x, y):
    return float((cosines(x, y).clamp(-1, 1).arccos() / pi).mean())


def test_every_number_is_that_of_the_whole_model(family_name, models, checkpoints, tmp_path):
    report = run(checkpoints(family_name), tmp_path)
    seen = boundaries(models(family_name), family_name)
    assert [row["block"] for row in report.rows] == list(range(BLOCKS))
    for block, row in enumerate(report.rows):
        influence = 1 - float(cosines(seen[block], seen[block + 1]).mean())
        assert row["influence"] == pytest.approx(influence, abs=1e-5)
        expected = [angle(seen[block], later) for later in seen[block + 1 :]]
        assert row["angles"] == pytest.approx(expected, abs=1e-4)
    assert report.summary["tokens"] == report.summary["angle_tokens"] == 80


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "middle"), [("llama", "post_attention_layernorm"), ("gpt2", "ln_2")]
)
def test_similarity_of_the_halves(family, middle, models, checkpoints, tmp_path):
    report = run(checkpoints(family), tmp_path)
    model = models(family)
    seen = boundaries(model, family)
    for index, block in enumerate(model.get_submodule(FAMILIES[family].blocks)):
        between = []
        handle = block.get_submodule(middle).register_forward_pre_hook(
            lambda _, inputs, between=between: between.append(inputs[0].double())
        )
        for batch in BATCHES:
            model(batch, use_cache=False)
        handle.remove()
        row = report.rows[index]
        assert row["attention"] == pytest.approx(
            float(cosines(seen[index], between).mean()), abs=1e-5
        )
        assert row["mlp"] == pytest.approx(
            float(cosines(between, seen[index + 1]).mean()), abs=1e-5
        )


def test_the_last_distance_is_taken_before_the_final_norm(models, checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path)
    last = report.rows[-1]["angles"][0]
    with torch.no_grad():
        normed = [
            models("llama")(batch, output_hidden_states=True).hidden_states[-1].double()
            for batch in BATCHES
        ]
    seen = boundaries(models("llama"), "llama")
    assert last == pytest.approx(angle(seen[-2], seen[-1]), abs=1e-4)
    assert abs(angle(seen[-2], normed) - last) > 1e-3


def test_distances_of_the_last_token_alone(models, checkpoints, tmp_path):
    report = run(checkpoints("qwen2"), tmp_path, tokens="last")
    seen = [[state[:, -1] for state in states] for states in boundaries(models("qwen2"), "qwen2")]
    for block, row in enumerate(report.rows):
        expected = [angle(seen[block], later) for later in seen[block + 1 :]]
        assert row["angles"] == pytest.approx(expected, abs=1e-4)
    assert (report.summary["tokens"], report.summary["angle_tokens"]) == (80, 4)


def test_a_removed_attention_changes_nothing(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[4].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    rows = run(Checkpoint(tmp_path / "model"), tmp_path / "out").rows
    assert rows[2]["attention"] == 1.0 and rows[2]["mlp"] < 0.999
    assert (rows[4]["attention"], rows[4]["mlp"], rows[4]["influence"]) == (1.0, 1.0, 0.0)
    assert rows[4]["angles"][0] < 1e-7


@pytest.mark.parametrize("choice", ["all", "last"])
def test_memory_and_batches_change_nothing(choice, checkpoints, tmp_path):
    whole = run(checkpoints("llama"), tmp_path / "a", tokens=choice)
    spilled = run(checkpoints("llama"), tmp_path / "b", tokens=choice, max_memory=1)
    assert spilled.rows == whole.rows
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["analysis.json"]
    single = [batch[None] for batch in torch.cat(BATCHES)]
    other = run(checkpoints("llama"), tmp_path / "c", tokens=choice, batches=single)
    for row, expected in zip(other.rows, whole.rows, strict=True):
        assert row["influence"] == pytest.approx(expected["influence"], abs=1e-6)
        assert row["angles"] == pytest.approx(expected["angles"], abs=1e-5)


def test_a_full_disk_names_the_way_out(checkpoints, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left on device") as raised:
        run(checkpoints("llama"), tmp_path, max_memory=1)
    assert "--tokens last" in raised.value.hint


def test_a_model_that_overflows_is_refused(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    model.save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    with pytest.raises(NumericalError, match="hidden states are not finite"):
        run(source, tmp_path / "out", dtype=torch.float16)
    assert run(source, tmp_path / "out").rows[1]["influence"] > 0


def test_packed_weights_are_measured_as_what_they_decode_to(tmp_path):
    model, scheme = build("llama"), Scheme(bits=4, group_size=16, symmetric=True)
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    paths.remove("lm_head")
    packed = {}
    with torch.no_grad():
        for path in paths:
            weight = model.get_parameter(f"{path}.weight")
            options = {"bits": 4, "group_size": 16, "symmetric": True}
            grid = fit_grid(weight, **options, scale_dtype=torch.float32, search="minmax")
            codes = round_to_grid(weight, grid)
            packed |= pack(path, codes, torch.float32, symmetric=True)
            weight.copy_(codes.decode())
    model.save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "packed")
    dense = Checkpoint(tmp_path / "dense")
    rest = dense.load(set(dense.names()) - {f"{path}.weight" for path in paths})
    save_file(packed | rest, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    config = dense.config | {"quantization_config": quantization_config(scheme, ignore=["lm_head"])}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    source = Checkpoint(tmp_path / "packed")
    assert source.packed
    report, expected = run(source, tmp_path / "a"), run(dense, tmp_path / "b")
    assert report.rows == expected.rows
    assert report.summary == expected.summary


def test_advice_follows_from_the_scores(checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path)
    rows, triangle = report.rows, triangle_of(report.rows)
    total, each = report.summary["parameters"], rows[0]["parameters"]
    order = sorted(range(BLOCKS), key=lambda block: rows[block]["influence"])
    for ratio, choices in report.summary["advice"].items():
        count = round(float(ratio.rstrip("%")) / 100 * total / each)
        assert count > 0
        start = triangle[count - 1].index(min(triangle[count - 1]))
        expected = {
            "shortgpt": sorted(order[:count]),
            "contiguous": list(range(start, start + count)),
            "tail": list(range(BLOCKS - 1 - count, BLOCKS - 1)),
        }
        blocks = {method: choices[method] for method in expected}
        assert {method: choice["drop"] for method, choice in blocks.items()} == expected
        for choice in blocks.values():
            assert choice["share"] == pytest.approx(count * each / total)
            influence = sum(rows[block]["influence"] for block in choice["drop"])
            assert choice["influence"] == pytest.approx(influence)
        assert choices["contiguous"]["angle"] == triangle[count - 1][start]
        assert choices["tail"]["angle"] == triangle[count - 1][BLOCKS - 1 - count]


def test_advice_says_where_no_block_is_small_enough(tmp_path):
    build("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    report = run(Checkpoint(tmp_path / "model"), tmp_path / "out")
    assert report.summary["advice"]["10%"]["tail"] == {
        "impossible": "0.1 is less than half a block"
    }


def test_the_json_holds_everything(checkpoints, tmp_path):
    report = run(checkpoints("llama"), tmp_path)
    record = json.loads((tmp_path / "analysis.json").read_text())
    assert Report.from_json(record) == Report.from_json(json.loads(json.dumps(report.to_json())))
    assert record["source"]["key"] == checkpoints("llama").key
    assert record["step"]["tokens"] == "all"
    assert record["calibration"] == RECORD
    assert record["versions"]["torch"] == torch.__version__


def test_a_picture_is_drawn_twice_alike(checkpoints, tmp_path):
    for name in ("a", "b"):
        report = run(checkpoints("llama"), tmp_path / name, plot=True)
        assert report.files == {
            "analysis": "analysis.json",
            "png": "analysis.png",
            "svg": "analysis.svg",
        }
    for file in ("analysis.png", "analysis.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "analysis.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="the picture needs `matplotlib`") as raised:
        run(checkpoints("llama"), tmp_path, plot=True)
    assert raised.value.hint == "pip install 'compresso-llm[plot]'"
    imported = builtins.__import__

    def refuse(name, *arguments):
        assert not name.startswith("matplotlib")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert run(checkpoints("llama"), tmp_path, plot=None).files == {"analysis": "analysis.json"}


@pytest.mark.parametrize(("family", "quantizer"), [("llama", "gptq"), ("gpt2", "rtn")])
def test_sensitivity_of_every_group(family, quantizer, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "noise_levels", lambda: [0.01, 0.02])
    options = {"sensitivity": True, "quantizer": quantizer, "group_size": 16}
    report = run(checkpoints(family), tmp_path / "a", **options)
    rows = report.summary["sensitivity"]
    assert [row["block"] for row in rows] == [block for block in range(BLOCKS) for _ in range(4)]
    assert [tuple(row["linears"]) for row in rows[:4]] == list(FAMILIES[family].linears)
    for bits in (2, 3, 4, 8):
        for block, row in enumerate(report.rows):
            own = rows[4 * block : 4 * block + 4]
            assert row[f"kl_{bits}"] == pytest.approx(sum(group[f"kl_{bits}"] for group in own))
            assert row["slope"] == pytest.approx(sum(group["slope"] for group in own))
    for row in rows:
        assert row["kl_8"] < row["kl_4"] < row["kl_2"]
        assert row["error_8"] < row["error_4"] < row["error_3"] < row["error_2"] < 0.5
        assert row["slope"] > 0 and row["fit"] > 0.5
    recorded = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert recorded["summary"]["sensitivity"] == rows
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["analysis.json"]
    # What was measured stays beside the analysis, and is not measured again.
    kept = sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("*.json"))
    assert kept == ["sensitivity-damage", "sensitivity-noise"]
    monkeypatch.setattr(Sensitivity, "_score", None)
    again = run(checkpoints(family), tmp_path / "b", **options)
    assert again.rows == report.rows and again.summary == report.summary


def test_groups_must_divide(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="has 96 columns, which do not divide into groups of 64"):
        run(checkpoints("llama"), tmp_path, sensitivity=True)
