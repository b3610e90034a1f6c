"""Llama-shaped models whose blocks lack attention or MLP, in the config of Nemotron-NAS.

This file is part of every checkpoint that compresso exports as `decilm` (`auto_map` in
config.json), so it needs nothing but torch and transformers. vLLM has its own class of the name
`DeciLMForCausalLM` and reads only the config from here. `block_configs` has an entry per block:

    {"attention": {"no_op": false, "n_heads_in_group": 4},
     "ffn": {"no_op": false, "intermediate_size": 1024}}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class _Entry(dict):  # type: ignore[type-arg]
    """A mapping whose entries are attributes, too, which is how vLLM reads it."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """That of a Llama, with `block_configs`, which the top of this file describes."""

    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        """block_configs: one entry per block, as the top of this file describes."""
        super().__init__(**kwargs)
        self.block_configs = [
            _Entry({half: _Entry(values) for half, values in block.items()})
            for block in block_configs or []
        ]


class NoAttention(nn.Module):
    """Stands where a block has no attention: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Zeros in the shape of `hidden_states`, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """Stands where a block has no MLP: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros in the shape of `hidden_states`."""
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama whose blocks are as `block_configs` says."""

    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: DeciLMConfig) -> None:
        """Raises ValueError if `block_configs` is not about every block, or not of this kind."""
        super().__init__(config)
        if len(config.block_configs) != config.num_hidden_layers:
            raise ValueError("`block_configs` in the config is not about every block")
        slot = 0
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op:
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            else:
                layer.self_attn.layer_idx = slot  # caches have no slot for what keeps nothing
                slot += 1
            if block.ffn.no_op:
                layer.mlp, layer.post_attention_layernorm = NoMlp(), nn.Identity()
            elif block.ffn.intermediate_size != config.intermediate_size:
                raise ValueError("MLPs of several widths are not of compresso's making")
