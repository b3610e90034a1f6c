"""How much a model suffers from errors in each of its input groups, measured group by group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from compresso import __version__
from compresso.calibration.levels import Groups, Levels, Place, changed_in, places, weight_names
from compresso.calibration.streams import Streams, Versions
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ResourceError
from compresso.kernels.linearity import Line, fit_line, noise_levels, with_noise
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, log, track

PREFIX = "sensitivity"


class Ledger:
    """Measured values by name, in a JSON file that a later run goes on with, or reuses.

    The file's name follows from what was measured, so whoever measures the same finds it.
    """

    def __init__(self, directory: Path, kind: str, about: dict[str, Any]) -> None:
        """kind: of what is measured. about: plain values that all that is measured depends on.

        Raises CheckpointError if there is such a file and it cannot be read.
        """
        self._about = about
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"{PREFIX}-{kind}-{digest[:16]}.json"
        self._values: dict[str, Any] = {}
        if self.path.is_file():
            try:
                self._values = json.loads(self.path.read_text(encoding="utf-8"))["measured"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"`{self.path}` cannot be read: {error!r}", hint="remove it"
                ) from error

    def get(self, name: str) -> Any:
        """What was put under that name, or None."""
        return self._values.get(name)

    def put(self, values: dict[str, Any]) -> None:
        """Keep plain values durably. Raises ResourceError if they cannot be written."""
        self._values |= values
        record = {"about": self._about, "measured": self._values}
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise ResourceError(f"cannot write `{self.path}`: {error.strerror}") from error


class Sensitivity:
    """Measures input groups, and remembers what was measured in ledgers."""

    def __init__(
        self,
        adapter: ModelAdapter,
        source: Checkpoint,
        groups: Groups,
        batches: list[Tensor],
        *,
        runtime: Runtime,
        spill_dir: Path,
    ) -> None:
        """batches: token ids, (B, T) int64 each: KL from the original is a mean over these."""
        self.groups = groups
        self._adapter = adapter
        self._source = source
        self._batches = batches
        self._runtime = runtime
        self._spill_dir = spill_dir

    def streams(self, versions: Versions) -> Streams:
        """For scoring candidates on the batches."""
        return Streams(
            self._adapter,
            self._source,
            self._batches,
            budget=self._runtime.max_memory,
            spill_dir=self._spill_dir,
            versions=versions,
        )

    def about(self) -> dict[str, Any]:
        """What every measurement depends on, for a ledger."""
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(repr(tuple(batch.shape)).encode() + batch.numpy().tobytes())
        return {
            "compresso": __version__,
            "source": self._source.key,
            "tokens": digest.hexdigest(),
            "dtype": str(self._adapter.dtype),
        }

    def name(self, place: Place) -> str:
        """How ledgers and reports call a group."""
        block, group = place
        return f"{block}:{'+'.join(self.groups[block][group])}"

    def noise(self, ledger: Ledger) -> dict[Place, Line]:
        """How KL grows with Gaussian noise in each group, all else being as it is.

        ledger: as `noise_ledger` gives it.

        Noise has levels up to the error of a 3-bit grid, and each linear at each level noise of its
        own. All linears of a group get noise of the same relative size at once, and so one slope.
        """
        errors = noise_levels()

        def noisy(block: int, version: Hashable) -> dict[str, Tensor]:
            assert isinstance(version, tuple)
            group, level = version
            owner = self._adapter.structure.owner(block)
            names = weight_names(self._adapter, self.groups, (owner, group))
            weights = self._source.load_weights(names)
            return {
                name: with_noise(weight, errors[level], _generator(f"{name} {level}"))
                for name, weight in weights.items()
            }

        if left := self.unknown(ledger):
            streams = self.streams(noisy)
            for block, groups in _by_block(left, "sensitivity to noise"):
                tried = [(group, level) for group in groups for level in range(len(errors))]
                found = self._score(streams, block, tried)
                ledger.put(
                    {
                        self.name((block, group)): found[
                            number * len(errors) : (number + 1) * len(errors)
                        ]
                        for number, group in enumerate(groups)
                    }
                )
        return {
            place: fit_line(errors, ledger.get(self.name(place))) for place in places(self.groups)
        }

    def damage(self, levels: Levels, ledger: Ledger) -> dict[Place, list[float]]:
        """KL with each group alone at each width of the ladder, all else being as it is.

        levels: hold what the ledger lacks.
        """
        bits = levels.ladder.bits
        if left := self.unknown(ledger):
            streams = self.streams(levels.tensors)
            for block, groups in _by_block(left, "damage of each group"):
                tried = []
                for group in groups:
                    for width in bits:
                        widths: list[int | None] = [None] * len(self.groups[block])
                        widths[group] = width
                        tried.append(tuple(widths))
                found = self._score(streams, block, tried)
                ledger.put(
                    {
                        self.name((block, group)): {
                            "kl": found[number * len(bits) : (number + 1) * len(bits)],
                            "error": [levels.error((block, group), width) for width in bits],
                        }
                        for number, group in enumerate(groups)
                    }
                )
        return {place: ledger.get(self.name(place))["kl"] for place in places(self.groups)}

    def errors(self, ledger: Ledger) -> dict[Place, list[float]]:
        """|W' - W|^2 / |W|^2 of each group at each width, as `damage` noted them."""
        return {place: ledger.get(self.name(place))["error"] for place in places(self.groups)}

    def unknown(self, ledger: Ledger) -> list[Place]:
        """Groups that the ledger has nothing of."""
        every = places(self.groups)
        left = [place for place in every if ledger.get(self.name(place)) is None]
        if len(left) < len(every):
            log(f"reads {len(every) - len(left)} of {len(every)} groups in `{ledger.path}`")
        return left

    def _score(self, streams: Streams, block: int, versions: Sequence[Hashable]) -> list[float]:
        candidates = [changed_in(self._adapter, {block: version}) for version in versions]
        return streams.score(candidates, metric="kl")


def damage_ledger(
    sensitivity: Sensitivity, levels: Levels, directory: Path, *, calibration: str
) -> Ledger:
    """Where damage is kept. calibration: key of the tokens a calibrated quantizer reads."""
    ladder = levels.ladder
    about = {
        **sensitivity.about(),
        "quantizer": ladder.key,
        "bits": list(ladder.bits),
        "calibration": calibration if ladder.calibrated else None,
    }
    return Ledger(directory, "damage", about)


def noise_ledger(sensitivity: Sensitivity, directory: Path) -> Ledger:
    """Where losses under noise are kept."""
    return Ledger(directory, "noise", {**sensitivity.about(), "errors": noise_levels()})


def _by_block(left: list[Place], what: str) -> Iterator[tuple[int, list[int]]]:
    """The groups of each block that are left, while showing how far that is."""
    blocks = list(dict.fromkeys(block for block, _ in left))
    for block in track(blocks, len(blocks), what):
        yield block, [group for other, group in left if other == block]


def _generator(seed: str) -> torch.Generator:
    """Random numbers that follow from a text."""
    return torch.Generator().manual_seed(Random(seed).getrandbits(63))
