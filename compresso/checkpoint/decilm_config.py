"""Read what compresso exports as `decilm`: the config.json of Nemotron-NAS, as one of its own."""

from __future__ import annotations

from typing import Any

from compresso.checkpoint.coded import KEY
from compresso.errors import CheckpointError

MODEL_TYPE = "nemotron-nas"
OWN = ("block_configs", "auto_map")
# Such a model is a Llama but for what its blocks lack: see `restructure` of models/structure.py.
ATTENTION = {
    "modules": ["self_attn"],
    "norms": ["input_layernorm"],
    "linears": [f"self_attn.{part}_proj" for part in "qkvo"],
}
MLP = {
    "modules": ["mlp"],
    "norms": ["post_attention_layernorm"],
    "linears": [f"mlp.{part}_proj" for part in ("gate", "up", "down")],
}


def as_our_own(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of Nemotron-NAS as that of a Llama, or of one without some attentions or MLPs.

    config: a parsed config.json of any kind, Nemotron-NAS or not. Not modified.

    Raises CheckpointError if blocks differ in more than what they lack, which compresso does not
    write.
    """
    if config.get("model_type") != MODEL_TYPE:
        return config
    try:
        blocks = config["block_configs"]
        lacking = {
            half: [place for place, block in enumerate(blocks) if block[half]["no_op"]]
            for half in ("attention", "ffn")
        }
        widths = {b["ffn"]["intermediate_size"] for b in blocks if not b["ffn"]["no_op"]}
        heads = {b["attention"]["n_heads_in_group"] for b in blocks if not b["attention"]["no_op"]}
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        alike = widths <= {config["intermediate_size"]} and heads <= {group}
        whole = len(blocks) == config["num_hidden_layers"]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"`block_configs` in config.json cannot be read: {error}") from None
    if not alike or not whole:
        raise CheckpointError(
            f"the blocks of this `{MODEL_TYPE}` have MLPs or heads of several sizes, which"
            " compresso cannot read",
            hint="it reads what `compresso export --format decilm` writes",
        )
    new = {name: value for name, value in config.items() if name not in OWN}
    new |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if not any(lacking.values()):
        return new
    file = "modeling_compresso.Compresso"
    return new | {
        "model_type": "compresso_llama",
        "architectures": ["CompressoLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{file}LlamaConfig",
            "AutoModelForCausalLM": f"{file}LlamaForCausalLM",
        },
        KEY: {
            "blocks": "model.layers",
            "attention": ATTENTION | {"removed": lacking["attention"]},
            "mlp": MLP | {"removed": lacking["ffn"]},
            "shared": [],
            "rank": 0,
            "corrected": [],
        },
    }
