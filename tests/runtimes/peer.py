"""Load checkpoints with plain transformers in another environment, and say what they say.

Reads jobs from stdin, as JSON: a list of `path`, `out`, `tokens`, and `adapter`, which PEFT puts on
unless it is null. Writes for each, to `out`, logits of the tokens, and prints a line of JSON with
the load report, the class of a linear, and generated ids; or with what PEFT refuses.
It runs where compresso and its tests are not installed.
"""

from __future__ import annotations

import json
import sys

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
    linear = type(model.model.layers[0].mlp.up_proj).__name__
    if job["adapter"] is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, job["adapter"])
        except ValueError as error:
            return {"refused": str(error)}
    logits = model.eval()(input_ids=tokens).logits.float()
    save_file({"logits": logits.contiguous()}, job["out"])
    new = model.generate(
        input_ids=tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return {
        "problems": {key: sorted(map(str, info[key])) for key in PROBLEMS if info[key]},
        "linear": linear,
        "generated": new[0, tokens.shape[1] :].tolist(),
    }


def main():
    torch.set_num_threads(1)
    for job in json.load(sys.stdin):
        print("ANSWER", json.dumps(answer(job)), flush=True)


if __name__ == "__main__":
    main()
