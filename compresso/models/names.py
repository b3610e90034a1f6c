"""Where a model's parameters are in a checkpoint."""

from __future__ import annotations

from transformers import PreTrainedModel

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError
from compresso.families import Family


def stored_names(model: PreTrainedModel, family: Family, source: Checkpoint) -> dict[str, str]:
    """Every parameter's name -> its name in the checkpoint, by the rules of transformers' loader.

    A name may lack the prefix of the base model, or be an old one. A tied tensor may be stored
    under either of its names; if it is stored under both, each is used for itself.

    Raises CheckpointError for the first parameter that is missing or has another shape.
    """
    available = set(source.weight_names())
    tied: dict[str, str] = model.all_tied_weights_keys
    partners = {**tied, **{partner: name for name, partner in tied.items()}}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        candidates = [
            form
            for own in (name, partners.get(name, name))
            for form in (own, own.removeprefix(prefix), _old_name(own, family))
        ]
        stored = next((candidate for candidate in candidates if candidate in available), None)
        if stored is None:
            raise CheckpointError(f"`{source.path}` has no tensor `{name}`")
        shape = source.weight_info(stored).shape
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"`{stored}` in `{source.path}` has the shape {shape}, "
                f"but its config.json asks for {tuple(parameter.shape)}"
            )
        found[name] = stored
    return found


def linear_modules(model: PreTrainedModel, family: Family, source: Checkpoint) -> dict[str, str]:
    """Path in the checkpoint of every linear that has weights -> its path in transformers.

    Linears are those that a family names, and a head with weights of its own.
    """
    tied = f"{family.head}.weight" in model.all_tied_weights_keys
    ends = tuple(f".{path}.weight" for path in family.all_linears)
    return {
        stored.removesuffix(".weight"): name.removesuffix(".weight")
        for name, stored in stored_names(model, family, source).items()
        if name.endswith(ends) or (name == f"{family.head}.weight" and not tied)
    }


def _old_name(name: str, family: Family) -> str:
    for module, old in family.old_names:
        if name.startswith(f"{module}."):
            return f"{old}.{name.removeprefix(f'{module}.')}"
    return name
