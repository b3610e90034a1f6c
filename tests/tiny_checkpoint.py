"""A tiny Llama with a tokenizer: a whole checkpoint, as the commands take it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCKS = 4


def save_tiny(path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save one whose tokens are bytes; the weights are always the same."""
    torch.manual_seed(0)
    bytes_only = {byte: number for number, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_only, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=wrapped.eos_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    wrapped.save_pretrained(path)
    (path / "LICENSE").write_text("as you like\n")
    return path
