"""What would make a step fail late, checked before it starts."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from math import prod
from pathlib import Path

from compresso import registry
from compresso.checkpoint.packings import method_of
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import ConfigError, ResourceError
from compresso.families import family_of
from compresso.provenance import lineage
from compresso.quantize_settings import DEFAULT_BITS
from compresso.recipe import Step
from compresso.runtime import format_bytes, free_memory
from compresso.runtimes.tasks import check_tasks

COPIES_OF_A_BLOCK = 2
FLOAT32_BYTES = 4
# Packages that load packed weights, and how they are installed.
PACKED_BY = {
    "compressed-tensors": "'compresso-llm[packed]'",
    "bitsandbytes": "'compresso-llm[bitsandbytes]'",
}


def check_source(step: Step, source: Checkpoint) -> None:
    """Check the source before any text is read for it.

    Raises ConfigError if its architecture is not known or the stage cannot read its weights,
    ResourceError if a package is missing.
    """
    family_of(source.config["model_type"])
    check_kind(step, source)
    check_adapter(step, source)
    check_packages(step, source)


def check_room(step: Step, source: Checkpoint, target: Path) -> None:
    """Raises ConfigError if `target` is inside the source, ResourceError if room is short."""
    if target.resolve().is_relative_to(source.path.resolve()):
        raise ConfigError(
            f"`{target}` is inside `{source.path}`", hint="choose an `-o` outside of it"
        )
    check_disk(target, smallest_output(step, source))
    check_memory(source)


def original_key(step: Step, recorded: str) -> str | None:
    """The key of the original that a step goes by; None if it does not go by any.

    recorded: the key of the one that the source was made from. Raises CheckpointError if the user
              named one that is not there.
    """
    if not hasattr(step.settings, "original"):
        return None
    given: str | None = step.settings.original
    return recorded if given is None else open_checkpoint(given).key


def check_kind(step: Step, source: Checkpoint) -> None:
    """Raises ConfigError, naming one that would do, if the stage cannot read such a checkpoint."""
    if registry.stage(step.stage).takes == "any" or not source.packed:
        return
    dense = [
        ancestor.path
        for ancestor in lineage(source)[:-1]
        if not ancestor.name.startswith("quantize-") and ancestor.path.is_dir()
    ]
    hint = f"pass the one it was made from: `{dense[-1]}`" if dense else "pass a dense checkpoint"
    raise ConfigError(
        f"`{step.stage}` needs dense weights, but those of `{source.path}` are quantized",
        hint=hint,
    )


def check_adapter(step: Step, source: Checkpoint) -> None:
    """Raises ConfigError if the stage would lose the adapter that the source has."""
    if registry.stage(step.stage).copies and source.adapter is not None:
        raise ConfigError(
            f"`{step.stage}` would lose the adapter beside the weights of `{source.path}`",
            hint="make it again with `--merge`, so that the corrections are in the weights",
        )


def check_packages(step: Step, source: Checkpoint) -> None:
    """Raises ResourceError if packed weights, or tasks, are involved and cannot be run here.

    CheckpointError if a task that is asked for is in no file.
    """
    if step.stage == "eval" and step.settings.tasks:
        check_tasks(step.settings.tasks)
    if registry.stage(step.stage).exports:  # decodes the weights itself, and says what it misses
        return
    needed = {str(method_of(source.config))}
    if step.stage == "quantize" and step.settings.pack:
        needed.add(registry.packed_as(step.method, step.settings))
    for package in sorted(needed & PACKED_BY.keys()):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ResourceError(
                f"package `{package}`, which loads packed weights, is not installed",
                hint=f"pip install {PACKED_BY[package]}",
            )


def smallest_output(step: Step, source: Checkpoint) -> int:
    """Bytes the step's output holds at the very least."""
    if (step.stage, step.method) == ("export", "dense"):
        return source.parameters * source.dtype.itemsize
    if registry.stage(step.stage).leaves is None:
        return 0
    if step.stage == "quantize" and step.settings.pack:
        return source.parameters * _least_bits(step) // 8
    ratio = getattr(step.settings, "ratio", None)
    return int(source.stored_bytes * (1 - ratio)) if ratio else 0


def _least_bits(step: Step) -> int:
    if getattr(step.settings, "hits_target", False):
        return int(step.settings.target_bits or 0)
    return getattr(step.settings, "bits", None) or DEFAULT_BITS


def check_disk(target: Path, needed: int) -> None:
    """Raises ResourceError if `needed` bytes do not fit the disk of `target`."""
    existing = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"`{target}` needs at least {format_bytes(needed)}, but `{existing}` has"
            f" {format_bytes(free)} free",
            hint="choose another disk with `-o`",
        )


def check_memory(source: Checkpoint) -> None:
    """Raises ResourceError if not even one block of `source` fits in free memory."""
    needed = COPIES_OF_A_BLOCK * FLOAT32_BYTES * _largest_block(source)
    free = free_memory()
    if needed > free:
        raise ResourceError(
            f"one block of `{source.path}` takes {format_bytes(needed)} to work on, but"
            f" {format_bytes(free)} of memory are free",
            hint="close other programs, or use a machine with more memory",
        )


def _largest_block(source: Checkpoint) -> int:
    """Weights in the largest run of tensors that share a numbered name, such as `layers.7.`."""
    sizes: Counter[str] = Counter()
    for name in source.weight_names():
        if found := re.match(r"(.*?\.\d+)\.", name):
            sizes[found[1]] += prod(source.weight_info(name).shape)
    return max(sizes.values(), default=0)
