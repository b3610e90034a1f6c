"""Where each model family keeps its parts: one row per family, chosen by `config.model_type`."""

from __future__ import annotations

from dataclasses import dataclass

from compresso.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """What compresso knows about an architecture.

    Paths are module paths of the transformers class. Fields are keys of `config.json`.

    body:             the module that runs the blocks; the paths down to `head` are in the model.
    attention:        module of a block; takes the states that its linears read, and returns a
                      tuple that starts with the output of the last of them. The paths from here
                      on are in a block.
    mlp:              first and last module of the MLP: the first takes the states that its
                      linears read, the last returns the output of the last linear. The two are
                      one module, or have nothing but an activation between them.
    attention_output: module whose output is added to the residual stream. mlp_output: likewise.
    attention_norms:  norms of the block that serve attention alone. mlp_norms: likewise.
    linears:          the four input groups, in execution order: into attention, out of it, into
                      the MLP, out of it.
    old_names:        modules, and the names that older checkpoints have for them.
    transposed:       linears store (in, out), as transformers' Conv1D does.
    parallel:         field that says that attention and MLP read the same input; None if never.
    multiplier:       field that scales both outputs before they are added; None if none does.
    requires:         fields and the only value of each that can be handled.
    count:            field that holds the number of blocks.
    block_lists:      fields that hold one entry per block.
    index_lists:      fields that hold indices of blocks.
    thresholds:       fields that hold an index below which all blocks are of one kind.
    generators:       fields that a block list is made from where config.json has no such list.
    index_maths:      fields that, if true, make what a block computes depend on its index.
    """

    body: str = "model"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: tuple[str, str] = ("mlp", "mlp")
    attention_output: str = "self_attn"
    mlp_output: str = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    linears: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    old_names: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    parallel: str | None = None
    multiplier: str | None = None
    requires: tuple[tuple[str, object], ...] = ()
    count: str = "num_hidden_layers"
    block_lists: tuple[str, ...] = ("layer_types",)
    index_lists: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    index_maths: tuple[str, ...] = ()

    @property
    def all_linears(self) -> list[str]:
        """The linears of all groups, in execution order."""
        return [path for group in self.linears for path in group]


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(thresholds=("max_window_layers",)),
    "qwen3": Family(thresholds=("max_window_layers",)),
    "gemma2": Family(
        attention_output="post_attention_layernorm",
        mlp_output="post_feedforward_layernorm",
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma3_text": Family(
        attention_output="post_attention_layernorm",
        mlp_output="post_feedforward_layernorm",
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        generators=("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    "phi3": Family(
        linears=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
    ),
    "olmo2": Family(
        attention_output="post_attention_layernorm",
        mlp_output="post_feedforward_layernorm",
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
    ),
    "smollm3": Family(
        block_lists=("layer_types", "no_rope_layers"),
        generators=("no_rope_layer_interval",),
    ),
    "granite": Family(multiplier="residual_multiplier"),
    "gpt2": Family(
        body="transformer",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_output="attn",
        attention_norms=("ln_1",),
        mlp_norms=("ln_2",),
        linears=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        transposed=True,
        requires=(("add_cross_attention", False),),
        count="n_layer",
        index_maths=("scale_attn_by_inverse_layer_idx",),
    ),
    "gpt_neox": Family(
        body="gpt_neox",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        attention_output="attention",
        linears=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        old_names=(("lm_head", "embed_out"),),
        parallel="use_parallel_residual",
    ),
    "opt": Family(
        body="model.decoder",
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        mlp=("fc1", "fc2"),
        mlp_output="fc2",
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
        linears=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
}

# What precedes the family's own word in the `model_type` of a model whose structure is not the
# stock one: see structure.py.
RESTRUCTURED = "compresso_"

# Multimodal wrappers nest the text model, its config and its tensor names one level down.
TEXT_ONLY = {"gemma3": "gemma3_text"}


def family_of(model_type: str) -> Family:
    """The row of a family, or of the one a restructured model was made from.

    Raises ConfigError if the family is not known.
    """
    stock = model_type.removeprefix(RESTRUCTURED)
    if stock in FAMILIES:
        return FAMILIES[stock]
    if model_type in TEXT_ONLY:
        raise ConfigError(
            f"`{model_type}` is a multimodal model, of which only text models are supported",
            hint=f"use a checkpoint whose `model_type` is `{TEXT_ONLY[model_type]}`",
        )
    raise ConfigError(
        f"unsupported architecture: `{model_type}`",
        hint=f"supported: {', '.join(sorted(FAMILIES))}; to add one, add its row to `FAMILIES` in "
        "compresso/families.py and to `TINY_MODELS` in tests/tiny_models.py",
    )
