"""Models whose blocks lack a half, use another block's linears or correct them, or are coded.

This file and coded_linear.py are part of every checkpoint of such a model (`auto_map` in
config.json), so they need nothing but torch and transformers. `Compresso<Base>Config` and
`Compresso<Base>ForCausalLM` are the stock classes of any base with its blocks changed as
`config.compresso` says:

    {
      "blocks": "model.layers",          path of the list of blocks; all other paths are in a block
      "attention": {
        "modules": ["self_attn"],        what a block without attention lacks,
        "norms": ["input_layernorm"],    and the norms that serve it alone
        "linears": ["self_attn.q_proj"],
        "removed": [0, 3]                blocks without attention
      },
      "mlp": {...},                      likewise
      "shared": [0, 0, 2],               the block whose linears each block uses; [] if all its own
      "rank": 8,                         rank of the corrections
      "corrected": [1],                  blocks with a correction of every linear they use
      "coded": {"lm_head": "b3g64"},     linears stored as codes, by path in the model: the kind
      "coded_kinds": {"b3g64": {...}}    of codes, and what each kind means: see coded_linear.py;
                                         both absent if there are none
    }

Everything else in config.json is as it is for the stock model, one entry per block in every list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, cache_utils

from .coded_linear import CodedLinear, out_and_in


class NoAttention(nn.Module):
    """Stands where attention was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Zeros in the shape of `hidden_states`, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """Stands where an MLP, or a linear of one, was removed: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros in the shape of `hidden_states`."""
        return torch.zeros_like(hidden_states)


class SharedLinear(nn.Module):
    """Stands for a linear of another block, and has no weights of its own."""

    def __init__(self, block: nn.Module, path: str) -> None:
        """block: the one that has the linear. path: of the linear in it."""
        super().__init__()
        parent, _, self._name = path.rpartition(".")
        # In a list, the parent is no child of this module: the weights have one name, and are one
        # parameter. The linear is looked up when it is used, as others may replace it.
        self._parent = [block.get_submodule(parent)]

    @property
    def linear(self) -> nn.Module:
        """The one that has the weights."""
        found: nn.Module = getattr(self._parent[0], self._name)
        return found

    @property
    def weight(self) -> Tensor:
        """Its weight, which some models read."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Its bias."""
        return self.linear.bias  # type: ignore[return-value]

    def forward(self, inputs: Tensor) -> Tensor:
        """What the linear answers, without the correction that its own block may add.

        If the linear is wrapped, such as by PEFT, what the wrapper adds is part of the answer.
        """
        linear = owner = self.linear
        while (wrapped := getattr(owner, "base_layer", None)) is not None:
            owner = wrapped
        if owner is not linear:
            return _uncorrected(linear, owner, inputs)
        output: Tensor = linear.forward(inputs)
        return output


class Factor(nn.Module):
    """One of the two factors of a correction: zero until it is loaded.

    It is a linear, but not an `nn.Linear`, so that quantizers leave it alone.
    """

    def __init__(self, columns: int, rows: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return nn.functional.linear(inputs, self.weight, self.bias)


def remove_half(
    block: nn.Module, *, modules: Iterable[str], norms: Iterable[str], attention: bool
) -> None:
    """Take attention, or else the MLP, out of a block.

    modules: paths in the block of what adds to the residual stream. norms: of what serves it alone.
    """
    for path in modules:
        block.set_submodule(path, NoAttention() if attention else NoMlp())
    for path in norms:
        block.set_submodule(path, nn.Identity())


def share_linears(block: nn.Module, owner: nn.Module, paths: Iterable[str]) -> None:
    """Let a block use the linears of another at these paths, in place of its own."""
    for path in paths:
        block.set_submodule(path, SharedLinear(owner, path))


def correct_linears(block: nn.Module, paths: Iterable[str], rank: int) -> None:
    """Let the linears at these paths, own or shared, answer y + up(down(x)) in place of y.

    Adds `<path>.correction_down.weight` (rank, in) and `<path>.correction_up.weight` (out, rank),
    and to a linear with a bias `<path>.correction_up.bias` (out,).
    """
    for path in paths:
        linear = block.get_submodule(path)
        real = linear.linear if isinstance(linear, SharedLinear) else linear
        rows, columns = out_and_in(real)
        linear.correction_down = Factor(columns, rank)
        linear.correction_up = Factor(rank, rows, bias=real.bias is not None)
        # A hook leaves the linear of the class that quantizers look for, and `SharedLinear` can do
        # without it.
        linear.register_forward_hook(_add_correction)


def _uncorrected(wrapper: nn.Module, linear: nn.Module, inputs: Tensor) -> Tensor:
    """What `wrapper` answers when the linear in it leaves its correction out."""
    linear.is_lent = True  # type: ignore[assignment]
    try:
        output: Tensor = wrapper.forward(inputs)
    finally:
        linear.is_lent = False  # type: ignore[assignment]
    return output


def _add_correction(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    if getattr(linear, "is_lent", False):
        return output
    correction: Tensor = linear.correction_up(linear.correction_down(inputs[0]))  # type: ignore[operator]
    return output + correction


def restructure_model(model: nn.Module, plan: dict[str, Any]) -> None:
    """Change the blocks of a stock model. plan: `compresso` of the config, as described above.

    Raises ValueError if the model has another number of blocks.
    """
    blocks = list(model.get_submodule(plan["blocks"]).children())
    halves = (plan["attention"], plan["mlp"])
    owners = plan["shared"] or range(len(blocks))
    named = [*owners, *plan["corrected"], *(block for half in halves for block in half["removed"])]
    if len(owners) != len(blocks) or max(named) >= len(blocks):
        raise ValueError(f"`compresso` in the config is not about a model of {len(blocks)} blocks")
    for path, kind in plan.get("coded", {}).items():
        linear = model.get_submodule(path)
        model.set_submodule(path, CodedLinear(linear, plan["coded_kinds"][kind]))
    for index, block in enumerate(blocks):
        linears: list[str] = []
        for half in halves:
            if index in half["removed"]:
                remove_half(
                    block,
                    modules=half["modules"],
                    norms=half["norms"],
                    attention=half is plan["attention"],
                )
            else:
                linears += half["linears"]
        if owners[index] != index:
            share_linears(block, blocks[owners[index]], linears)
        if index in plan["corrected"]:
            correct_linears(block, linears, plan["rank"])


def _config_class(name: str, stock: Any) -> type:
    def kv_sharing_modes(self: Any) -> list[str | None] | None:
        """Tells caches to keep no slot for a removed attention."""
        removed = self.compresso["attention"]["removed"] if self.compresso else []
        modes = ["reuse" if index in removed else None for index in range(self.num_hidden_layers)]
        return modes if removed else None

    members = {
        "__doc__": f"{stock.__name__} with `compresso`, which the top of this file describes.",
        "__module__": __name__,
        "model_type": f"compresso_{stock.model_type}",
        "compresso": None,
        "kv_sharing_modes": property(kv_sharing_modes),
        "_auto_class": "AutoConfig",  # so that save_pretrained saves this file, too
    }
    return type(name, (stock,), members)


def _model_class(name: str, stock: Any, config_class: type) -> type:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(cache_utils, "DummyLayer"):
            raise ImportError(
                f"{name} needs transformers 5.23 or later, not {transformers.__version__}"
            )
        if not config.compresso:
            raise ValueError(f"the config of {name} has no `compresso`")
        if "coded" in config.compresso and getattr(config, "quantization_config", None):
            raise ValueError(
                f"the linears of this {name} are codes: they cannot be quantized again"
            )
        stock.__init__(self, config, *args, **kwargs)
        restructure_model(self, config.compresso)
        _read_old_names(name, stock)

    members = {
        "__doc__": f"{stock.__name__} with other blocks, as the top of this file describes.",
        "__module__": __name__,
        "__init__": __init__,
        "config_class": config_class,
        "_auto_class": "AutoModelForCausalLM",
    }
    return type(name, (stock,), members)


def _read_old_names(name: str, stock: Any) -> None:
    """Let checkpoints of the class `name` hold tensors under the names that the stock class reads.

    transformers looks them up by the name of the class, and not at all for classes of others
    unless they are registered.
    """
    from transformers import conversion_mapping

    for known in (stock.__name__, stock.config_class.model_type):
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(known)
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
            return


def __getattr__(name: str) -> type:
    """The class of that name, for any base that transformers has; made once."""
    found = re.fullmatch(r"Compresso(\w+?)(Config|ForCausalLM)", name)
    stock: Any = getattr(transformers, f"{found[1]}Config", None) if found else None
    if found is None or stock not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    config_class = _config_class(f"Compresso{found[1]}Config", stock)
    model = f"Compresso{found[1]}ForCausalLM"
    model_class = _model_class(model, MODEL_FOR_CAUSAL_LM_MAPPING[stock], config_class)
    globals().update({config_class.__name__: config_class, model: model_class})
    return config_class if found[2] == "Config" else model_class
