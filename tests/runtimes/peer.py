"""Load checkpoints with plain transformers in another environment, and say what they say.

Reads jobs from stdin, as JSON: a list of `path` and `out`. Writes for each, to `out`, logits of
`TOKENS`, and prints a line of JSON with the load report, the class of a linear, and generated ids.
An adapter beside a checkpoint is put on with PEFT. It runs where compresso is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
NEW_TOKENS = 8


@torch.no_grad()
def answer(job):
    tokens = torch.tensor([job["tokens"]])
    model, info = AutoModelForCausalLM.from_pretrained(
        job["path"], dtype="auto", output_loading_info=True
    )
    if (adapter := Path(job["path"]) / "adapter").exists():
        from peft import PeftModel

        PeftModel.from_pretrained(model, adapter)  # on the linears of this model
    logits = model.eval()(input_ids=tokens).logits.float()
    save_file({"logits": logits.contiguous()}, job["out"])
    new = model.generate(
        tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return {
        "problems": {key: sorted(map(str, info[key])) for key in PROBLEMS if info[key]},
        "linear": type(model.model.layers[0].mlp.up_proj).__name__,
        "generated": new[0, tokens.shape[1] :].tolist(),
    }


def main():
    torch.set_num_threads(1)
    for job in json.load(sys.stdin):
        print("ANSWER", json.dumps(answer(job)), flush=True)


if __name__ == "__main__":
    main()
