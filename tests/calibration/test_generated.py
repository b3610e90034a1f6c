"""Text that a model writes itself: what stock models say, the same every time, and recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from restructured import STRUCTURES, reference, save
from tiny_checkpoint import save_tiny
from tiny_models import VOCABULARY, build

from compresso.calibration import generated as module
from compresso.calibration.data import load_calibration, load_heldout
from compresso.calibration.generated import Author
from compresso.checkpoint.reader import Checkpoint
from compresso.config import build as build_settings
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.kernels.sampling import draw_tokens
from compresso.models.adapter import ModelAdapter
from compresso.models.sampling import whole, write_tokens
from compresso.runtime import Runtime
from compresso.settings import CalibrationSettings

RUNTIME = Runtime(torch.device("cpu"), torch.float32, 10**9, trust_remote_code=False)
OPTIONS = {"temperature": 0.8, "top_p": 0.9}
FIRST = torch.tensor([5, 90, 17])
DRAWS = torch.rand(3, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def settings(**values):
    given = {"dataset": "self", "samples": 5, "length": 12} | values
    return build_settings(CalibrationSettings, given, where="test")


@torch.no_grad()
def naive(model, first, draws, follows=None):
    """A whole stock model over the whole text for every token."""
    tokens = first[:, None]
    for place in range(1, draws.shape[1]):
        logits = model(tokens, use_cache=False).logits[:, -1]
        drawn = draw_tokens(logits, draws[:, place], **OPTIONS)
        if follows is not None:
            drawn[tokens[:, -1] == follows[0]] = follows[1]
        tokens = torch.cat((tokens, drawn[:, None]), 1)
    return tokens


def written(source, **options):
    adapter = ModelAdapter.open(source, dtype=torch.float32, device=torch.device("cpu"))
    with whole(adapter, source):
        tokens = write_tokens(adapter, FIRST, DRAWS, **OPTIONS, **options)
    assert all(parameter.is_meta for parameter in adapter.model.parameters())
    return tokens


def test_tokens_are_drawn_from_what_stock_models_say(checkpoints, models, family_name):
    """With the cache, beyond every window; and a token that always follows on another."""
    source, model = checkpoints(family_name), models(family_name)
    tokens = written(source)
    assert torch.equal(tokens, naive(model, FIRST, DRAWS))
    follows = (int(tokens[0, 3]), 7)
    forced = written(source, follows=follows)
    assert torch.equal(forced, naive(model, FIRST, DRAWS, follows))
    places = (forced[:, :-1] == follows[0]).nonzero()
    assert len(places) and all(forced[row, place + 1] == 7 for row, place in places)


@pytest.mark.parametrize("kind", ["both kinds", "everything"])
def test_restructured_models_write_as_well(kind, tmp_path):
    source = save(build("llama"), STRUCTURES[kind], tmp_path / "model")
    assert torch.equal(written(source), naive(reference("llama", STRUCTURES[kind]), FIRST, DRAWS))


@pytest.fixture
def author(tmp_path):
    return Author(Checkpoint(save_tiny(tmp_path / "model")), RUNTIME, tmp_path / "kept")


def loaded(author, load=load_calibration, **values):
    return load(settings(**values), author.checkpoint, author=author)


def test_the_same_settings_write_the_same(author, monkeypatch):
    first = loaded(author)
    tokens = torch.cat(first.batches)
    assert tokens.shape == (5, 12) and tokens.dtype == torch.int64
    for file in author.directory.iterdir():
        file.unlink()
    monkeypatch.setattr(module, "ROWS", 2)  # written at once
    assert loaded(author).key == first.key
    more = torch.cat(loaded(author, samples=9).batches)
    assert torch.equal(more[:5], tokens)
    others = [
        loaded(author, seed=1),
        loaded(author, load=load_heldout),
        loaded(author, sampling_temperature=2.0),
        loaded(author, top_p=0.2),
        load_calibration(
            settings(),
            author.checkpoint,
            author=replace(author, runtime=replace(RUNTIME, dtype=torch.bfloat16)),
        ),
    ]
    assert len({first.key, *(other.key for other in others)}) >= 5
    assert len(list(author.directory.iterdir())) == 7


def test_what_was_written_is_kept_beside_outputs(author, monkeypatch):
    first = loaded(author)
    [path] = author.directory.iterdir()

    def never(*_, **__):
        raise AssertionError("it was written again")

    monkeypatch.setattr(module, "write_tokens", never)
    assert loaded(author).key == first.key
    path.write_text("no array")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        loaded(author)
    assert "remove it" in caught.value.hint


def test_the_record_says_who_wrote_and_how(author):
    record = loaded(author, seed=3, sampling_temperature=1.5).record
    assert record["dataset"] == "self" and record["split"] == "calibration"
    assert record["written_by"]["key"] == author.checkpoint.key
    assert record["sampling_temperature"] == 1.5 and record["top_p"] == 1.0
    assert record["seed"] == 3 and record["tokens_used"] == 60
    assert "tokens_available" not in record
    held_out = loaded(author, load=load_heldout).record
    assert held_out["split"] == "held out" and held_out["written_by"] == record["written_by"]


def edit_tokenizer(author, change):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(author.checkpoint.path)
    change(tokenizer)
    tokenizer.save_pretrained(author.checkpoint.path)


def test_sequences_begin_as_texts_do(author, checkpoints):
    end = author.checkpoint.config["eos_token_id"]
    found = loaded(author)
    assert found.record["begins_with"] == "the end token"
    assert set(torch.cat(found.batches)[:, 0].tolist()) == {end}

    from tokenizers.processors import TemplateProcessing

    def begin(tokenizer):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="! $A", special_tokens=[("!", tokenizer.convert_tokens_to_ids("!"))]
        )

    edit_tokenizer(author, begin)
    found = loaded(author, samples=40, length=60)
    assert found.record["begins_with"] == "the start token"
    tokens = torch.cat(found.batches)
    start = int(tokens[0, 0])
    assert start != end and set(tokens[:, 0].tolist()) == {start}
    ended = (tokens[:, :-1] == end).nonzero()
    assert len(ended) > 2 and all(tokens[row, place + 1] == start for row, place in ended)

    alone = Author(checkpoints("llama"), RUNTIME, author.directory)  # has no tokenizer
    found = load_calibration(settings(samples=30), alone.checkpoint, author=alone)
    assert found.record["begins_with"] == "a random token"
    first = torch.cat(found.batches)[:, 0]
    assert len(set(first.tolist())) > 20 and 0 <= int(first.min()) <= int(first.max()) < VOCABULARY


def test_a_model_that_is_too_large_to_write(author, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 10)
    with pytest.raises(ResourceError, match="of memory to write text, but 10 B are free"):
        loaded(author)


def test_a_directory_that_cannot_be_written(author):
    author.directory.write_text("a file")
    with pytest.raises(ResourceError, match="cannot write"):
        loaded(author)


def test_how_to_draw_is_a_setting_of_self_alone():
    with pytest.raises(ConfigError, match="need `dataset` `self`"):
        settings(dataset="stdlib", top_p=0.9)
    with pytest.raises(ConfigError, match="top_p"):
        settings(top_p=0.0)


def test_arrays_are_small_and_whole(author):
    loaded(author)
    [path] = author.directory.iterdir()
    assert np.load(path).dtype == np.int32
