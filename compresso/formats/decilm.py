"""Models whose blocks lack attention or MLP, in the config of Nemotron-NAS (DeciLM).

One folder serves transformers, with the modeling file in it, and vLLM, which has such a class of
its own. vLLM has no residual stream before the first attention or MLP of block 0 is read, and fails
where that has no attention (read in its source, 0.33): there, zeros stand for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.decilm_config import MODEL_TYPE
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import CompressedTensorsSettings, DecilmSettings
from compresso.formats.compressed_tensors import PACKAGES, Coding, describe
from compresso.formats.matrices import scheme_of
from compresso.formats.parts import corrections, dense_config, write_parts
from compresso.formats.writing import Export, Written
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import DECILM_FILE, Structure, structure_of
from compresso.models.unfolded import ENTRY, unfolded

FIRST_ATTENTION = (0,)  # among sub-blocks
# Families that compute as Llama does where these fields have these values, if any.
LIKE_LLAMA: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {},
    "mistral": {"sliding_window": (None,)},
    "qwen2": {"use_sliding_window": (False,)},
}
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)
BIASED = ("qwen2",)  # biases of q, k and v, but of no other linear


def write(export: Export) -> Written:
    """Every block with linears of its own, codes kept where compressed-tensors has their form."""
    settings: DecilmSettings = export.settings
    model = unfolded(export.own, fill=FIRST_ATTENTION)
    adapter = export.open(model)
    _check_family(adapter)
    coding = _coding(model, adapter, settings)
    also = _zero_biases(model, adapter)
    pack = coding.pack if coding else lambda matrix: None
    parts = write_parts(export, model, adapter, pack, also=also)
    factors = corrections(export, model, adapter)
    if coding:
        describe(export, coding, parts, corrected=bool(factors))
    if 0 in structure_of(export.own.config).no_attention:
        export.report.warnings.append(
            "the attention of the first block, which was removed, is stored as zeros: vLLM needs it"
        )
    return Written(
        exported=model,
        config=_config(model, adapter) | ({ENTRY: coding.entry()} if coding else {}),
        expected=parts.expected,
        rounded=parts.rounded,
        carried=adapter.unmapped_tensors(),
        files={DECILM_FILE.name: DECILM_FILE},
        rows=parts.rows,
        packages=PACKAGES if coding else {},
        shipped=True,
        adapter=factors,
    )


def _check_family(adapter: ModelAdapter) -> None:
    model_type = adapter.config.model_type.removeprefix("compresso_")
    if model_type not in LIKE_LLAMA:
        raise ConfigError(
            f"`{model_type}` does not compute as Llama does, which `decilm` stands for",
            hint=f"families that do: {', '.join(LIKE_LLAMA)}; for others, export `dense`",
        )
    for field, values in LIKE_LLAMA[model_type].items():
        if (found := getattr(adapter.config, field, None)) not in values:
            raise ConfigError(
                f"`{model_type}` with `{field}` {str(found).lower()} does not compute as Llama"
                " does, which `decilm` stands for",
                hint="export `dense`",
            )


def _coding(model: Checkpoint, adapter: ModelAdapter, settings: DecilmSettings) -> Coding | None:
    """How codes are stored; None if there are none that can be, or none are to be."""
    if not settings.pack or not any(scheme_of(model, path) for path in model.packing.shapes):
        return None
    asked = CompressedTensorsSettings(uniform=settings.uniform)
    return Coding.choose(model, adapter, asked)


def _zero_biases(model: Checkpoint, adapter: ModelAdapter) -> dict[int, dict[str, Tensor]]:
    """The biases out of attention that Llama has if it has those into it: by block, by name."""
    if adapter.config.model_type.removeprefix("compresso_") not in BIASED:
        return {}
    structure = structure_of(model.config)
    blocks = [index for index in range(adapter.count) if index not in structure.no_attention]
    zeros = torch.zeros(adapter.config.hidden_size, dtype=model.dtype)
    return {i: {f"{adapter.block_prefix(i)}self_attn.o_proj.bias": zeros} for i in blocks}


def _config(model: Checkpoint, adapter: ModelAdapter) -> dict[str, Any]:
    """The config.json: a Llama's, with an entry for every block."""
    structure, own = structure_of(model.config), adapter.config
    heads = own.num_attention_heads // own.num_key_value_heads
    entries = [
        {
            "attention": _half(index in structure.no_attention, n_heads_in_group=heads),
            "ffn": _half(index in structure.no_mlp, intermediate_size=own.intermediate_size),
        }
        for index in range(adapter.count)
    ]
    stock = dense_config(model, structure=Structure())
    family = stock["model_type"]
    classes = {"AutoConfig": "DeciLMConfig", "AutoModelForCausalLM": "DeciLMForCausalLM"}
    # All fields, as those that are left out of a config.json have other defaults in Llama's.
    fields = {field: getattr(own, field, None) for field in FIELDS}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {auto: f"{DECILM_FILE.stem}.{name}" for auto, name in classes.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        **{field: value for field, value in fields.items() if value is not None},
        "attention_bias": family in BIASED or bool(getattr(own, "attention_bias", False)),
        "mlp_bias": bool(getattr(own, "mlp_bias", False)),
        "block_configs": entries,
    }


def _half(removed: bool, **size: int) -> dict[str, Any]:
    return {"no_op": removed, **(dict.fromkeys(size, None) if removed else size)}
