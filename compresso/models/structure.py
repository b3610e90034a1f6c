"""What the blocks of a model lack, share and correct, and how its config.json says so.

A block has two halves, attention and MLP, each with its norms: the sub-blocks. They are numbered
in execution order: of block i, the attention is 2 i and the MLP 2 i + 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compresso.checkpoint.coded import CODED, KEY, KINDS
from compresso.errors import CheckpointError, ConfigError
from compresso.families import FAMILIES, RESTRUCTURED, Family, family_of
from compresso.models import coded_linear, modeling_compresso, modeling_decilm

MODELING_FILE = Path(modeling_compresso.__file__)
"""The code that a config.json names for which `needs_code`."""
MODELING_FILES = (MODELING_FILE, Path(coded_linear.__file__))
"""What must be beside it: that code, and what it imports."""
DECILM_FILE = Path(modeling_decilm.__file__)
"""The code of exports in the config of Nemotron-NAS."""


@dataclass(frozen=True)
class Structure:
    """What the blocks of a model lack and share, by block index.

    no_attention: blocks without attention, ascending. no_mlp: blocks without MLP, ascending.
    shared:       of every block, the block whose linears it uses: an earlier one, or itself if it
                  has its own. Empty if every block has its own.
    rank:         of the low-rank correction of every linear that a block in `corrected` uses, be
                  it its own or shared; 0 if there is none.
    corrected:    blocks with corrections, ascending.

    Raises ValueError if it contradicts itself.
    """

    no_attention: tuple[int, ...] = ()
    no_mlp: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    rank: int = 0
    corrected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for blocks in (self.no_attention, self.no_mlp, self.corrected):
            if list(blocks) != sorted(set(blocks)):
                raise ValueError(f"blocks must ascend, not {blocks}")
        if bool(self.rank) != bool(self.corrected):
            raise ValueError(f"rank {self.rank} with corrections of {len(self.corrected)} blocks")
        for block, owner in enumerate(self.shared):
            if not 0 <= owner <= block or self.shared[owner] != owner:
                raise ValueError(f"block {block} cannot use the linears of block {owner}")
            for removed in (self.no_attention, self.no_mlp):
                if owner in removed and block not in removed:
                    raise ValueError(f"block {block} uses linears that block {owner} lacks")
        if self.shared == tuple(range(len(self.shared))):
            object.__setattr__(self, "shared", ())

    @property
    def plain(self) -> bool:
        """Whether the stock class can run it."""
        return self == Structure()

    def owner(self, block: int) -> int:
        """The block whose linears a block uses: itself, or an earlier one."""
        return self.shared[block] if self.shared else block

    def lacks(self, sub_block: int) -> bool:
        """Whether a sub-block was removed."""
        block, mlp = divmod(sub_block, 2)
        return block in (self.no_mlp if mlp else self.no_attention)

    def without(self, sub_blocks: Iterable[int]) -> Structure:
        """The structure once further sub-blocks are removed.

        Raises ConfigError if another block uses linears of one of them.
        """
        gone = set(sub_blocks)
        attentions = {sub_block // 2 for sub_block in gone if sub_block % 2 == 0}
        mlps = {sub_block // 2 for sub_block in gone if sub_block % 2}
        try:
            return replace(
                self,
                no_attention=tuple(sorted({*self.no_attention, *attentions})),
                no_mlp=tuple(sorted({*self.no_mlp, *mlps})),
            )
        except ValueError as error:
            raise ConfigError(f"this cannot be removed: {error}") from None

    def keeping(self, keep: list[int]) -> Structure:
        """The structure once all other blocks are dropped and these renumbered.

        keep: ascending. Raises ConfigError if one of them uses the linears of a dropped block.
        """
        for block in keep:
            if self.owner(block) not in keep:
                raise ConfigError(
                    f"block {self.owner(block)} cannot be dropped: block {block} uses its linears"
                )
        place = {block: new for new, block in enumerate(keep)}
        corrected = tuple(place[block] for block in self.corrected if block in place)
        return Structure(
            no_attention=tuple(place[block] for block in self.no_attention if block in place),
            no_mlp=tuple(place[block] for block in self.no_mlp if block in place),
            shared=tuple(place[self.owner(block)] for block in keep),
            rank=self.rank if corrected else 0,
            corrected=corrected,
        )


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a block, by paths in it.

    modules: what adds to the residual stream. norms: those that serve it alone.
    """

    modules: tuple[str, ...]
    norms: tuple[str, ...]
    linears: tuple[str, ...]


def halves(family: Family) -> tuple[Half, Half]:
    """Attention and MLP of a family's blocks."""
    into_attention, out_of_attention, into_mlp, out_of_mlp = family.linears
    return (
        Half((family.attention,), family.attention_norms, into_attention + out_of_attention),
        Half(tuple(dict.fromkeys(family.mlp)), family.mlp_norms, into_mlp + out_of_mlp),
    )


def borrowed_linears(family: Family, structure: Structure, block: int) -> list[str]:
    """The linears of another block that a block uses, by path in the list of blocks."""
    owner = structure.owner(block)
    if owner == block:
        return []
    attention, mlp = halves(family)
    used = [] if structure.lacks(2 * block) else [*attention.linears]
    used += [] if structure.lacks(2 * block + 1) else [*mlp.linears]
    return [f"{owner}.{path}" for path in used]


def removed_tensors(
    names: Iterable[str], family: Family, structure: Structure, *, prefix: str
) -> set[str]:
    """Those tensors that a model of this structure does not store.

    names:  in a checkpoint, dense or packed.
    prefix: what the names of all blocks start with: `model.layers.`.
    """
    gone: list[str] = []
    shared: list[str] = []
    removed = (structure.no_attention, structure.no_mlp)
    for half, blocks in zip(halves(family), removed, strict=True):
        parts = (*half.modules, *half.norms)
        gone += [f"{prefix}{block}.{path}." for block in blocks for path in parts]
        for block, owner in enumerate(structure.shared):
            if owner != block:
                shared += [f"{prefix}{block}.{path}." for path in half.linears]
    corrections = tuple(f".correction_{end}" for end in ("down.weight", "up.weight", "up.bias"))
    return {
        name
        for name in names
        if name.startswith(tuple(gone))
        or (name.startswith(tuple(shared)) and not name.endswith(corrections))
    }


def structure_of(config: dict[str, Any]) -> Structure:
    """The structure that a parsed config.json describes.

    Raises CheckpointError if it describes none that is possible.
    """
    if not needs_code(config):
        return Structure()
    try:
        plan = config[KEY]
        return Structure(
            no_attention=tuple(plan["attention"]["removed"]),
            no_mlp=tuple(plan["mlp"]["removed"]),
            shared=tuple(plan["shared"]),
            rank=plan["rank"],
            corrected=tuple(plan["corrected"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{KEY}` in config.json is missing or wrong: {error}") from None


def needs_code(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is of a model that only `modeling_compresso` can run."""
    found: bool = config["model_type"].startswith(RESTRUCTURED)
    return found


def without_codes(plan: dict[str, Any]) -> dict[str, Any]:
    """What `KEY` holds in the config.json of the same model with dense linears. Not modified."""
    return {name: value for name, value in plan.items() if name not in (CODED, KINDS)}


def restructure(
    config: dict[str, Any], structure: Structure, *, coded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of the same model with another structure; the stock one if it is plain.

    config:    a parsed config.json, of any structure. Not modified. What the code that came with a
               stock model was called (`auto_map`) is lost.
    structure: of all its blocks, whatever `config` says of them.
    coded:     of the linears that are stored as codes, as `checkpoint.coded.merge` returns it;
               all are dense if None, whatever `config` says. Such a model is never stock.

    Raises ConfigError if no block would have attention: nothing would count cached tokens.
    """
    new = copy.deepcopy(config)
    plain = structure.plain and not coded
    if plain and KEY not in config:
        return new
    stock = CONFIG_MAPPING[new["model_type"].removeprefix(RESTRUCTURED)]
    base = stock.__name__.removesuffix("Config")
    ours = {"AutoConfig": f"{base}Config", "AutoModelForCausalLM": f"{base}ForCausalLM"}
    others = {auto: name for auto, name in new.pop("auto_map", {}).items() if auto not in ours}
    new.pop(KEY, None)
    new["model_type"] = stock.model_type
    if plain:
        new["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[stock.model_type]]
        return new | ({"auto_map": others} if others else {})
    if len(structure.no_attention) == stock.from_dict(new).num_hidden_layers:
        raise ConfigError("the attention of every block would be removed")
    new["model_type"] = f"{RESTRUCTURED}{stock.model_type}"
    new["architectures"] = [f"Compresso{base}ForCausalLM"]
    file = MODELING_FILE.stem
    new["auto_map"] = others | {auto: f"{file}.Compresso{name}" for auto, name in ours.items()}
    new[KEY] = _plan(family_of(stock.model_type), structure) | (coded or {})
    return new


def _plan(family: Family, structure: Structure) -> dict[str, Any]:
    """What `modeling_compresso` is to read, in the plain values of a config.json."""
    plan: dict[str, Any] = {"blocks": family.blocks}
    removed = {"attention": structure.no_attention, "mlp": structure.no_mlp}
    for (name, blocks), half in zip(removed.items(), halves(family), strict=True):
        paths = {key: list(value) for key, value in asdict(half).items()}
        plan[name] = {**paths, "removed": list(blocks)}
    return plan | {
        "shared": list(structure.shared),
        "rank": structure.rank,
        "corrected": list(structure.corrected),
    }


def register() -> list[str]:
    """Make transformers know the restructured classes of every family.

    AutoModelForCausalLM then loads such checkpoints without the code that comes with them.
    Returns their `model_type`s.
    """
    found = []
    for family in FAMILIES:
        base = CONFIG_MAPPING[family].__name__.removesuffix("Config")
        config_class = getattr(modeling_compresso, f"Compresso{base}Config")
        AutoConfig.register(config_class.model_type, config_class)
        model_class = getattr(modeling_compresso, f"Compresso{base}ForCausalLM")
        AutoModelForCausalLM.register(config_class, model_class)
        found.append(config_class.model_type)
    return found
