"""Tokenizers in GGUF files: the same tokens in llama.cpp as in the source."""

import json

import gguf
import pytest
import torch
from exporting import run_export
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compresso.checkpoint.hub import resolve
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, GateError
from compresso.formats.gguf import RARE, SAMPLES
from compresso.formats.gguf_vocabulary import PRE_TOKENIZERS, read_vocabulary, tokenizer_json
from compresso.runtimes.llama_cpp_model import Model

TEXT = [
    *[*SAMPLES, *RARE] * 3,
    "the cat and the hat sat on the mat; it isn't that they don't. 2024-11-21",
]
SIZE = 512
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def bytes_with(parts, *, ignore_merges=False):
    """A byte-level tokenizer that splits text as the key of a row of `PRE_TOKENIZERS` says."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = []
    for part in parts:
        if part == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif part == "gpt2":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        else:
            steps.append(pre_tokenizers.Split(Regex(part), "isolated"))
    if "gpt2" not in parts:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def characters(*, prefix):
    """A tokenizer like those of Gemma and the first Llama: bytes for unknown characters."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<|begin|>", "<|end|>", *fallback]
    tokenizer.train_from_iterator(
        ["the cat and the hat sat on the mat"] * 5,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special),
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(content))


def checkpoint(tokenizer, path, *, begin=False, template=None):
    """A tiny Llama with that tokenizer."""
    torch.manual_seed(0)
    if begin:
        token = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", token)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=template,
    )
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    wrapped.save_pretrained(path)
    return Checkpoint(path), wrapped


def fields(path):
    (file,) = path.glob("*.gguf")
    return {name: f.contents() for name, f in gguf.GGUFReader(file).fields.items()}


@pytest.mark.runtimes
@pytest.mark.parametrize(("parts", "ignore"), list(PRE_TOKENIZERS))
def test_bytes_are_split_and_merged_alike(parts, ignore, tmp_path):
    source, wrapped = checkpoint(bytes_with(parts, ignore_merges=ignore), tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    model = Model(str(tmp_path / "out" / "model.gguf"), [], vocabulary=True)
    composed = PRE_TOKENIZERS[parts, ignore] not in ("tekken", "gpt-4o")
    for text in (*SAMPLES, *(RARE if composed else ())):
        assert model.tokenize(text) == wrapped.encode(text, add_special_tokens=False), text


@pytest.mark.runtimes
@pytest.mark.parametrize("prefix", [True, False])
def test_characters_are_merged_alike(prefix, tmp_path):
    source, wrapped = checkpoint(characters(prefix=prefix), tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    model = Model(str(tmp_path / "out" / "model.gguf"), [], vocabulary=True)
    for text in [*SAMPLES, *RARE, "the cat sat on the mat"]:
        assert model.tokenize(text) == wrapped.encode(text, add_special_tokens=False), text


@pytest.mark.runtimes
def test_the_bundled_model_writes_the_same_text(tmp_path):
    source = resolve("reference")
    run_export(Checkpoint(source), tmp_path / "out", "gguf", type="f16", verify=False)
    model = Model(str(tmp_path / "out" / "model-f16.gguf"), [])
    prompt = "def read(path):\n"
    ids = model.tokenize(prompt)
    model.make_room(len(ids) + 24, 1)
    written = model.follow(ids, 24)
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(prompt, return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = stock.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    assert ids + written == expected[: len(ids) + 24]


def test_template_and_special_tokens_are_in_the_file(tmp_path):
    tokenizer = bytes_with(("gpt2",))
    source, wrapped = checkpoint(tokenizer, tmp_path / "source", begin=True, template=TEMPLATE)
    run_export(source, tmp_path / "out", "gguf", verify=False)
    found = fields(tmp_path / "out")
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == wrapped.bos_token_id
    assert found["tokenizer.ggml.eos_token_id"] == wrapped.eos_token_id
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert len(found["tokenizer.ggml.tokens"]) == SIZE
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{SIZE - 1}]"


def test_nothing_is_put_around_a_text_where_the_tokenizer_puts_nothing(tmp_path):
    source, _ = checkpoint(bytes_with(("gpt2",)), tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False)
    assert fields(tmp_path / "out")["tokenizer.ggml.add_bos_token"] is False


def test_a_file_without_a_tokenizer_takes_ids(tmp_path):
    source, _ = checkpoint(bytes_with(("gpt2",)), tmp_path / "source")
    run_export(source, tmp_path / "out", "gguf", verify=False, tokenizer=False)
    assert fields(tmp_path / "out")["tokenizer.ggml.model"] == "no_vocab"


BAD = {
    "words": (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "type `WordLevel`"),
    "unknown split": (lambda: bytes_with((r"\w+|\W+",)), "not known"),
    "whitespace": (lambda: bytes_with(("gpt2",)), "`Whitespace`"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_tokenizers_that_llama_cpp_lacks_are_refused(name):
    make, message = BAD[name]
    tokenizer = make()
    if name == "whitespace":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CheckpointError, match=message) as refused:
        read_vocabulary(json.loads(tokenizer.to_str()), SIZE, pre=None)
    assert "--no-tokenizer" in refused.value.hint


@pytest.mark.parametrize(
    ("normalizer", "kind"),
    [
        (normalizers.Lowercase(), "Lowercase"),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")]), "Replace"),
        (normalizers.NFC(), None),
    ],
)
def test_text_that_is_changed_before_it_is_split(normalizer, kind):
    """Which llama.cpp does not do: without it here to find out, nobody would have noticed."""
    tokenizer = bytes_with(("gpt2",))
    tokenizer.normalizer = normalizer
    content = json.loads(tokenizer.to_str())
    assert read_vocabulary(content, SIZE, pre="gpt-2").pre == "gpt-2"
    if kind is None:
        assert read_vocabulary(content, SIZE, pre=None).pre == "gpt-2"
        return
    with pytest.raises(CheckpointError, match=f"it changes text by `{kind}`"):
        read_vocabulary(content, SIZE, pre=None)


def test_the_spaces_of_characters_are_no_change():
    for prefix in (True, False):
        content = json.loads(characters(prefix=prefix).to_str())
        assert read_vocabulary(content, SIZE, pre=None).space_prefix is prefix


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_second_token_that_ends_a_text(name, tmp_path):
    """Instructed models have several, and say so in either file."""
    source, wrapped = checkpoint(bytes_with(("gpt2",)), tmp_path / "source")
    file = tmp_path / "source" / name
    (tmp_path / "source" / "generation_config.json").unlink()
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | {"eos_token_id": [wrapped.eos_token_id, 7]}))
    run_export(Checkpoint(source.path), tmp_path / "out", "gguf", verify=False)
    assert fields(tmp_path / "out")["tokenizer.ggml.eot_token_id"] == 7


def test_a_tokenizer_in_python_alone_is_refused():
    with pytest.raises(CheckpointError, match="it is a `object`"):
        tokenizer_json(object())


@pytest.mark.runtimes
def test_a_split_of_another_name_is_found_out(tmp_path):
    source, _ = checkpoint(bytes_with((r"\w+|\W+",)), tmp_path / "source")
    with pytest.raises(GateError, match="other tokens of"):
        run_export(source, tmp_path / "out", "gguf", pre_tokenizer="gpt-2")


def test_the_name_of_a_split_can_be_given():
    tokenizer = json.loads(bytes_with((r"\w+|\W+",)).to_str())
    assert read_vocabulary(tokenizer, SIZE, pre="falcon").pre == "falcon"


def test_more_tokens_than_the_model_has_are_refused():
    tokenizer = json.loads(bytes_with(("gpt2",)).to_str())
    with pytest.raises(CheckpointError, match="only 8 tokens") as refused:
        read_vocabulary(tokenizer, 8, pre=None)
    assert "--no-tokenizer" in refused.value.hint
