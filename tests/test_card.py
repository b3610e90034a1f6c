"""Model cards: what is carried over, what was done, and how it is loaded."""

from __future__ import annotations

import pytest
import yaml
from correcting import calm, run_quantize
from exporting import run_export
from tiny_checkpoint import save_tiny

from compresso.card import CARD, ORIGINAL_CARD, front_matter, hub_name, is_ours
from compresso.checkpoint.reader import Checkpoint
from compresso.provenance import read_record
from compresso.recipe import load_recipe

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
