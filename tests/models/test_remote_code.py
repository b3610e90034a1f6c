"""Restructured checkpoints in a process that cannot import compresso, and in one that has."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from coding import affine, save_coded, vector
from restructured import STRUCTURES, reference, save
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

from compresso.families import FAMILIES
from compresso.models import MODEL_TYPES
from compresso.models.structure import MODELING_FILES

IDS = tokens(1, 16)

LOAD = """
import json, sys
if sys.argv[2] != "compresso":
    sys.modules["compresso"] = None  # as if it were not installed
else:
    import compresso.models
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
options = {"trust": {"trust_remote_code": True}, "distrust": {"trust_remote_code": False}}
options = options.get(sys.argv[2], {})
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).eval()
ids = torch.tensor(json.loads(sys.argv[3]))
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
print(json.dumps([type(model).__module__, logits.tolist(), generated.tolist()]))
"""


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name, tmp_path_factory):
    path = tmp_path_factory.mktemp(name) / "restructured"
    saved = save(build(name), STRUCTURES["everything"], path)
    ship_code(path)
    return saved


def ship_code(path):
    for file in MODELING_FILES:
        shutil.copy(file, path)


def load_elsewhere(checkpoint, how, cache):
    """Load in a fresh process, which has no one to answer questions."""
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint.path), how, json.dumps(IDS.tolist())],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cache,
        env={"HF_MODULES_CACHE": str(cache / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )


@pytest.mark.parametrize("how", ["trust", "compresso"])
def test_it_loads_exactly(name, checkpoint, how, tmp_path):
    done = load_elsewhere(checkpoint, how, tmp_path)
    assert done.returncode == 0, done.stderr
    module, logits, generated = json.loads(done.stdout)
    assert module.startswith("transformers_modules." if how == "trust" else "compresso.models.")
    model = reference(name, STRUCTURES["everything"])
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        continued = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=8,
            do_sample=False,
            use_cache=False,
        )
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(torch.tensor(generated), continued)


@pytest.mark.parametrize("how", ["neither", "distrust"])
def test_without_both_it_fails_clearly(checkpoint, how, tmp_path):
    done = load_elsewhere(checkpoint, how, tmp_path)
    assert done.returncode != 0 and "[[" not in done.stdout
    assert "ValueError: The repository" in done.stderr
    assert "contains custom code which must be executed" in done.stderr
    assert "pass the argument `trust_remote_code=True`" in done.stderr.splitlines()[-1]


def test_every_family_is_known_to_transformers():
    assert [f"compresso_{family}" for family in FAMILIES] == MODEL_TYPES


@pytest.mark.parametrize("how", ["trust", "compresso"])
@pytest.mark.parametrize("structure", [None, "everything"])
def test_codes_are_decoded_exactly(how, structure, tmp_path):
    plan = STRUCTURES[structure] if structure else None
    kinds = [vector(), affine()]
    pair = save_coded(build("llama"), tmp_path, kinds, structure=plan, head=True)
    ship_code(pair.coded.path)
    done = load_elsewhere(pair.coded, how, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr and "UNEXPECTED" not in done.stderr
    _, logits, generated = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(pair.dense.path).eval()
    mask = torch.ones_like(IDS)
    continued = model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        assert torch.equal(torch.tensor(logits), model(IDS, use_cache=False).logits)
    assert torch.equal(torch.tensor(generated), continued)


def test_the_code_needs_only_torch_and_transformers():
    own = {f".{file.stem}" for file in MODELING_FILES}
    for file in MODELING_FILES:
        lines = [
            line for line in file.read_text().splitlines() if line.startswith(("import", "from"))
        ]
        names = {line.split()[1] for line in lines} - own
        roots = {name.split(".")[0] for name in names}
        assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}
