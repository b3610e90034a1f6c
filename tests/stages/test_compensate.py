"""Compensating by `eora`: what it stores, that it is the best there is, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from compensating import TOKENS, logits, lost, prepare, quantized, rows, run, saved, weights
from restructured import STRUCTURES, save
from safetensors.torch import load_file, save_file
from stopping import stopped_after
from tiny_models import build
from transformers import AutoModelForCausalLM
from walking import difference

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError, NumericalError
from compresso.families import family_of
from compresso.kernels.gptq import relative_error
from compresso.kernels.lowrank import LowRank
from compresso.models.structure import structure_of
from compresso.provenance import read_record
from compresso.stages.compensate_forms import KeptFactors, factor_tensors

BASES = {
    "rtn": {"bits": 2},
    "rtn asymmetric": {"bits": 2, "symmetric": False},
    "rtn mixed": {"target_bits": 5.0, "allocation": "zd"},
    "hqq": {"bits": 2},
    "higgs": {"bits": 2, "dimension": 1},
    "nf4": {"group_size": 64},
    "int8": {},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("compensate"))


@pytest.fixture(scope="module")
def model(home):
    """A tiny Llama in bfloat16."""
    return saved(home, "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3)


@pytest.mark.parametrize("name", BASES)
def test_packed_weights_stay_as_they_are(home, model, tmp_path, name):
    """That peft loads what is in memory is proved before anything is published."""
    options = BASES[name]
    if name in ("higgs", "int8"):
        source = run(home, model, tmp_path / "base", "quantize", name, **options).path
    else:
        source = quantized(home, model, tmp_path / "base", name, **options)
    base, found = (
        Checkpoint(source),
        run(home, source, tmp_path / "out", "compensate", "eora", rank=6),
    )
    assert found.config == base.config and found.names() == base.names()
    stored = found.load(found.names())
    for tensor, expected in base.load(base.names()).items():
        assert torch.equal(stored[tensor], expected), tensor
    assert found.adapter is not None and set(found.adapter.ranks.values()) == {6}
    assert len(found.adapter.paths) == 21
    before, after, original = weights(base), weights(found), weights(Checkpoint(model))
    for path, factors in found.adapter.load(found.adapter.paths).items():
        key = f"{path}.weight"
        assert torch.equal(after[key], before[key].float() + factors.product())
        row = rows(found)[path]
        assert row["output_error"] < 0.9 * row["output_error_before"]
        assert row["rank"] == 6 and row["bytes"] == 2 * 6 * sum(original[key].shape)
    assert found.stored_bytes == base.stored_bytes + sum(r["bytes"] for r in rows(found).values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_errors_are_those_of_the_corrected_model(home, tmp_path, family):
    """What reaches a linear is what the model corrected so far makes of the text."""
    path = saved(home, family, torch.float32)
    source = quantized(home, path, tmp_path / "base", bits=2, pack=False)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=5, match=0.0)
    assert found.adapter is None and not found.packed
    model = AutoModelForCausalLM.from_pretrained(found.path).eval()
    original, base = (AutoModelForCausalLM.from_pretrained(one) for one in (path, source))
    known = family_of(family)
    report = list(rows(found).values())
    places = [(block, one) for block in range(6) for one in known.all_linears]
    for (block, linear), row in zip(places, report, strict=True):
        name = f"{known.blocks}.{block}.{linear}"
        assert name.endswith(row["linear"])
        gram = gram_of(model, name)
        whole, now, before = (
            matrix(one, name, turned=known.transposed) for one in (original, model, base)
        )
        assert row["output_error"] == pytest.approx(relative_error(whole, now, gram), rel=1e-2)
        start = relative_error(whole, before, gram)
        assert row["output_error_before"] == pytest.approx(start, rel=1e-2)
        # Norms that subtract the mean leave this without full rank.
        values, vectors = torch.linalg.eigh(gram.double())
        root = vectors * values.clamp(min=0).sqrt()
        left = torch.linalg.svdvals((whole - before).double() @ root)[5:].square().sum()
        energy = ((whole.double() @ gram.double()) * whole).sum()
        assert row["output_error"] == pytest.approx((left / energy).item(), rel=1e-2)


def matrix(model, name, *, turned):
    weight = model.get_parameter(f"{name}.weight").detach().float()
    return weight.T if turned else weight


@torch.no_grad()
def gram_of(model, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    model(TOKENS)
    handle.remove()
    inputs = torch.cat(seen)
    return (inputs.T @ inputs / len(inputs)).float()


def test_full_rank_gives_the_original_back(home, tmp_path):
    path = saved(home, "llama", torch.float32)
    source = quantized(home, path, tmp_path / "base", bits=2, pack=False)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=1000, match=0.0)
    assert difference(logits(found.path), logits(path)) < 1e-3
    assert {row["rank"] for row in rows(found).values()} == {32, 64}


def test_without_weighing_it_is_the_best_for_the_weights(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=5, weighted=False)
    base, original = weights(Checkpoint(source)), weights(Checkpoint(model))
    for name, row in rows(found).items():
        whole = original[f"{name}.weight"].float()
        values = torch.linalg.svdvals(whole - base[f"{name}.weight"].float())
        left = values[5:].square().sum() / whole.square().sum()
        assert row["weight_error"] == pytest.approx(left.item(), rel=2e-2)


def test_matching_makes_up_for_earlier_losses(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2)
    found = {
        match: run(
            home, source, tmp_path / str(match), "compensate", "eora", rank=6, match=match
        ).path
        for match in (0.0, 1.0)
    }
    errors = [lost(path, model) for path in (source, found[0.0], found[1.0])]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("drop", [[1], [2], [0], ["a1", "m2"], ["m1", 2]])
def test_pruned_models_make_up_for_what_is_gone(home, model, tmp_path, drop):
    """By what lies between, and merged: it loads wherever it did."""
    source = run(home, model, tmp_path / "base", "prune", "manual", drop=drop).path
    found = run(home, source, tmp_path / "out", "compensate", "eora")
    assert all(row["rank"] in (32, 64) for row in rows(found).values())
    assert found.config == Checkpoint(source).config and found.adapter is None
    assert found.stored_bytes == Checkpoint(source).stored_bytes
    assert lost(found.path, model) < 0.8 * lost(source, model)


def test_an_adapter_beside_dense_weights(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2, pack=False)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=4, merge=False)
    assert found.adapter is not None and set(found.adapter.ranks.values()) == {4}
    base = Checkpoint(source)
    stored = found.load(found.names())
    assert all(torch.equal(stored[n], tensor) for n, tensor in base.load(base.names()).items())


def test_linears_that_lost_nothing_get_nothing(home, model, tmp_path):
    source = quantized(home, model, tmp_path / "base", bits=2, ignore=["re:.*layers\\.1\\..*"])
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=4, match=0.0)
    assert {row["block"] for row in rows(found).values()} == {0, 2}
    assert len(found.adapter.paths) == 14


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_blocks_that_share_weights_get_their_own_corrections(home, tmp_path, family, packed):
    path = saved(home, family, torch.float32)
    source = run(home, path, tmp_path / "folded", "fold", "foldgpt", blocks=2).path
    shared = structure_of(Checkpoint(source).config).shared
    if packed:
        source = quantized(home, source, tmp_path / "packed", bits=4)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=5, match=0.0)
    structure = structure_of(found.config)
    users = [block for block, owner in enumerate(shared) if owner != block]
    assert structure.shared == shared and structure.rank == 5
    assert structure.corrected == (tuple(range(6)) if packed else tuple(users))
    base = Checkpoint(source)
    kept = found.load(base.names())
    assert all(torch.equal(kept[n], tensor) for n, tensor in base.load(base.names()).items())
    assert found.adapter is None
    for row in rows(found).values():
        assert row["output_error"] < row["output_error_before"]
    if packed:
        assert found.packed
    else:
        assert lost(found.path, path) < 0.95 * lost(source, path)
    grown = found.stored_bytes - base.stored_bytes
    biases = sum(found.info(n).nbytes for n in found.names() if n.endswith("_up.bias"))
    assert bool(biases) == (family == "qwen2")
    assert grown == biases + sum(row["bytes"] for row in rows(found).values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_full_rank_unfolds_a_folded_model(home, tmp_path, family):
    """Biases and all, but for norms, which were never shared."""
    path = saved(home, family, torch.float32)
    source = run(home, path, tmp_path / "folded", "fold", "foldgpt", blocks=2).path
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=64, match=0.0)
    assert difference(logits(found.path), logits(path)) < 1e-3


def test_corrections_of_blocks_can_be_replaced(home, tmp_path):
    path = saved(home, "llama", torch.float32)
    source = run(home, path, tmp_path / "folded", "fold", "foldgpt", blocks=2, rank=2).path
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=7)
    plain = run(home, path, tmp_path / "plain", "fold", "foldgpt", blocks=2).path
    other = run(home, plain, tmp_path / "other", "compensate", "eora", rank=7)
    expected = other.load(other.names())
    assert all(torch.equal(expected[n], t) for n, t in found.load(found.names()).items())


def test_an_adapter_is_replaced(home, model, tmp_path):
    """So codes that were found together with one can have the best one for the text."""
    source = quantized(home, model, tmp_path / "base", "lq-lora", bits=2, rank=4, fisher=False)
    found = run(home, source, tmp_path / "out", "compensate", "eora", rank=4)
    base = Checkpoint(source)
    stored = found.load(found.names())
    assert all(torch.equal(stored[n], tensor) for n, tensor in base.load(base.names()).items())
    assert found.stored_bytes == base.stored_bytes
    assert lost(found.path, model) < 0.9 * lost(source, model)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("packed", {"rank": 3}),
        ("packed", {"size": "+20%", "match": 0.0}),
        ("dense", {"rank": 3}),
        ("folded", {"rank": 3, "match": 0.5}),
    ],
)
def test_a_stopped_run_ends_in_the_same_bytes(home, model, tmp_path, kind, values, monkeypatch):
    source = model
    if kind == "folded":
        source = run(home, model, tmp_path / "folded", "fold", "foldgpt", blocks=1).path
    else:
        source = quantized(home, model, tmp_path / "base", bits=2, pack=kind == "packed")
    whole = run(home, source, tmp_path / "whole", "compensate", "eora", **values)

    def again():
        return run(home, source, tmp_path / "out", "compensate", "eora", **values)

    stopped_after(1, monkeypatch, again)
    resumed = again()
    for part in [*whole.path.glob("*.safetensors"), *whole.path.glob("adapter/*.safetensors")]:
        assert part.read_bytes() == (resumed.path / part.relative_to(whole.path)).read_bytes()
    assert rows(whole) == rows(resumed)


def test_bytes_go_where_they_help(home, model, tmp_path):
    """Ranks differ, and together leave less than one for all that takes as much."""
    source = quantized(home, model, tmp_path / "base", bits=2, ignore=["re:.*\\.0\\.mlp.*"])
    base = Checkpoint(source)
    alike = run(home, source, tmp_path / "alike", "compensate", "eora", rank=8)
    added = alike.stored_bytes - base.stored_bytes
    chosen = run(home, source, tmp_path / "chosen", "compensate", "eora", size=f"+{added}B")
    grown = chosen.stored_bytes - base.stored_bytes
    assert 0.97 * added < grown <= added
    assert len(set(chosen.adapter.ranks.values())) > 3
    left = [sum(row["output_error"] for row in rows(one).values()) for one in (alike, chosen)]
    assert left[1] < left[0]
    share = run(home, source, tmp_path / "share", "compensate", "eora", size="+10%")
    assert 0.09 < (share.stored_bytes - base.stored_bytes) / base.stored_bytes <= 0.1


def test_ranks_go_by_what_linears_lose_themselves(home, model, tmp_path):
    """What uncorrected blocks before them lose is made up for by then."""
    source = quantized(home, model, tmp_path / "base", bits=2)
    ranks = [
        run(home, source, tmp_path / f"{match}", "compensate", "eora", size="+20%", match=match)
        for match in (0.0, 0.5)
    ]
    assert ranks[0].adapter.ranks == ranks[1].adapter.ranks


def test_what_no_output_depends_on_gets_no_bytes(home, tmp_path):
    """The input of a matrix of zeros. Bytes would be there for all."""
    path = saved(home, "llama", torch.float32, hidden_size=64, intermediate_size=128)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    source = quantized(home, path, tmp_path / "base", bits=2)
    found = run(home, source, tmp_path / "out", "compensate", "eora", size="+900%")
    every = {name.removesuffix(".weight") for name in tensors if "_proj" in name}
    unread = {name for name in every if name.startswith("model.layers.1.mlp.")}
    assert len(unread) == 3 and set(found.adapter.paths) == every - unread


def test_where_no_weight_changed_ranks_go_by_what_was_lost_before(home, model, tmp_path):
    source = run(home, model, tmp_path / "base", "prune", "manual", drop=[1]).path
    values = {"merge": False, "size": "+10%"}
    found = run(home, source, tmp_path / "out", "compensate", "eora", **values)
    ranks = found.adapter.ranks
    assert max(ranks, key=ranks.get) == "model.layers.0.mlp.down_proj"  # in front of the gap
    assert len(set(ranks.values())) > 2


def test_without_weights_no_text_is_read(home, model, tmp_path):
    """The text that would be read is not there."""
    source = quantized(home, model, tmp_path / "base", bits=2)
    for method, values in (("eora", {"weighted": False}), ("lq-lora", {"fisher": False})):
        out = tmp_path / method
        found = run(tmp_path, source, out, "compensate", method, rank=3, **values)
        assert found.adapter is not None and read_record(out)["calibration"] is None
    packed = run(tmp_path, model, tmp_path / "packed", "quantize", "lq-lora", fisher=False, rank=3)
    assert packed.packed and packed.adapter is not None
    with pytest.raises(CheckpointError, match="cannot be read as an array"):
        run(tmp_path, source, tmp_path / "out", "compensate", "eora", rank=3)


def test_corrections_of_one_part_are_held_at_a_time():
    alive, most = [], []

    class Target:
        def restore_beside(self, part):
            factors = LowRank(torch.full((2, 1), float(part)), torch.ones(1, 3))
            made = factor_tensors({f"{part}.a": factors, f"{part}.b": factors}, torch.float32)
            alive[:] = [one for one in alive if one() is not None]
            alive.extend(weakref.ref(tensor) for tensor in made.values())
            most.append(len(alive))
            return made

    found = KeptFactors(Target(), 12)
    assert sorted(found) == sorted(f"{part}.{end}" for part in range(12) for end in "ab")
    for path in sorted(found):
        assert found[path].up[0, 0] == float(path.partition(".")[0])
    assert len(most) == 24 and max(most) <= 8  # of two parts, while one follows the other
    assert not KeptFactors(Target(), 0)


def test_a_size_for_blocks_that_share(home, model, tmp_path):
    source = run(home, model, tmp_path / "folded", "fold", "foldgpt", blocks=1).path
    base = Checkpoint(source)
    found = run(home, source, tmp_path / "out", "compensate", "eora", size="+5%")
    rank = structure_of(found.config).rank
    assert rank > 1 and len(structure_of(found.config).corrected) == 2
    assert found.stored_bytes - base.stored_bytes <= 0.05 * base.stored_bytes
    per_rank = (found.stored_bytes - base.stored_bytes) / rank
    assert (rank + 1) * per_rank > 0.05 * base.stored_bytes


def test_a_size_counts_what_is_replaced_and_biases(home, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = saved(home, "qwen2", **sizes)
    folded = run(home, model, tmp_path / "folded", "fold", "foldgpt", blocks=1, rank=2)
    base = Checkpoint(folded.path)
    found = run(home, base.path, tmp_path / "out", "compensate", "eora", size="+20KB")
    assert any(name.endswith("correction_up.bias") for name in found.names())
    assert structure_of(found.config).rank > structure_of(base.config).rank
    exact = found.stored_bytes - base.stored_bytes
    assert exact <= 20_000
    for bytes_added, less in ((exact, 0), (exact - 2, 1)):
        again = run(
            home, base.path, tmp_path / f"{less}", "compensate", "eora", size=f"+{bytes_added}B"
        )
        assert structure_of(again.config).rank == structure_of(found.config).rank - less
    packed = quantized(home, base.path, tmp_path / "packed", bits=2)
    with pytest.raises(ConfigError, match="`size`: 1 B is too little") as refused:
        run(home, packed, tmp_path / "none", "compensate", "eora", size="+1B")
    least = refused.value.hint.removeprefix("rank 1 takes ").replace(" ", "")
    more = run(home, packed, tmp_path / "least", "compensate", "eora", size=f"+{least}")
    assert structure_of(more.config).rank == 1


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("compensate_work.truncate", {}),
        ("compensate_work.moved", {"match": 0.5}),
        ("rank_choice.energies", {"size": "+10%"}),
    ],
)
def test_a_gram_that_cannot_be_used_is_named(home, model, tmp_path, monkeypatch, where, values):
    def refuse(*_, **__):
        raise NumericalError("gram of 64 columns is not positive definite", hint="do it")

    source = quantized(home, model, tmp_path / "base", bits=2)
    monkeypatch.setattr(f"compresso.stages.{where}", refuse)
    expected = r"^`model\.layers\.0\.self_attn\.q_proj`: gram of"
    with pytest.raises(NumericalError, match=expected) as refused:
        run(home, source, tmp_path / "out", "compensate", "eora", **values)
    assert refused.value.hint == "do it"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("packed", {"merge": True}, "cannot be added to the packed weights"),
        ("folded", {"merge": True}, "cannot be added to the weights that blocks"),
        ("dense", {"size": "+5%"}, "so `size` says nothing"),
        ("dense", {"merge": True, "size": "+5%"}, "so `size` says nothing"),
        ("folded", {"size": "+100B"}, "`size`: 100 B is too little"),
        ("packed", {"size": "+1B"}, r"`size`: 1 B is too little to correct any linear"),
        ("packed", {"size": "+0%"}, r"`size`: 0 B is too little to correct any linear"),
        ("dense", {"merge": False, "size": "+1B"}, r"`size`: 1 B is too little to correct any"),
        ("dense", {"merge": False, "size": "+0%"}, r"`size`: 0 B is too little to correct any"),
        ("packed", {"size": "5%"}, "`size` is what to add"),
        ("packed", {"size": "+5%", "rank": 4}, "give only one of `rank`, `size`"),
        ("packed", {"match": 0.5, "weighted": False}, "`match` needs `weighted`"),
        ("pruned", {"match": 0.0}, "has the weight that it has in the original"),
    ],
)
def test_what_is_refused(home, model, tmp_path, kind, values, message):
    source = model
    if kind in ("packed", "dense"):
        source = quantized(home, model, tmp_path / "base", bits=2, pack=kind != "dense")
    if kind == "folded":
        source = run(home, model, tmp_path / "base", "fold", "foldgpt", blocks=1).path
    if kind == "pruned":
        source = run(home, model, tmp_path / "base", "prune", "manual", drop=[1]).path
    with pytest.raises(ConfigError, match=message):
        run(home, source, tmp_path / "out", "compensate", "eora", **values)
    assert not (tmp_path / "out").exists()


def test_a_size_where_nothing_is_lacking(home, model, tmp_path):
    packed = quantized(home, model, tmp_path / "packed", bits=2)
    same = quantized(home, model, tmp_path / "same", bits=2, pack=False)
    values = {"original": str(same), "size": "+5%", "match": 0.0}
    with pytest.raises(ConfigError, match="no linear lacks anything of its output"):
        run(home, packed, tmp_path / "out", "compensate", "eora", **values)
    assert not (tmp_path / "out").exists()


def test_an_original_with_corrections_of_its_own(home, tmp_path):
    """It is followed as it is: shared, and corrected."""
    source = save(build("llama"), STRUCTURES["everything"], tmp_path / "source")
    packed = quantized(home, source.path, tmp_path / "packed", bits=4)
    found = run(home, packed, tmp_path / "out", "compensate", "eora", rank=64, match=0.0)
    structure = structure_of(found.config)
    assert structure.rank == 64 and structure.corrected == tuple(range(6))
    for row in rows(found).values():
        assert row["output_error"] < 1e-6 < row["output_error_before"]
