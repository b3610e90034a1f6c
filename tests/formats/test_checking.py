"""What is stored is held against what was to be: every format, and every kind of mistake."""

from dataclasses import replace

import pytest
import torch
from correcting import calm, run_quantize
from exporting import run_export

from compresso.checkpoint import gptq_layout, layout
from compresso.checkpoint.changed import ChangedCheckpoint
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError
from compresso.formats import gguf, matrices, parts
from compresso.formats.checking import check_weights

PATH = "model.layers.0.self_attn.q_proj"
NAME = f"{PATH}.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "llama"
    calm("llama").to(torch.bfloat16).save_pretrained(path)
    return Checkpoint(path)


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "q"
    return run_quantize(dense, target, method="rtn", bits=4, group_size=32)


def with_weight(source, change):
    weight = source.load_weights([NAME])[NAME].clone()
    return ChangedCheckpoint(source, tensors={NAME: change(weight)})


def one_off(weight):
    weight[3, 5] += 0.02 * weight.abs().max()
    return weight


def test_weights_that_are_what_they_were(dense):
    check_weights(dense, with_weight(dense, lambda w: w), rounded=(), carried=())
    check_weights(dense, with_weight(dense, torch.zeros_like), rounded=[NAME], carried=())
    check_weights(dense, with_weight(dense, torch.zeros_like), rounded=(), carried=[NAME])


@pytest.mark.parametrize(
    ("change", "rounded", "message"),
    [
        (one_off, False, "is not stored as it is: a weight is off by"),
        (lambda w: w * torch.nan, False, "is not stored as it is"),
        (lambda w: w[:, :32], False, "is stored with shape"),
        (lambda w: w.roll(1, 0), True, "is not what rounding makes of it: it is off by 1[34]"),
        (lambda w: w.flip(1), True, "is not what rounding makes of it"),
        (lambda w: -w, True, "is off by 200%"),
        (lambda w: w * torch.nan, True, "is not what rounding makes of it"),
    ],
)
def test_weights_that_are_others(change, rounded, message, dense):
    with pytest.raises(GateError, match=message):
        check_weights(
            dense, with_weight(dense, change), rounded=[NAME] if rounded else (), carried=()
        )


def spoil_scale(tensors):
    for name, tensor in tensors.items():
        if name.startswith(PATH) and name.endswith(("scale", "scales")):
            tensor.view(-1)[3] *= 2
    return tensors


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "auto-round"])
def test_one_scale_that_is_written_wrongly(form, packed, tmp_path, monkeypatch):
    """Logits do not tell it from what kernels round, and of formats with no runtime here nobody."""
    for module in (layout, gptq_layout):
        right = module.pack
        monkeypatch.setattr(
            module, "pack", lambda *args, right=right, **named: spoil_scale(right(*args, **named))
        )
    with pytest.raises(GateError, match=f"`{NAME}` is not stored as it is") as caught:
        run_export(packed, tmp_path / "out", form)
    assert "nothing was published" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["dense", "decilm"])
def test_one_dense_weight_that_is_written_wrongly(form, dense, tmp_path, monkeypatch):
    right = parts.dense_tensor

    def wrong(model, name):
        found = right(model, name)
        return one_off(found.clone()) if name == NAME else found

    monkeypatch.setattr(parts, "dense_tensor", wrong)
    with pytest.raises(GateError, match=f"`{NAME}` is not stored as it is"):
        run_export(dense, tmp_path / "out", form)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "auto-round", "bitsandbytes"])
def test_a_tensor_in_the_place_of_another(form, dense, tmp_path, monkeypatch):
    """Of weights that are rounded, so that what is stored is its own measure in the runtime."""
    right = matrices.weight
    for place in ("compresso.formats.recoding", "compresso.formats.bitsandbytes"):
        monkeypatch.setattr(
            f"{place}.weight",
            lambda model, matrix, *, transposed: right(model, matrix, transposed=transposed).roll(
                int(matrix.path == PATH), 0
            ),
        )
    asked = {} if form == "bitsandbytes" else {"bits": 4, "group_size": 32}
    with pytest.raises(GateError, match=f"`{NAME}` is not what rounding makes of it"):
        run_export(dense, tmp_path / "out", form, **asked)


def test_a_proof_that_is_not_wanted(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("compresso.exporting.check_weights", lambda *_, **__: pytest.fail("called"))
    run_export(packed, tmp_path / "out", "gptq", verify=False)


def test_a_gguf_tensor_that_is_written_wrongly(packed, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    right = gguf.encode

    def wrong(model, piece, matrix, **named):
        found = right(model, piece, matrix, **named)
        return replace(found, data=found.data[::-1]) if piece.stored == NAME else found

    monkeypatch.setattr(gguf, "encode", wrong)
    with pytest.raises(GateError, match=f"`{NAME}` is not stored as it is"):
        run_export(packed, tmp_path / "out", "gguf")
