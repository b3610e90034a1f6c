"""Exports for compressed-tensors: repacked where exact, rounded if asked, loaded for real."""

import pytest
import torch
from coding import eight, save_coded, uniform, vector
from correcting import PROBE, corrections, logits_in_memory, put_beside
from exporting import close, loaded_logits, run_export
from peft import PeftModel
from restructured import STRUCTURES, save
from test_dense import SOURCES, packed, stock
from tiny_models import build

from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.formats.matrices import codes
from compresso.kernels.recast import recast

FORM = "compressed-tensors"


def coded(*kinds, **options):
    return lambda path: save_coded(build("llama"), path, [*kinds], **options).coded


def forms(path):
    """How the linears of a checkpoint are stored."""
    packing = Checkpoint(path).packing
    return {Scheme(**packing.kind(linear)) for linear in packing.shapes}


# Sources whose codes are all kept, and the forms that are written.
REPACKED = {
    "symmetric": (coded(uniform(4, symmetric=True)), {Scheme(4, 32, True)}),
    "asymmetric": (coded(uniform(3)), {Scheme(3, 32, False)}),
    "2 bits": (coded(uniform(2, 16)), {Scheme(2, 16, False)}),
    "8 bits, head": (coded(uniform(8), head=True), {Scheme(8, 32, False)}),
    "mixed symmetric": (
        coded(*(uniform(bits, symmetric=True) for bits in (2, 3, 4, 8))),
        {Scheme(bits, 32, True) for bits in (2, 3, 4, 8)},
    ),
    "some symmetric": (coded(uniform(4), uniform(4, symmetric=True)), {Scheme(4, 32, False)}),
    "its own": (SOURCES["mixed"], {Scheme(2, 32, True), Scheme(4, 32, True)}),
    "vectors stay dense": (coded(uniform(4), vector()), {Scheme(4, 32, False)}),
    "everything": (
        coded(uniform(4), structure=STRUCTURES["everything"]),
        {Scheme(4, 32, False)},
    ),
    "halves removed": (
        coded(uniform(2, symmetric=True), structure=STRUCTURES["both kinds"]),
        {Scheme(2, 32, True)},
    ),
    "shared, mixed": (
        coded(
            uniform(2, symmetric=True),
            uniform(4, symmetric=True),
            structure=STRUCTURES["shared"],
        ),
        {Scheme(2, 32, True), Scheme(4, 32, True)},
    ),
    "int8": (packed("qwen3", method="int8"), {Scheme(8, -1, True)}),
}


@pytest.mark.parametrize("kind", REPACKED)
def test_codes_are_repacked(kind, tmp_path):
    make, expected = REPACKED[kind]
    source = make(tmp_path)
    report = run_export(source, tmp_path / "out", FORM).report
    assert forms(tmp_path / "out") == expected
    _, logits = loaded_logits(tmp_path / "out")
    assert close(logits, logits_in_memory(source, {}))
    assert report.summary["weights_rounded_anew"] == 0 and "kl_to_model" not in report.summary
    written = Checkpoint(tmp_path / "out")
    for path in written.packing.shapes:
        name = [f"{path}.weight"]
        new, old = written.load_weights(name)[name[0]], source.load_weights(name)[name[0]]
        # The factors of int8 come in another order.
        assert torch.allclose(new, old, rtol=1e-6) if kind == "int8" else torch.equal(new, old)
    assert sum(row["bytes"] for row in report.rows) == written.stored_bytes
    bits = {scheme.bits for scheme in expected}
    assert report.summary["loads_with"].endswith("0.18 or later" if 3 in bits else "0.15 or later")
    assert bool(report.warnings) == (kind == "vectors stay dense")


def test_codes_of_several_forms_in_one(tmp_path):
    """The only form of asymmetric codes of several widths, and exact."""
    makers = uniform(2, 32), uniform(4, 16), uniform(3, 32, symmetric=True)
    source = coded(*makers)(tmp_path)
    with pytest.raises(ConfigError, match="come in 3 forms, some of them asymmetric") as raised:
        run_export(source, tmp_path / "out", FORM)
    assert "--uniform" in raised.value.hint
    run_export(source, tmp_path / "out", FORM, uniform=True, embedding_bits=4, group_size=16)
    assert forms(tmp_path / "out") == {Scheme(4, 16, False)}
    written = Checkpoint(tmp_path / "out")
    for path in source.packing.shapes:
        name = [f"{path}.weight"]
        assert torch.equal(written.load_weights(name)[name[0]], source.load_weights(name)[name[0]])
    loaded_logits(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_weights_are_rounded_if_asked(family, tmp_path):
    """Embedding and head too; that of qwen3 is tied."""
    source = stock(family, tmp_path / "x")
    asked = {"bits": 4, "embedding_bits": 4, "group_size": 32, "symmetric": False}
    if not source.config.get("tie_word_embeddings"):
        asked["lm_head_bits"] = 4
    report = run_export(source, tmp_path / "out", FORM, **asked).report
    model, logits = loaded_logits(tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    assert close(logits, logits_in_memory(written, {}))
    dense = {name for name in written.names() if name.endswith(".weight")}
    assert not any(written.info(name).shape[-1:] != written.info(name).shape for name in dense)
    assert 0 < report.summary["kl_to_model"] < 1 and report.summary["weights_rounded_anew"]
    # embedding and head are what is stored
    embedding = model.get_input_embeddings().weight
    name = next(
        n for n in written.weight_names() if n.endswith(("embed_tokens.weight", "in.weight"))
    )
    assert torch.equal(embedding, written.load_weights([name])[name])


def test_a_head_of_other_bits(tmp_path):
    source = stock("llama", tmp_path / "x")
    run_export(source, tmp_path / "out", FORM, bits=2, lm_head_bits=8, group_size=32)
    assert forms(tmp_path / "out") == {Scheme(2, 32, True), Scheme(8, 32, True)}
    _, logits = loaded_logits(tmp_path / "out")
    assert close(logits, logits_in_memory(Checkpoint(tmp_path / "out"), {}))


def test_scales_in_8_bits_are_rounded(tmp_path):
    """Codes stay; the products of two scales are rounded to the model's type."""
    model = build("llama").to(torch.bfloat16)
    source = save_coded(model, tmp_path, eight(uniform(4, 16))).coded
    report = run_export(source, tmp_path / "out", FORM).report
    assert {row["stored"] for row in report.rows} == {"rescaled", "kept"}
    assert report.summary["kl_to_model"] < 0.1
    written = Checkpoint(tmp_path / "out")
    for path in source.packing.shapes:
        assert torch.equal(codes(written, path).codes, codes(source, path).codes)


@pytest.mark.parametrize("kind", ["asymmetric", "its own", "everything"])
def test_adapter_beside(kind, tmp_path, monkeypatch):
    bare = REPACKED[kind][0](tmp_path)
    factors = corrections(bare)
    source = put_beside(bare, tmp_path / "corrected", factors, monkeypatch)
    report = run_export(source, tmp_path / "out", FORM).report
    base, _ = loaded_logits(tmp_path / "out")
    with torch.no_grad():
        put_on = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert close(put_on(input_ids=PROBE).logits, logits_in_memory(bare, factors))
    assert any("only after the loaded model" in line for line in report.warnings) == (
        kind == "its own"
    )
    with pytest.raises(ConfigError, match="cannot be merged into its codes exactly"):
        run_export(source, tmp_path / "merged", FORM, merge_adapter=True)


def test_an_adapter_is_merged_into_weights_that_are_rounded_then(tmp_path, monkeypatch):
    bare = stock("llama", tmp_path / "x")
    factors = corrections(bare)
    source = put_beside(bare, tmp_path / "corrected", factors, monkeypatch)
    asked = {"bits": 8, "group_size": 32, "merge_adapter": True}
    run_export(source, tmp_path / "out", FORM, **asked)
    _, logits = loaded_logits(tmp_path / "out")
    assert close(logits, logits_in_memory(bare, factors), 0.05)


def test_stock_structure(tmp_path):
    """Shared codes are copied; halves that were removed are dense zeros."""
    source = REPACKED["everything"][0](tmp_path)
    report = run_export(source, tmp_path / "out", FORM, structure="stock").report
    model, logits = loaded_logits(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert close(logits, logits_in_memory(source, {}))
    assert {"repacked", "zeros", "decoded"} & {row["stored"] for row in report.rows}


REFUSED = {
    "nothing to pack": (
        lambda path: stock("llama", path / "x"),
        {},
        "has codes that `compressed-tensors` can hold",
    ),
    "only vectors": (packed("llama", method="higgs", bits=3), {}, "has codes that"),
    "Conv1D": (lambda path: stock("gpt2", path / "x"), {"bits": 4}, "stored transposed"),
    "tied": (lambda path: stock("qwen3", path / "x"), {"lm_head_bits": 4}, "shares its weights"),
    "columns": (lambda path: stock("llama", path / "x"), {"bits": 4, "group_size": 48}, "divide"),
    "embedding": (
        lambda path: stock("llama", path / "x"),
        {"bits": 4, "embedding_bits": 8},
        "the embedding cannot be stored as codes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, tmp_path):
    make, settings, message = REFUSED[kind]
    source = make(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        run_export(source, tmp_path / "out", FORM, **settings)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "4 bits do not fit in 3"),
        ({"group_size": 24}, "do not divide into groups of 24"),
        ({"symmetric": True}, "have no symmetric form"),
    ],
)
def test_what_no_grid_holds(options, message):
    packed_codes = uniform(4, 16)(8, 64, torch.float32, 0)
    asked = {"bits": 4, "group_size": 16, "symmetric": False, **options}
    with pytest.raises(ValueError, match=message):
        recast(packed_codes, dtype=torch.float32, **asked)


def test_families_that_load(tmp_path):
    """A restructured model of another family on top of codes."""
    source = save(build("gemma2"), STRUCTURES["everything"], tmp_path / "x")
    run_export(source, tmp_path / "out", FORM, bits=4, group_size=32)
    _, logits = loaded_logits(tmp_path / "out")
    assert close(logits, logits_in_memory(Checkpoint(tmp_path / "out"), {}))
