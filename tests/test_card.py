"""Model cards: what is carried over, what was done, and how it is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from correcting import RUNTIME, calm, corrections, put_beside, run_quantize, save_mixed
from exporting import close, run_export
from huggingface_hub import ModelCard
from tiny_checkpoint import save_tiny
from transformers import AutoModelForCausalLM

from compresso.calibration.replay import replay
from compresso.card import CARD, ORIGINAL_CARD, front_matter, hub_name, is_ours
from compresso.checkpoint.reader import Checkpoint
from compresso.loading import HERE
from compresso.models.tokenizer import Tokenizer
from compresso.provenance import read_record
from compresso.publishing import card_of
from compresso.recipe import load_recipe, make_step
from compresso.run import run_step
from compresso.settings import CalibrationSettings

FRONT = "license: other\nlicense_name: llama\nlicense_link: https://x.y/z\nlanguage:\n- en\n"
USUAL = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model with a card, as the hub's cache has it; quantized; and that exported."""
    root = tmp_path_factory.mktemp("chain")
    source = save_tiny(root / "models--org--tiny" / "snapshots" / "abc")
    (source / CARD).write_text(f"---\n{FRONT}base_model: org/larger\n---\n# Theirs\n")
    packed = run_quantize(Checkpoint(source), root / "packed", **USUAL)
    run_export(packed, root / "out", "dense")
    return source, root / "packed", root / "out"


def run_stage(source, target, stage, **values):
    """The checkpoint that a stage writes that reads no text."""
    step = make_step(stage, values, where="test")
    run_step(step, source, CalibrationSettings(), target, RUNTIME)
    return Checkpoint(target)


def section(text, title):
    """What stands under a heading."""
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_what_is_carried_over(chain):
    source, packed, out = chain
    for path in (packed, out):
        text = (path / CARD).read_text()
        front = front_matter(text)
        assert is_ours(text) and front["base_model"] == "org/tiny"
        assert yaml.safe_load(FRONT).items() <= front.items()
        assert "That of the original: other (llama)." in section(text, "Licence")
        assert "`LICENSE`" in section(text, "Licence")
        assert (path / ORIGINAL_CARD).read_bytes() == (source / CARD).read_bytes()
    assert front_matter((packed / CARD).read_text())["base_model_relation"] == "quantized"


def test_what_was_done(chain, tmp_path):
    """Every step with what was chosen for it, and a recipe that says the same."""
    _, packed, out = chain
    text = (out / CARD).read_text()
    done = section(text, "What was done")
    assert "1. **quantize rtn**: bits 4, group size 32" in done
    assert "2. **export dense**: as it comes" in done
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(done.split("```yaml\n")[1].split("```")[0])
    steps = load_recipe(recipe).steps
    recorded = [read_record(path)["step"] for path in (packed, out)]
    assert [step.to_json() for step in steps] == recorded


def test_sizes_are_of_the_first_and_the_last(chain):
    source, packed, _ = chain
    table = section((packed / CARD).read_text(), "Before and after")
    before, after = Checkpoint(source), Checkpoint(packed)
    assert f"| parameters | {before.parameters:,} | {after.parameters:,} |" in table
    bits = [8 * one.stored_bytes / one.parameters for one in (before, after)]
    assert f"| bits per parameter | {bits[0]:.2f} | {bits[1]:.2f} |" in table
    assert "logits differ by at most" in table


def test_how_it_is_loaded(chain):
    _, packed, out = chain
    loading = section((packed / CARD).read_text(), "How to load it")
    assert "pip install transformers compressed-tensors" in loading
    assert "### vllm" in loading and "vllm serve" in loading and "not run" in loading
    assert "Does not load: `compresso export --format gguf` first." in loading
    code = loading.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "trust_remote_code" not in loading
    assert "compressed-tensors" not in section((out / CARD).read_text(), "How to load it")


RUN_ALL = """
import json, sys
import torch
for folder, code in json.load(sys.stdin).items():
    there = {}
    exec(code, there)
    ids = there["tokenizer"]("import os", return_tensors="pt").input_ids
    with torch.no_grad():
        print(json.dumps([folder, there["model"](ids).logits[0, -1].float().tolist()]))
"""


def test_every_snippet_runs_as_it_is_written(tmp_path, monkeypatch):
    """In a process that knows nothing of compresso; and what it loads is the model."""
    dense = Checkpoint(save_tiny(tmp_path / "tiny"))
    # transformers reads no tokenizer without merges from GGUF, as no real one is.
    values = json.loads((dense.path / "tokenizer.json").read_text())
    values["model"]["vocab"]["im"] = values["model"]["vocab"].pop("ÿ")
    values["model"]["merges"] = [["i", "m"]]
    (dense.path / "tokenizer.json").write_text(json.dumps(values))
    packed = run_quantize(dense, tmp_path / "packed", **USUAL)
    mixed = save_mixed(AutoModelForCausalLM.from_pretrained(dense.path), tmp_path / "mixed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense.path / name, mixed.path)
    put_beside(mixed, tmp_path / "corrected", corrections(mixed), monkeypatch)
    run_quantize(dense, tmp_path / "coded", method="higgs", bits=3)
    run_stage(dense, tmp_path / "halves", "prune", drop=["a1"])
    run_export(packed, tmp_path / "gguf", "gguf", verify=False)
    code = {}
    for folder in ("packed", "corrected", "coded", "halves", "gguf"):
        text = (tmp_path / folder / CARD).read_text().replace(HERE, str(tmp_path / folder))
        assert ModelCard(text).data.tags[0] == "compresso"
        code[folder] = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(code),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = dict(map(json.loads, done.stdout.splitlines()))
    assert list(said) == list(code)
    ids = torch.tensor([Tokenizer.open(dense).encode("import os", special=True)])
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    for folder, logits in said.items():
        source = packed if folder == "gguf" else Checkpoint(tmp_path / folder)
        expected = replay(source, ids, **place, trust_remote_code=False)[0, -1]
        assert close(torch.tensor(logits), expected, 1e-3), folder


def test_a_model_that_was_not_loaded_whole_is_not_said_to_be(chain):
    _, packed, _ = chain
    record = read_record(packed)
    assert "Loaded again in transformers" in card_of(packed, record)
    record["proof"] |= {"generated": None, "cache_difference": None}
    assert "Read again by compresso, block by block," in card_of(packed, record)


def test_a_source_that_says_nothing(tmp_path):
    calm("llama").save_pretrained(tmp_path / "x")
    packed = run_quantize(Checkpoint(tmp_path / "x"), tmp_path / "y", **USUAL)
    text = (packed.path / CARD).read_text()
    assert "base_model" not in front_matter(text)
    assert "came without a card" in section(text, "Licence")
    assert not (packed.path / ORIGINAL_CARD).exists()


def test_names_and_metadata(tmp_path):
    cache = tmp_path / "hub" / "models--org--name-1" / "snapshots" / "0f"
    assert hub_name(cache) == "org/name-1" and hub_name(tmp_path) is None
    assert front_matter("# no head") == {} and front_matter("---\n: [\n---\n") == {}
    assert front_matter("---\n- a\n---\n") == {}
