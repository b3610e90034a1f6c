"""Fewer blocks: the config.json and the tensor names of a model some of whose blocks are gone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING

from compresso.errors import ConfigError
from compresso.families import Family
from compresso.models.structure import KEY, restructure, structure_of

# Lists whose length has nothing to do with the number of blocks, though it may be equal.
NOT_PER_BLOCK = ("architectures", "eos_token_id", "bad_words_ids")


def drop_blocks(config: dict[str, Any], family: Family, keep: list[int]) -> dict[str, Any]:
    """The config.json of a model that has only the blocks `keep` of this one.

    Lists with one entry per block keep the entries of the kept blocks, and are written out even
    where `config` leaves them to be made from a rule, since the rule counts positions: the model
    would load without a message and compute something else.

    config: a parsed config.json. Not modified.
    keep:   indices of blocks, ascending.

    Raises ConfigError if the fields of `family` cannot express the result, or a kept block uses
    the linears of another.
    """
    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    count = resolved.num_hidden_layers
    if not keep or keep != sorted(set(keep) & set(range(count))):
        raise ValueError(f"blocks to keep must ascend within 0..{count - 1}, not {keep}")
    _check_expressible(config, family, keep, count)
    structure = structure_of(config)
    new = copy.deepcopy(config)
    new.pop("num_hidden_layers", None)  # transformers takes it in place of the family's own word
    new[family.count] = len(keep)
    for name in family.block_lists:
        entries = getattr(resolved, name, None)
        if entries is None:
            continue
        if len(entries) < count:
            raise ConfigError(f"`{name}` in config.json has {len(entries)} entries, not {count}")
        new[name] = [entries[index] for index in keep]
    for name in family.index_lists:
        if name in new:
            new[name] = [keep.index(index) for index in new[name] if index in keep]
    for name in family.thresholds:
        new[name] = sum(index < getattr(resolved, name) for index in keep)
    for name in family.generators:
        new.pop(name, None)
    return restructure(new, structure.keeping(keep)) if KEY in new else new


def rename_blocks(
    names: Iterable[str], *, prefix: str, count: int, keep: list[int]
) -> dict[str, str]:
    """The tensors that stay when only the blocks `keep` do: name -> new name.

    Tensors outside the blocks stay as they are. Blocks after the last, which some checkpoints
    hold for multi-token prediction, move down.

    prefix: what the names of all blocks start with: `model.layers.`.
    count:  how many blocks the model has.
    """
    places = {index: place for place, index in enumerate(keep)}
    renamed: dict[str, str] = {}
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdecimal():
            renamed[name] = name
            continue
        index = int(number)
        if index >= count:
            renamed[name] = f"{prefix}{index - count + len(keep)}.{rest}"
        elif index in places:
            renamed[name] = f"{prefix}{places[index]}.{rest}"
    return renamed


def _check_expressible(config: dict[str, Any], family: Family, keep: list[int], count: int) -> None:
    for name in family.index_maths:
        if config.get(name) and keep != list(range(len(keep))):
            raise ConfigError(
                f"`{name}` is true: what a block computes depends on its place",
                hint="only the last blocks of this model can be dropped",
            )
    if config.get("per_layer_config"):
        raise ConfigError("`per_layer_config` is not supported when blocks are dropped")
    known = {*NOT_PER_BLOCK, *family.block_lists, *family.index_lists}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name not in known:
            raise ConfigError(
                f"`{name}` in config.json may hold one entry per block: cannot drop any",
                hint="if it does, add it to `block_lists` of the family in "
                "compresso/families.py; if not, to `NOT_PER_BLOCK` in depth.py",
            )
