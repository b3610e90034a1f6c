"""What compressed-tensors 0.17, which vLLM asks for, makes of exports for the newest one."""

import json
import subprocess
import sys

import pytest
import torch
from coding import save_coded, uniform
from correcting import PROBE, logits_in_memory
from exporting import close, run_export
from restructured import STRUCTURES
from tiny_models import build

from compresso.checkpoint.reader import Checkpoint

OLD = "0.17.0"
LOAD = """
import json, sys, torch, compressed_tensors
from transformers import AutoModelForCausalLM
paths, tokens = json.load(sys.stdin)
found = {"version": compressed_tensors.__version__}
for path in paths:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", output_loading_info=True, trust_remote_code=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            found[path] = model.eval()(input_ids=torch.tensor(tokens)).logits.float().tolist()
    except Exception as error:
        found[path] = f"{type(error).__name__}: {error}"
json.dump(found, sys.stdout)
"""
CASES = {
    "symmetric": ([uniform(4, symmetric=True)], {}),
    "asymmetric": ([uniform(4)], {}),
    "2 bits": ([uniform(2)], {}),
    "several forms": ([uniform(bits, symmetric=True) for bits in (2, 4, 8)], {}),
    "in one form": ([uniform(4), uniform(2, 16)], {"uniform": True}),
    "embedding and head": (
        [uniform(4)],
        {"embedding_bits": 4, "lm_head_bits": 4, "group_size": 32, "symmetric": False},
    ),
    "everything": ([uniform(4)], {"structure of": "everything"}),
    "3 bits": ([uniform(3, symmetric=True)], {}),
}


@pytest.fixture(scope="module")
def old_package(tmp_path_factory):
    """A directory to put on the path, with nothing in it but the old version."""
    target = tmp_path_factory.mktemp("old")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, *install, f"compressed-tensors=={OLD}"], check=True)
    return target


def export(name, path):
    makers, asked = CASES[name]
    asked = dict(asked)
    structure = STRUCTURES.get(asked.pop("structure of", ""))
    source = save_coded(build("llama"), path, makers, structure=structure).coded
    run_export(source, path / "out", "compressed-tensors", **asked)
    return Checkpoint(path / "out")


@pytest.mark.runtimes
def test_what_an_older_version_loads(old_package, tmp_path):
    written = {}
    for name in CASES:
        (tmp_path / name).mkdir()
        written[name] = export(name, tmp_path / name)
    paths = [str(one.path) for one in written.values()]
    asked = json.dumps([paths, PROBE.tolist()])
    environment = {"PYTHONPATH": str(old_package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=asked, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == OLD
    for name, one in written.items():
        says = found[str(one.path)]
        if name == "3 bits":  # as `loads_with` says
            assert isinstance(says, str)
        else:
            assert not isinstance(says, str), (name, says)
            assert close(torch.tensor(says), logits_in_memory(one, {})), name
