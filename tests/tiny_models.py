"""One tiny random model per family: `TINY_MODELS` must have a row for every row of `FAMILIES`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCKS = 6
VOCABULARY = 128
LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# Windows are shorter than any tested sequence, and whatever can differ between blocks does.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},
    "qwen2": {
        **LLAMA_LIKE,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen3": {
        **LLAMA_LIKE,
        "head_dim": 24,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
        "tie_word_embeddings": True,
    },
    "gemma2": {**LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {
        **LLAMA_LIKE,
        "head_dim": 24,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
    },
    "phi3": {**LLAMA_LIKE, "sliding_window": 8},
    "olmo2": LLAMA_LIKE,
    "smollm3": {
        **LLAMA_LIKE,
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "granite": {
        **LLAMA_LIKE,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**LLAMA_LIKE, "use_parallel_residual": True},
    "opt": {**LLAMA_LIKE, "ffn_dim": 96},
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of that family in float32, always the same, ready to run.

    changes: fields of its config that differ from its row.
    """
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    fields = {"vocab_size": VOCABULARY, **special, **TINY_MODELS[family], **changes}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        for parameter in model.parameters():
            # Large enough for attention to be uneven; norms and biases matter, too.
            spread = 0.2 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=spread)
    return model.eval()


def tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random ids, (batch, length) int64, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
