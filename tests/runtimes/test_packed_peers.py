"""GPTQ and auto-round exports, loaded through transformers by gptqmodel and auto-round themselves.

Each has an environment of its own, as they ask for other versions than compresso's: a folder of
its name in `COMPRESSO_PEERS`, or in `.runtimes` of the repository, which scripts/peers.sh makes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from coding import save_coded, uniform
from correcting import PROBE, calm, corrections, put_beside, run_quantize
from exporting import close, run_export
from restructured import save
from safetensors.torch import load_file, save_file

from compresso.calibration.replay import replay
from compresso.checkpoint.gptq_layout import pack
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.formats.uniform import TOLERANCE
from compresso.models.structure import Structure

pytestmark = pytest.mark.runtimes
ENVIRONMENTS = Path(os.environ.get("COMPRESSO_PEERS", Path(__file__).parents[2] / ".runtimes"))
USUAL = {"method": "rtn", "bits": 4, "group_size": 32}


def packed(path, *, dtype=torch.bfloat16, family="llama", **settings):
    calm(family, dtype=dtype).save_pretrained(path / "dense")
    return run_quantize(Checkpoint(path / "dense"), path / "packed", **USUAL | settings)


def mixed(path):
    kinds = [uniform(4, 32), uniform(2, 16), uniform(3, 64), uniform(8, 32, symmetric=True)]
    return save_coded(calm("llama", dtype=torch.bfloat16), path, kinds).coded


def restructured(path):
    structure = Structure(no_attention=(1,))
    dense = save(calm("llama", dtype=torch.bfloat16), structure, path / "dense")
    return run_quantize(dense, path / "packed", **USUAL)


IGNORED = {"ignore": ["model.layers.1.mlp.up_proj"]}
GPTQ = {
    "4 bits": packed,
    "4 bits asymmetric": lambda path: packed(path, symmetric=False),
    "3 bits asymmetric": lambda path: packed(path, bits=3, symmetric=False),
    "2 bits in float32": lambda path: packed(path, bits=2, dtype=torch.float32),
    "8 bits by row": lambda path: packed(path, bits=8, group_size=-1),
    "some left out": lambda path: packed(path, **IGNORED),
    "with biases": lambda path: packed(path, family="qwen2"),
    "restructured": restructured,
}
AUTO_ROUND = {
    "4 bits": packed,
    "3 bits asymmetric": lambda path: packed(path, bits=3, symmetric=False),
    "mixed asymmetric": mixed,
    "head": lambda path: packed(path, lm_head=True),
    "some left out": lambda path: packed(path, **IGNORED),
    "in groups of 8": lambda path: packed(path, bits=2, group_size=8),
    "2 bits in float32": lambda path: packed(path, bits=2, dtype=torch.float32),
    "with biases": lambda path: packed(path, family="qwen2"),
    "restructured": restructured,
}


def answers(peer, paths, folder, *, adapters=False):
    """What every checkpoint says in that environment: its report and its logits, by name.

    adapters: put on that which lies in each.
    """
    python = ENVIRONMENTS / peer / "bin" / "python"
    assert python.exists(), f"no {python}: run `sh scripts/peers.sh`"
    jobs = [
        {
            "path": str(path),
            "out": str(folder / f"{number}.out"),
            "tokens": PROBE[0].tolist(),
            "adapter": str(path / "adapter") if adapters else None,
        }
        for number, path in enumerate(paths.values())
    ]
    done = subprocess.run(
        [python, Path(__file__).parent / "peer.py"],
        input=json.dumps(jobs),
        # Without its compiler, which takes minutes for every form of codes.
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return {
        name: json.loads(line) | (load_file(job["out"]) if Path(job["out"]).exists() else {})
        for name, line, job in zip(paths, said, jobs, strict=True)
    }


def ours(path):
    return replay(
        Checkpoint(path),
        PROBE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        trust_remote_code=False,
    )


def export_all(form, sources, root):
    """Exports by name, and beside them the sources."""
    made = {}
    for number, (name, make) in enumerate(sources.items()):
        (root / str(number)).mkdir()
        source = make(root / str(number))
        run_export(source, root / str(number) / "out", form, verify=False)
        made[name] = (source.path, root / str(number) / "out")
    return made


def check(made, said):
    for name, (source, path) in made.items():
        found = said[name]
        assert not found["problems"], (name, found)
        assert found["linear"] not in ("Linear",), (name, found["linear"])
        for model in (source, path):
            expected = ours(model)
            assert close(found["logits"], expected, TOLERANCE), name
            same = found["logits"].argmax(-1) == expected.argmax(-1)
            assert same.float().mean() >= 0.9, name
        assert len(found["generated"]) == 8


def test_gptq(tmp_path):
    made = export_all("gptq", GPTQ, tmp_path)
    check(made, answers("gptqmodel", {name: out for name, (_, out) in made.items()}, tmp_path))


def test_a_head_of_codes_is_lost(tmp_path):
    """Why none is written: it is left over, and the model has a random one."""
    source = packed(tmp_path, lm_head=True)
    run_export(source, tmp_path / "out", "gptq", verify=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "out" / index["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    parts = source.load(source.packing.names("lm_head"))
    codes = source.packing.uniform("lm_head", parts)
    tensors |= pack("lm_head", codes, less_one=True, ordered=True)
    save_file(tensors, shard, metadata={"format": "pt"})
    del index["weight_map"]["lm_head.weight"]
    index["weight_map"] |= {name: shard.name for name in tensors}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    said = answers("gptqmodel", {"head": tmp_path / "out"}, tmp_path)["head"]
    assert said["problems"]["missing_keys"] == ["lm_head.weight"]
    assert not close(said["logits"], ours(source.path), TOLERANCE)


def adapted(path, monkeypatch):
    """Codes with an adapter beside them."""
    base = packed(path)
    return put_beside(base, path / "beside", corrections(base), monkeypatch)


def test_gptq_with_an_adapter(tmp_path, monkeypatch):
    run_export(adapted(tmp_path, monkeypatch), tmp_path / "out", "gptq", verify=False)
    made = {"out": tmp_path / "out"}
    found = answers("gptqmodel", made, tmp_path, adapters=True)["out"]
    assert close(found["logits"], ours(tmp_path / "out"), TOLERANCE)
    assert not close(found["logits"], ours(tmp_path / "packed"), TOLERANCE)
    assert len(found["generated"]) == 8


def test_auto_round_takes_no_adapter(tmp_path, monkeypatch):
    """Why an export to it refuses one."""
    source = adapted(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="PEFT cannot put the adapter"):
        run_export(source, tmp_path / "refused", "auto-round", verify=False)
    run_export(Checkpoint(tmp_path / "packed"), tmp_path / "out", "auto-round", verify=False)
    shutil.copytree(source.path / "adapter", tmp_path / "out" / "adapter")
    found = answers("autoround", {"out": tmp_path / "out"}, tmp_path, adapters=True)["out"]
    assert "is not supported" in found["refused"]


def test_auto_round(tmp_path):
    made = export_all("auto-round", AUTO_ROUND, tmp_path)
    check(made, answers("autoround", {name: out for name, (_, out) in made.items()}, tmp_path))
