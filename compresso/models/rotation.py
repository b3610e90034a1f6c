"""The same model in other coordinates, in which weights and hidden states have few outliers.

Nothing is left to do at run time: R is orthogonal, and an RMS norm without weights commutes with it
(QuaRot, Ashkboos et al. 2024, without the parts that run online). With hidden states as rows:

    residual stream  h -> h R    embedding: E R; linears that add to the stream: R^T W and b R
    norm weights     n -> 1      linears that read a norm: W diag(n) R
    value heads      v -> v S    linears that make values: S^T W and b S; that read them: W S
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.families import RESTRUCTURED, Family, family_of
from compresso.kernels.orthogonal import random_rotation
from compresso.models.structure import structure_of

LAYER_NORM = ("gpt2", "gpt_neox", "opt")
ROTATABLE = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Families in which nothing but RMS norms and sums comes between linears of the residual stream."""

# Tensors of a block that see neither the residual stream nor the values.
UNTOUCHED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.rotary_emb.inv_freq")
CHUNK = 2**22  # numbers worked on at a time


def rotated(source: Checkpoint, *, seed: int) -> RotatedCheckpoint:
    """A view of `source` as the rotated model, which computes the same up to rounding.

    It is a plain checkpoint of the same family, but never tied: the norm folded into the head makes
    it another matrix than the embedding.

    seed: of R and S, which depend on it and on their sizes alone.

    Raises ConfigError if the model cannot be rotated, CheckpointError if its config.json is wrong.
    """
    return RotatedCheckpoint(source, seed=seed)


@dataclass(frozen=True)
class _Role:
    """Where a tensor meets what is rotated. All False: nowhere.

    reads:     its columns are coordinates of the residual stream. writes: its rows are.
    norm:      name of the weights of the norm that comes before it. ones: it is such weights.
    values:    its rows from this one on are those of value heads. of_values: its columns are.
    """

    reads: bool = False
    writes: bool = False
    norm: str | None = None
    ones: bool = False
    values: int | None = None
    of_values: bool = False


class RotatedCheckpoint(Checkpoint):
    """Reads as a checkpoint does, but every tensor is rotated as it is loaded. Use `rotated`.

    Path, provenance and side files are those of the source; its config is, but for not being
    tied. A tensor is computed part by part in float64, and rounded once to its own type.

    added_bytes: stored bytes that the source does not have: of the head, if it was tied.
    """

    def __init__(self, source: Checkpoint, *, seed: int) -> None:
        """See `rotated`."""
        config = _rotatable(source)
        super().__init__(source.path)
        family = family_of(config.model_type)
        self.config = {**source.config, "tie_word_embeddings": False}
        self._source = source
        self._seed = seed
        embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
        base = "" if embedding in self._infos else f"{family.body}."  # that all names lack
        self._roles = _roles(family, config, base)
        for name in self._infos:
            if name not in self._roles:
                raise ConfigError(
                    f"`{source.path}` cannot be rotated: nobody knows what that makes of `{name}`"
                )
        self._made_from: dict[str, str] = {}
        self.added_bytes = 0
        if head not in self._infos and config.tie_word_embeddings:
            self._made_from[head] = embedding.removeprefix(base)
            taken = self.info(self._made_from[head])
            self._infos = dict(sorted({**self._infos, head: taken}.items()))
            self.added_bytes = taken.nbytes
        generator = torch.Generator().manual_seed(seed)
        self._stream = random_rotation(config.hidden_size, generator)
        self._values = random_rotation(_head_width(config), generator)

    @cached_property
    def key(self) -> str:
        """Identifies the contents: by the source's key and the seed."""
        return hashlib.sha256(f"{self._source.key} rotated {self._seed}".encode()).hexdigest()

    @property
    def plain(self) -> Checkpoint:
        """The checkpoint that this is a view of."""
        return self._source

    @cached_property
    def adapter(self) -> None:
        """What corrects the source is in the weights already."""

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors of the rotated model, on the CPU.

        Raises CheckpointError if one is absent, or the source cannot load it as a weight.
        """
        return {name: self._load(name) for name in dict.fromkeys(names)}

    def _load(self, name: str) -> Tensor:
        self.info(name)
        stored, role = self._made_from.get(name, name), self._roles[name]
        weight = self._source.load_weights([stored])[stored]
        if role.ones:
            return torch.ones_like(weight)
        if role.reads:
            return self._reading(weight, role)
        if role.writes:
            return self._writing(weight, role)
        if role.values is not None:
            return self._turn_values(weight.double(), role.values).to(weight.dtype)
        return weight

    def _reading(self, weight: Tensor, role: _Role) -> Tensor:
        """W diag(n) R of a linear's weight, or E R; and S^T times that for the values' rows."""
        turned = torch.empty_like(weight)
        folded = None if role.norm is None else self._source.load_weights([role.norm])[role.norm]
        for start, stop in self._parts(len(weight), weight.shape[1]):
            rows = weight[start:stop].double()
            rows = self._stream.apply(rows if folded is None else rows * folded)
            if role.values is not None:
                rows = self._turn_values(rows, max(role.values - start, 0))
            turned[start:stop] = rows
        return turned

    def _writing(self, weight: Tensor, role: _Role) -> Tensor:
        """R^T W of a linear's weight, and that times S if it reads values; b R of its bias."""
        if weight.ndim == 1:
            return self._stream.apply(weight.double()).to(weight.dtype)
        turned = torch.empty_like(weight)
        for start, stop in self._parts(weight.shape[1], len(weight)):
            columns = weight[:, start:stop].double()
            if role.of_values:
                columns = self._turn_values(columns.T, 0).T
            turned[:, start:stop] = self._stream.apply(columns.T).T
        return turned

    def _turn_values(self, rows: Tensor, first: int) -> Tensor:
        """S^T times each run of rows that is a value head, from `first` on; likewise of a bias."""
        if first >= len(rows):
            return rows
        heads = rows[first:].unflatten(0, (-1, self._values.size))
        turned = self._values.apply(heads.transpose(1, -1)).transpose(1, -1)
        return torch.cat((rows[:first], turned.flatten(0, 1)))

    def _parts(self, count: int, size: int) -> Iterator[tuple[int, int]]:
        """Cut `count` things of `size` numbers into ranges; none parts a head."""
        step = max(1, CHUNK // (size * self._values.size)) * self._values.size
        for start in range(0, count, step):
            yield start, min(start + step, count)


def _rotatable(source: Checkpoint) -> PreTrainedConfig:
    """The whole config of a model that can be rotated. Raises as `rotated` does."""
    model_type = source.config["model_type"]
    family, stock = family_of(model_type), model_type.removeprefix(RESTRUCTURED)
    reason = None
    if stock in LAYER_NORM:
        reason = "its norms subtract the mean, which depends on the coordinates"
    elif family.attention_output != family.attention:
        reason = "what attention adds passes a norm whose weights depend on the coordinates"
    elif stock not in ROTATABLE:
        reason = "its family is not among those known to allow it"
    elif structure_of(source.config).shared or structure_of(source.config).rank:
        reason = "blocks with other norms share linears that would have to take them in"
    elif source.packed:
        reason = "its weights are packed"
    if reason is not None:
        raise ConfigError(
            f"`{source.path}`, a `{model_type}`, cannot be rotated: {reason}",
            hint=f"leave out `--rotate`; it is for dense models of {', '.join(ROTATABLE)}",
        )
    try:
        return CONFIG_MAPPING[stock].from_dict(copy.deepcopy(source.config))
    except (StrictDataclassError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"`{source.path}` has an invalid config.json: {message}") from None


def _head_width(config: PreTrainedConfig) -> int:
    """Values per head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _roles(family: Family, config: PreTrainedConfig, base: str) -> dict[str, _Role]:
    """The role of every tensor that such a model may have, by name less `base` in front."""
    final_norm = f"{family.final_norm}.weight".removeprefix(base)
    roles = {
        f"{family.embedding}.weight": _Role(reads=True),
        f"{family.final_norm}.weight": _Role(ones=True),
        f"{family.head}.weight": _Role(reads=True, norm=final_norm),
    }
    for index in range(config.num_hidden_layers):
        prefix = f"{family.blocks}.{index}."
        for path, role in _block_roles(family, config, prefix.removeprefix(base)).items():
            roles[f"{prefix}{path}"] = role
    return {name.removeprefix(base): role for name, role in roles.items()}


def _block_roles(family: Family, config: PreTrainedConfig, prefix: str) -> dict[str, _Role]:
    """The same for a block whose names start with `prefix`, by path in it."""
    into_attention, out_of_attention, into_mlp, out_of_mlp = family.linears
    (attention_norm,), (mlp_norm,) = family.attention_norms, family.mlp_norms
    first_value = 0  # the values' linear is the last of its group, and may be all of it
    if len(into_attention) == 1:
        others = config.num_attention_heads + config.num_key_value_heads
        first_value = others * _head_width(config)
    roles = dict.fromkeys(UNTOUCHED, _Role())
    roles |= {f"{norm}.weight": _Role(ones=True) for norm in (attention_norm, mlp_norm)}
    for path in into_attention + into_mlp:
        norm = f"{prefix}{attention_norm if path in into_attention else mlp_norm}.weight"
        values = first_value if path == into_attention[-1] else None
        roles[f"{path}.weight"] = _Role(reads=True, norm=norm, values=values)
        roles[f"{path}.bias"] = _Role(values=values)
    for path in out_of_attention + out_of_mlp:
        roles[f"{path}.weight"] = _Role(writes=True, of_values=path in out_of_attention)
        roles[f"{path}.bias"] = _Role(writes=True)
    return roles
