"""What llama.cpp calls the parts of a model, and what it has to be told of them, by family.

Where llama.cpp computes something else than transformers does, the weights are changed so that both
come to the same: rows in another order, ones added to norms, a factor in the queries. What cannot
be made the same is refused. Read in the sources of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure, structure_of

# Feed-forward layers of no width make the `deci` graph skip the rest of the block, attention
# included, or abort: what lacks one gets one of this width, of zeros.
ZERO_WIDTH = 32
ATTENTION_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs a family of ours.

    arch:     its name for it. activation: of the MLP. biases: endings of those it has a place for.
    permuted: whether rows of queries and keys are ordered for rotation in neighbouring pairs.
    shift:    what it wants added to the weights of norms.
    windows:  whether it knows sliding windows.
    tied:     whether it has no place for a head of its own.
    removed:  the architecture, with permuted rows, that runs blocks without one of their halves.
    """

    arch: str
    activation: str = "silu"
    biases: tuple[str, ...] = ATTENTION_BIASES
    permuted: bool = False
    shift: float = 0.0
    windows: bool = False
    tied: bool = False
    removed: str | None = None


LLAMA = Family("llama", biases=(".bias",), permuted=True, removed="deci")
GEMMA = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2", removed="deci"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", GEMMA, shift=1.0, windows=True, tied=True),
    "gemma3_text": Family("gemma3", GEMMA, shift=1.0, windows=True),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of the file.

    name:   in the file. stored: in the checkpoint; None for one that is made up.
    shape:  of the tensor. heads: whose rows are put in another order, within each; 0 for none.
    shift:  is added, then all is multiplied by `factor`.
    fill:   what one that is made up is full of.
    """

    name: str
    stored: str | None
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0
    factor: float = 1.0
    fill: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A model as llama.cpp is to see it.

    blocks: of the checkpoint, by place in the file. heads, key_heads, widths: of each of these.
    window: of those blocks in `windowed`; None if llama.cpp needs to know of none.
    warnings: what the user should know.
    """

    arch: str
    family: Family
    blocks: list[int]
    heads: list[int]
    key_heads: list[int]
    widths: list[int]
    head_size: int
    pieces: list[Piece]
    context: int
    window: int | None
    windowed: list[bool]
    warnings: list[str]


def family_for(model: Checkpoint) -> Family:
    """How llama.cpp runs a model. Raises ConfigError if it is not among those we know it for."""
    stock = model.config["model_type"].removeprefix("compresso_")
    if stock not in FAMILIES:
        raise ConfigError(
            f"the format `gguf` does not know the architecture `{stock}`",
            hint=f"it knows {', '.join(FAMILIES)}",
        )
    return FAMILIES[stock]


def plan_for(model: Checkpoint, adapter: ModelAdapter, rename: Callable[[int, str], str]) -> Plan:
    """Lay a model out for llama.cpp.

    model:   without shared linears or corrections; without removed halves if the family has no
             architecture for that. adapter: its architecture.
    rename:  (place of a block or -1, name in transformers) -> name in the file.

    Raises ConfigError if llama.cpp cannot run it.
    """
    family, config = family_for(model), adapter.config.get_text_config()
    structure = structure_of(model.config)
    every = range(adapter.count)
    blocks = [i for i in every if not (structure.lacks(2 * i) and structure.lacks(2 * i + 1))]
    family = _architecture(family, config, structure, blocks)
    _check(family, config, adapter)
    head_size = _head_size(config)
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    heads = [0 if structure.lacks(2 * block) else queries for block in blocks]
    key_heads = [0 if structure.lacks(2 * block) else keys for block in blocks]
    if not heads[0]:  # where llama.cpp takes the size of a head from
        heads[0] = key_heads[0] = 1
    widths = [
        ZERO_WIDTH if structure.lacks(2 * block + 1) else config.intermediate_size
        for block in blocks
    ]
    context, window, windowed, warnings = _windows(family, config, blocks)
    pieces = _outside(model, adapter, family, rename)
    factor = _query_factor(family, config, len(blocks))
    for place, block in enumerate(blocks):
        pieces += _block(model, adapter, family, block, partial(rename, place), factor)
        if structure.lacks(2 * block) and place == 0:
            pieces += _zero_attention(config.hidden_size, head_size)
        if structure.lacks(2 * block + 1):
            pieces += _zero_mlp(place, config.hidden_size)
    return Plan(
        family.arch,
        family,
        blocks,
        heads,
        key_heads,
        widths,
        head_size,
        pieces,
        context,
        window,
        windowed,
        warnings,
    )


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _architecture(family: Family, config: Any, structure: Structure, blocks: list[int]) -> Family:
    """The one that runs blocks without a half, if any do; or one whose heads may have any size."""
    halved = any(structure.lacks(2 * b) or structure.lacks(2 * b + 1) for b in blocks)
    odd = (
        family.arch == "qwen2"
        and _head_size(config) * config.num_attention_heads != config.hidden_size
    )
    if not halved and not odd:
        return family
    assert family.removed is not None, "its removed halves were to be filled with zeros"
    arch = family.removed if halved else LLAMA.arch
    return Family(arch, family.activation, LLAMA.biases, permuted=True)


def _check(family: Family, config: Any, adapter: ModelAdapter) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise ConfigError(
            f"llama.cpp runs `{family.arch}` with `{family.activation}`, not `{activation}`"
        )
    if family.tied and not adapter.tied:
        raise ConfigError(
            f"llama.cpp has no place for a head of its own in `{family.arch}`",
            hint="a rotated model has one; start from one that was not rotated",
        )
    for name in adapter.stored:
        if name.endswith(".bias") and not name.endswith(family.biases):
            raise ConfigError(f"llama.cpp has no place for `{name}` in `{family.arch}`")
    capped = getattr(config, "attn_logit_softcapping", None)
    if family.arch == "gemma2" and not (capped and config.final_logit_softcapping):
        raise ConfigError("llama.cpp always caps the logits of `gemma2`, which this model does not")
    if family.arch == "gemma3" and capped:
        raise ConfigError("llama.cpp never caps attention in `gemma3`, which this model does")


def _windows(
    family: Family, config: Any, blocks: list[int]
) -> tuple[int, int | None, list[bool], list[str]]:
    """Context, window, the blocks it is for, and what to warn of."""
    context: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    everywhere = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    windowed = [(kinds or everywhere)[block] == "sliding_attention" for block in blocks]
    if not window or not any(windowed):
        return context, None, [], []
    if family.windows:
        return context, window, windowed, []
    if window >= context:
        return context, None, [], []
    warning = (
        f"llama.cpp has no sliding windows in `{family.arch}`: the context is set to the window,"
        f" {window} tokens, up to which both are the same"
    )
    return window, None, [], [warning]


def _query_factor(family: Family, config: Any, blocks: int) -> float:
    """What the queries have to be multiplied by for the attention scale to be that of the model.

    llama.cpp knows it by the number of blocks alone.
    """
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None or not family.arch.startswith("gemma"):
        return 1.0
    large = blocks == {"gemma2": 46, "gemma3": 62}[family.arch]
    taken = config.hidden_size // config.num_attention_heads if large else config.head_dim
    return float((taken / scalar) ** 0.5)


def _outside(
    model: Checkpoint, adapter: ModelAdapter, family: Family, rename: Callable[[int, str], str]
) -> list[Piece]:
    pieces, seen = [], set()
    for name, stored in adapter.stored.items():
        if name.startswith(f"{adapter.family.blocks}.") or stored in seen:
            continue
        seen.add(stored)
        shift = family.shift if name.startswith(adapter.family.final_norm) else 0.0
        pieces.append(Piece(rename(-1, name), stored, model.weight_info(stored).shape, shift=shift))
    return pieces


def _block(
    model: Checkpoint,
    adapter: ModelAdapter,
    family: Family,
    block: int,
    rename: Callable[[str], str],
    factor: float,
) -> list[Piece]:
    config, own = adapter.config.get_text_config(), adapter.module_prefix(block)
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    pieces = []
    for name, stored in adapter.stored.items():
        if not name.startswith(own):
            continue
        path, shape = name.removeprefix(own), model.weight_info(stored).shape
        heads = 0
        if family.permuted:
            heads = queries * path.startswith("self_attn.q_proj.")
            heads += keys * path.startswith("self_attn.k_proj.")
        norm = path.endswith("norm.weight")
        scaled = "self_attn.q_norm." if family.arch == "gemma3" else "self_attn.q_proj."
        piece = Piece(
            rename(name),
            stored,
            shape,
            heads=heads,
            shift=family.shift if norm else 0.0,
            factor=factor if path.startswith(scaled) else 1.0,
        )
        pieces.append(piece)
    return pieces


def _zero_attention(hidden: int, head_size: int) -> list[Piece]:
    """One head of zeros in the first block."""
    shapes = {"q": (head_size, hidden), "k": (head_size, hidden), "v": (head_size, hidden)}
    pieces = [Piece("blk.0.attn_norm.weight", None, (hidden,), fill=1.0)]
    pieces += [Piece(f"blk.0.attn_{part}.weight", None, shape) for part, shape in shapes.items()]
    return [*pieces, Piece("blk.0.attn_output.weight", None, (hidden, head_size))]


def _zero_mlp(place: int, hidden: int) -> list[Piece]:
    shapes = {
        "gate": (ZERO_WIDTH, hidden),
        "up": (ZERO_WIDTH, hidden),
        "down": (hidden, ZERO_WIDTH),
    }
    norm = Piece(f"blk.{place}.ffn_norm.weight", None, (hidden,), fill=1.0)
    return [norm, *(Piece(f"blk.{place}.ffn_{p}.weight", None, s) for p, s in shapes.items())]
