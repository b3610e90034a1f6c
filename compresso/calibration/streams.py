"""Many changed versions of a model, scored in one walk: what they have in common runs once.

A version differs from the model in a few blocks. All versions that agree up to some point are one
stream of hidden states there, which splits where they part. A block is loaded once for all streams.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from compresso.calibration.candidates import (
    ATTENTION,
    BOTH,
    MLP,
    NEITHER,
    Candidate,
    Halves,
    Weights,
)
from compresso.calibration.recording import StandIn
from compresso.calibration.states import Store, enter_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.divergence import cross_entropy, divergence
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import replaced

LOGITS_BYTES = 256 * 2**20

Metric = Literal["loss", "kl"]
Versions = Callable[[int, Hashable], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Stream:
    """Hidden states, and the numbers of the candidates that share them."""

    store: Store
    members: list[int]


class Streams:
    """Scores candidates on the same tokens."""

    def __init__(
        self,
        adapter: ModelAdapter,
        source: Checkpoint,
        batches: list[Tensor],
        *,
        budget: int,
        spill_dir: Path,
        versions: Versions | None = None,
    ) -> None:
        """batches: token ids, (B, T) int64 each.

        budget:    bytes of hidden states to hold in RAM, for all streams that are open at once.
        spill_dir: where more of them go.
        versions:  given a block and the name of a version of it, the dense tensors that differ
                   from the source's, by name in the checkpoint; always the same.

        Raises ResourceError if they fit neither.
        """
        self._forwards = self._naive = 0
        self._adapter = adapter
        self._source = source
        self._versions = versions
        self._batches = batches
        self._states = enter_blocks(
            adapter, source, batches, probe=None, budget=budget, spill_dir=spill_dir
        )
        self._budget = budget - self._states.hidden.ram_bytes
        self._spill_dir = spill_dir
        self._free: list[Store] = []
        self._original: Store | None = None
        family = adapter.family
        zeros = StandIn(_zeros, attention=True), StandIn(_zeros)
        self._without_attention = {family.attention: zeros[0]}
        self._without_mlp = dict.fromkeys(family.mlp, zeros[1])
        self._parallel = family.parallel is not None and bool(
            getattr(adapter.config, family.parallel)
        )

    def score(
        self,
        candidates: Sequence[Candidate],
        *,
        metric: Metric,
        batches: Iterable[int] | None = None,
    ) -> list[float]:
        """What every candidate loses, in nats per token.

        metric:  "loss" is the mean cross-entropy of the next token, whose exp is the perplexity;
                 "kl" the mean of KL(original || candidate).
        batches: numbers of those to score on; all if None.

        Raises NumericalError if a candidate's logits are not numbers.
        """
        return [scores[metric] for scores in self.measure(candidates, (metric,), batches)]

    @torch.no_grad()
    def measure(
        self,
        candidates: Sequence[Candidate],
        metrics: tuple[Metric, ...],
        batches: Iterable[int] | None = None,
    ) -> list[dict[Metric, float]]:
        """As `score`, for several metrics in one walk."""
        chosen = list(range(len(self._batches)) if batches is None else batches)
        if "kl" in metrics and self._original is None:
            self._original = self._final([Candidate()], list(range(len(self._batches))))[0].store
        streams = self._final(candidates, chosen)
        found = self._heads(streams, chosen, metrics)
        scores: dict[int, dict[Metric, float]] = {}
        for stream, values in zip(streams, found, strict=True):
            scores |= dict.fromkeys(stream.members, values)
            self._release(stream.store)
        self._adapter.unload_outside()
        return [scores[member] for member in range(len(candidates))]

    def draw(self, tokens: int | None, random: Random) -> list[int]:
        """Numbers of random batches that hold so many tokens, ascending; of all if None."""
        everything = range(len(self._batches))
        if tokens is None:
            return list(everything)
        count = -(-tokens // max(batch.numel() for batch in self._batches))
        return sorted(random.sample(everything, min(count, len(everything))))

    def take_forwards(self) -> tuple[int, int]:
        """How many halves of blocks were run for some tokens since this was asked last.

        And how many it would have been with a run of its own for every candidate.
        """
        taken = self._forwards, self._naive
        self._forwards = self._naive = 0
        return taken

    def _final(self, candidates: Sequence[Candidate], batches: list[int]) -> list[_Stream]:
        """The streams that leave the last block."""
        streams = [_Stream(self._states.hidden, list(range(len(candidates))))]
        for block in range(self._adapter.count):
            streams = self._through(block, streams, candidates, batches)
            self._naive += sum(sum(candidate.halves(block)) for candidate in candidates)
        return streams

    def _through(
        self,
        block: int,
        streams: list[_Stream],
        candidates: Sequence[Candidate],
        batches: list[int],
    ) -> list[_Stream]:
        """Run a block for all streams, each in all the ways its candidates ask for."""
        leaving: list[_Stream] = []
        asked: dict[Weights, list[tuple[_Stream, dict[Halves, list[int]]]]] = {}
        for stream in streams:
            ways: dict[Weights, dict[Halves, list[int]]] = {}
            for member in stream.members:
                halves, weights = (
                    candidates[member].halves(block),
                    candidates[member].weights(block),
                )
                ways.setdefault(weights, {}).setdefault(halves, []).append(member)
            passing = [m for found in ways.values() for m in found.pop(NEITHER, ())]
            if passing:
                leaving.append(_Stream(stream.store, passing))
            for weights, members in ways.items():
                if members:
                    asked.setdefault(weights, []).append((stream, members))
        passed = {id(stream.store) for stream in leaving}
        for weights in sorted(asked, key=lambda weights: weights != Weights(block)):
            self._load(block, weights)
            try:
                for stream, members in asked[weights]:
                    leaving += self._split(block, stream, members, batches)
            finally:
                self._adapter.unload_block(block)
        for stream in streams:
            if id(stream.store) not in passed:
                self._release(stream.store)
        return leaving

    def _split(
        self, block: int, stream: _Stream, members: dict[Halves, list[int]], batches: list[int]
    ) -> list[_Stream]:
        leaving = {halves: _Stream(self._new_store(), found) for halves, found in members.items()}
        self._forwards += self._cost(set(members))
        for batch in batches:
            for halves, hidden in self._run(block, stream.store[batch], set(members)):
                leaving[halves].store[batch] = hidden
            stream.store.release(batch)
        return list(leaving.values())

    def _cost(self, wanted: set[Halves]) -> int:
        shared = not self._parallel and {BOTH, ATTENTION} <= wanted
        return sum(map(sum, wanted)) - shared

    def _run(
        self, block: int, hidden: Tensor, wanted: set[Halves]
    ) -> Iterator[tuple[Halves, Tensor]]:
        """What leaves a block with only these halves, (B, T, d) each."""
        if MLP in wanted:
            yield MLP, self._forward(block, hidden, self._without_attention)
        if ATTENTION in wanted:
            after = self._forward(block, hidden, self._without_mlp)
            yield ATTENTION, after
            if BOTH in wanted and not self._parallel:
                yield BOTH, self._forward(block, after, self._without_attention)
                return
        if BOTH in wanted:
            yield BOTH, self._forward(block, hidden, {})

    def _forward(self, block: int, hidden: Tensor, standing_in: Mapping[str, nn.Module]) -> Tensor:
        module = self._adapter.blocks[block]
        arguments = self._states.arguments(block, hidden)
        with replaced(module, standing_in):
            output: Tensor = module(hidden, *arguments.positional, **arguments.named)
        return output

    def _load(self, block: int, weights: Weights) -> None:
        tensors: dict[str, Tensor] = {}
        if weights.linears != block:
            tensors |= self._borrowed(block, weights.linears)
        if weights.version is not None:
            assert self._versions is not None, "the streams know no versions"
            tensors |= self._versions(block, weights.version)
        self._adapter.load_block(block, self._source, tensors)

    def _borrowed(self, block: int, other: int) -> dict[str, Tensor]:
        """The tensors of a block with the linears of another."""
        own, place = self._adapter.block_prefix(block), self._adapter.block_prefix(other)
        linears = tuple(f"{path}." for path in self._adapter.family.all_linears)
        places = {}
        for name in self._adapter.block_tensors(block):
            inside = name.removeprefix(own)
            places[name] = f"{place}{inside}" if inside.startswith(linears) else name
        loaded = self._source.load_weights(places.values())
        return {name: loaded[place] for name, place in places.items()}

    def _heads(
        self, streams: list[_Stream], batches: list[int], metrics: tuple[Metric, ...]
    ) -> list[dict[Metric, float]]:
        """The scores of every stream that leaves the last block."""
        totals = [dict.fromkeys(metrics, 0.0) for _ in streams]
        count = 0
        for batch in batches:
            tokens = self._batches[batch]
            targets = tokens[:, 1:].to(self._adapter.device)
            count += targets.numel()
            for part in self._parts(len(tokens), targets.shape[1]):
                original = None
                if self._original is not None and "kl" in metrics:
                    original = self._logits(self._original, batch, part)
                for total, stream in zip(totals, streams, strict=True):
                    logits = self._logits(stream.store, batch, part)
                    if "loss" in metrics:
                        lost = cross_entropy(logits, targets[:, part])
                        total["loss"] += lost.double().sum().item()
                    if original is not None:
                        total["kl"] += divergence(original, logits).double().sum().item()
        return [{metric: value / count for metric, value in total.items()} for total in totals]

    def _logits(self, store: Store, batch: int, part: slice) -> Tensor:
        return self._adapter.logits(self._source, store[batch][:, part])

    def _parts(self, rows: int, positions: int) -> Iterator[slice]:
        vocabulary = self._adapter.config.get_text_config().vocab_size
        step = max(1, LOGITS_BYTES // (4 * vocabulary * rows))
        for start in range(0, positions, step):
            yield slice(start, min(start + step, positions))

    def _new_store(self) -> Store:
        if self._free:
            return self._free.pop()
        batch_bytes = self._states.hidden.batch_bytes
        fits = batch_bytes * len(self._batches) <= self._budget
        store = Store(
            len(self._batches),
            batch_bytes=batch_bytes,
            device=self._adapter.device,
            spill_dir=None if fits else self._spill_dir,
        )
        self._budget -= store.ram_bytes
        return store

    def _release(self, store: Store) -> None:
        if store is not self._states.hidden and store is not self._original:
            self._free.append(store)


def _zeros(hidden: Tensor) -> Tensor:
    return torch.zeros_like(hidden)
