"""Text as it comes: what `compresso generate` and `compresso chat` write."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from exporting import run_export
from tiny_checkpoint import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso.__main__ import main
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, ResourceError
from compresso.runtimes import memory
from compresso.runtimes.llama_cpp_text import GgufText, choose
from compresso.runtimes.text import Style
from compresso.runtimes.transformers_text import TextModel

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save(path, *, template=None):
    save_tiny(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def opened(path):
    return TextModel.open(Checkpoint(path), device="cpu", dtype=None, trust_remote_code=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return opened(save(tmp_path_factory.mktemp("text") / "chatty", template=TEMPLATE))


def expected(text, new, path):
    """What plain transformers writes after a text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = plain.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


def test_pieces_are_the_text(model):
    pieces = []
    written = model.continue_text("def f(x):", Style(20), pieces.append)
    assert "".join(pieces) == written.text == expected("def f(x):", 20, model.source.path)
    assert len(pieces) > 2 and len(written.tokens) == 20 and written.seconds > 0


def test_characters_come_whole(model, monkeypatch):
    """Tokens of this model are bytes; a character of several is shown when the last has come."""
    text = "aé€\n😀z"
    ids = model.tokenizer.encode(text, special=False)
    assert len(ids) == len(text.encode())

    def generate(*, streamer, input_ids, **_):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(model.model, "generate", generate)
    pieces = []
    model.continue_text("x", Style(99), pieces.append)
    assert pieces == list(text)


def test_drawing_follows_the_seed(model):
    def draw(**values):
        style = Style(12, temperature=2.0, **values)
        return model.continue_text("import", style, lambda piece: None).tokens

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = model.continue_text("import", Style(12), lambda piece: None).tokens
    assert draw(seed=3, top_p=1e-6) == greedy


def test_no_longer_than_the_model_takes(model):
    written = model.continue_text("x" * 60, Style(99), lambda piece: None)
    assert len(written.tokens) == 4
    with pytest.raises(ConfigError, match="takes 64 tokens, and these are 64"):
        model.continue_text("x" * 64, Style(99), lambda piece: None)
    with pytest.raises(ConfigError, match="no tokens to go on from"):
        model.continue_text("", Style(9), lambda piece: None)


def test_answers_follow_the_template(model):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    answer = model.answer(messages, Style(8), lambda piece: None)
    assert answer.text == expected("<system>be<user>hi<assistant>", 8, model.source.path)
    with pytest.raises(CheckpointError, match=r"the chat template of .* says: no tools"):
        model.answer([{"role": "tool", "content": ""}], Style(8), lambda piece: None)


def test_a_model_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"cannot be loaded: it needs about .* and 1 kB are"):
        opened(save_tiny(tmp_path / "m"))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments, lines=""):
        monkeypatch.setattr(sys, "argv", ["compresso", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


def test_generate(model, command):
    path = model.source.path
    text = expected("import os", 10, path)
    assert command("generate", path, "--prompt", "import os", "-n", 10)[:2] == (0, f"{text}\n")
    code, out, err = command("generate", path, "-p", "-", "-n", 10, lines="import os")
    assert (code, out) == (0, f"{text}\n") and "10 tokens in" in err


def test_chat(model, command):
    path = model.source.path
    first = expected("<user>hi<assistant>", 5, path)
    second = expected(f"<user>hi<assistant>{first}<user>go on<assistant>", 5, path)
    lines = "hi\n\ngo on\n/reset\nhi\n/exit\nnever read\n"
    code, out, _ = command("chat", path, "-n", 5, lines=lines)
    assert code == 0 and out == f"{first}\n{second}\n{first}\n"
    told = expected("<system>be<user>hi<assistant>", 5, path)
    assert command("chat", path, "-n", 5, "--system", "be", lines="hi")[1] == f"{told}\n"


def test_what_cannot_be_asked(model, command, tmp_path):
    plain = save_tiny(tmp_path / "plain")
    code, _, err = command("chat", plain, lines="hi\n")
    assert code == 3 and "has no chat template" in err and "compresso generate" in err
    code, _, err = command("generate", plain, "-p", "x", "--top-p", 0.5)
    assert code == 2 and "`--temperature` 0 takes the most likely" in err
    code, _, err = command("generate", plain, "-p", "x", "--temperature", 1, "--top-p", 0)
    assert code == 2 and "`--top-p` must be above 0" in err
    (plain / "tokenizer.json").unlink()
    (plain / "tokenizer_config.json").write_text(json.dumps({}))
    assert command("generate", plain, "-p", "x")[0] == 3


# ---------------------------------------------------------------- GGUF files, in llama.cpp


def test_the_next_token_is_drawn_by_its_share():
    scores = torch.tensor([0.0, 3.0, 1.0, -torch.inf])
    assert choose(scores, Style(1), torch.Generator()) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(scores, Style(1, temperature=2.0), generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert torch.allclose(shares, (scores / 2).softmax(-1), atol=0.03)
    # Token 1 alone has 0.63.
    style = Style(1, temperature=2.0, top_p=0.7)
    assert {choose(scores, style, generator) for _ in range(200)} == {1, 2}
    style = Style(1, temperature=2.0, top_p=0.5)
    assert {choose(scores, style, generator) for _ in range(200)} == {1}


def test_what_llama_cpp_has_not(command, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    for option in (("--dtype", "float16"), ("--trust-remote-code",)):
        code, _, err = command("generate", tmp_path / "m.gguf", "-p", "x", *option)
        assert code == 2 and f"`{option[0]}` has no meaning for a GGUF file" in err


def merging(path):
    """The same with a tokenizer that merges something: llama.cpp takes no other."""
    values = json.loads((path / "tokenizer.json").read_text())
    unused = next(word for word, number in values["model"]["vocab"].items() if number == 0)
    values["model"]["vocab"] = {"im": values["model"]["vocab"].pop(unused)} | values["model"][
        "vocab"
    ]
    values["model"]["merges"] = [["i", "m"]]
    (path / "tokenizer.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, and the same as GGUF."""
    root = tmp_path_factory.mktemp("gguf")
    source = merging(save(root / "source", template=TEMPLATE))
    run_export(Checkpoint(source), root / "out", "gguf", verify=False)
    return source, root / "out"


@pytest.mark.runtimes
def test_gguf_writes_the_same_text(pair, command):
    path, gguf = pair
    text = expected("import os", 10, path)
    for place in (gguf, gguf / "model.gguf"):
        code, out, err = command("generate", place, "-p", "import os", "-n", 10)
        assert (code, out) == (0, f"{text}\n") and "10 tokens in" in err
    written = GgufText.open(gguf).continue_text("x" * 60, Style(99), lambda piece: None)
    assert len(written.tokens) <= 4


@pytest.mark.runtimes
def test_chat_with_gguf(pair, command, tmp_path):
    path, gguf = pair
    first = expected("<user>hi<assistant>", 5, path)
    second = expected(f"<user>hi<assistant>{first}<user>go on<assistant>", 5, path)
    code, out, _ = command("chat", gguf, "-n", 5, lines="hi\ngo on\n")
    assert code == 0 and out == f"{first}\n{second}\n"
    opened = GgufText.open(gguf)
    with pytest.raises(CheckpointError, match=r"the chat template of .* says: no tools"):
        opened.check_chat([{"role": "tool", "content": ""}])
    plain = merging(save_tiny(tmp_path / "plain"))
    run_export(Checkpoint(plain), tmp_path / "no", "gguf", verify=False)
    code, _, err = command("chat", tmp_path / "no", lines="hi\n")
    assert code == 3 and "has no chat template" in err and "compresso generate" in err
