"""A whole model in memory, parts of which are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.coded_linear import out_and_in
from compresso.models.substitution import Answer, empty_parameter, put_parameter, replaced
from compresso.training.low_rank_path import LowRankPath, nothing_yet
from compresso.training.packed_product import PackedWeight, product
from compresso.training.processes import whole

LOW_RANK = "low_rank"  # a linear's submodule


class TrainingModel:
    """A whole model in memory. A context: leaving it frees the weights.

    It is run in the adapter's type. Every parameter that is trained is float32, so that small moves
    are not lost, and rounded to that type wherever it is used; so the model gives what it gives
    once it is stored, and gradients add up in float32. Linears that blocks share are one parameter,
    and so is an embedding that is the head, too.

    module: the transformers model, in evaluation mode: its own dropout, if it has any, is off.
    """

    def __init__(self, adapter: ModelAdapter, source: Checkpoint, *, packed: bool = False) -> None:
        """packed: linears that are stored as codes stay codes, and cannot be trained themselves."""
        self.adapter = adapter
        self.source = source
        self.module: nn.Module = adapter.model
        self._packed = packed
        self._names: dict[str, list[str]] = {}  # in the checkpoint -> in the model
        for name, stored in adapter.stored.items():
            self._names.setdefault(stored, []).append(name)
        self._paths: dict[str, LowRankPath] = {}
        self._trained: list[str] = []  # names in the checkpoint
        self._changed: list[nn.Module] = []  # that have a forward of their own
        self._aside: dict[str, nn.Parameter] = {}  # of packed linears, without data

    def __enter__(self) -> Self:
        for stored, names in self._names.items():
            path = stored.removesuffix(".weight")
            if self._packed and path in self.source.packing.shapes:
                self._keep_packed(path)
                continue
            weight = self.source.load_weights([stored])[stored]
            tensor = weight.to(self.adapter.device, self.adapter.dtype, copy=True)
            parameter = nn.Parameter(tensor, requires_grad=False)
            for name in names:
                put_parameter(self.module, name, parameter)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._changed:
            del module.forward
        for path in self._paths:
            delattr(self._linear(path), LOW_RANK)
        for stored in self._trained:
            self._unround(stored)
        for name, parameter in self._aside.items():
            put_parameter(self.module, name, parameter)
        self._paths, self._trained, self._changed, self._aside = {}, [], [], {}
        for name in self.adapter.stored:
            empty_parameter(self.module, name)

    def add_low_rank(
        self,
        paths: Iterable[str],
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        seed: int,
        start: Mapping[str, LowRank] | None = None,
        pooled: int | None = None,
    ) -> list[nn.Parameter]:
        """Give linears corrections of low rank to train; the new parameters, float32.

        paths:   of linears, in the checkpoint; of shared ones that of the block that has them.
        alpha:   over the rank, what the product of the factors counts; 1 if None.
        dropout: share of inputs that a correction does not see, at random, while training.
        seed:    of what they begin as.
        start:   begin with these, by path, where it has them; of the rank each has.
        pooled:  let corrections see the sums of so many neighbouring inputs each.

        A correction begins as nothing, unless it is given.
        """
        generator = torch.Generator().manual_seed(seed)
        found: list[nn.Parameter] = []
        for path in paths:
            linear = self._linear(path)
            rows, columns = out_and_in(linear)
            begin = nothing_yet(rows, columns // (pooled or 1), rank, generator)
            low_rank = LowRankPath(
                (start or {}).get(path, begin),
                scale=1.0 if alpha is None else alpha / rank,
                dropout=dropout,
                pooled=pooled or 1,
                device=self.adapter.device,
            )
            linear.add_module(LOW_RANK, low_rank.eval())
            self._answer(linear, partial(_corrected, linear.forward, low_rank))
            self._paths[path] = low_rank
            found += [low_rank.down, low_rank.up]
        return found

    def ranks(self) -> dict[str, int]:
        """The ranks of the corrections, by path in the checkpoint."""
        return {path: len(found.down) for path, found in self._paths.items()}

    def low_ranks(self) -> dict[str, LowRank]:
        """The corrections as they are now, by path in the checkpoint; pooled ones as they are."""
        return {path: found.low_rank() for path, found in self._paths.items()}

    def train_tensors(self, stored: Iterable[str]) -> list[nn.Parameter]:
        """Let dense tensors be trained; their parameters, float32, in the same order.

        stored: names in the checkpoint. A packed one stays as it is: ValueError.
        """
        found: list[nn.Parameter] = []
        for name in stored:
            if self._names[name][0] in self._aside:
                raise ValueError(f"`{name}` is stored as codes")
            weight = self.source.load_weights([name])[name]
            master = weight.to(self.adapter.device, torch.float32, copy=True)
            parameter = nn.Parameter(master)
            for own in self._names[name]:
                put_parameter(self.module, own, parameter)
                self._round(own)
            self._trained.append(name)
            found.append(parameter)
        return found

    def trained_tensors(self, *, first: bool = True) -> dict[str, Tensor]:
        """What `train_tensors` made trainable, by name in the checkpoint, in the types stored.

        On the CPU. If it is split among processes, all of them have to ask, and only the `first`
        gets it.
        """
        found: dict[str, Tensor] = {}
        for stored in self._trained:
            together = whole(self._parameter(self._names[stored][0]).detach())
            if first:
                found[stored] = together.to(self.source.weight_info(stored).dtype).cpu()
        return found

    def trained_parameters(self) -> int:
        """Weights that are trained, also those that do not move for now."""
        found = [self._parameter(self._names[stored][0]) for stored in self._trained]
        found += [own for path in self._paths.values() for own in path.parameters()]
        return sum(parameter.numel() for parameter in found)

    def run_blocks(self, *, again: bool, compiled: bool) -> None:
        """How blocks are run from here on.

        again: only what enters a block is kept, and it is run again on the way back.
        """
        for block in self.adapter.blocks:
            forward = torch.compile(block.forward) if compiled else block.forward
            if again:
                forward = partial(checkpoint, forward, use_reentrant=False)
            if again or compiled:
                self._answer(block, forward)

    def training(self, now: bool) -> None:
        """Whether corrections leave out inputs at random."""
        for low_rank in self._paths.values():
            low_rank.train(now)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: states after the final norm, (B, T, d).

        tokens: ids, (B, T) int64, without padding.
        """
        body = self.module.get_submodule(self.adapter.family.body)
        states: Tensor = body(tokens.to(self.adapter.device), use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores of the next token, soft caps included, (B, T, vocabulary) float32.

        hidden: what `hidden` returns, or some positions of it, (B, T, d).
        """
        with replaced(self.module, {self.adapter.family.body: Answer(hidden)}):
            scores: Tensor = self.module(inputs_embeds=hidden, use_cache=False).logits
        return scores.float()

    def _linear(self, path: str) -> nn.Module:
        return self.module.get_submodule(self._names[f"{path}.weight"][0].rpartition(".")[0])

    def _keep_packed(self, path: str) -> None:
        linear = self._linear(path)
        weight = PackedWeight(
            self.source,
            path,
            transposed=self.adapter.family.transposed,
            dtype=self.adapter.dtype,
            device=self.adapter.device,
        )
        name = self._names[f"{path}.weight"][0]
        self._aside[name] = self.module.get_parameter(name)
        del linear.weight
        self._answer(linear, partial(_packed, linear, weight))

    def _answer(self, linear: nn.Module, forward: Any) -> None:
        """Let a linear answer otherwise. Hooks, and those who share it, take part as before."""
        if "forward" not in vars(linear):
            self._changed.append(linear)
        linear.forward = forward

    def _round(self, name: str) -> None:
        """Let a parameter be used in the type the model is run in."""
        if self.adapter.dtype != torch.float32:
            module, own = self._holder(name)
            rounded = _Rounded(self.adapter.dtype)
            parametrize.register_parametrization(module, own, rounded, unsafe=True)

    def _parameter(self, name: str) -> nn.Parameter:
        """What is trained under that name in the model, not what it is rounded to."""
        module, own = self._holder(name)
        if parametrize.is_parametrized(module, own):
            return module.parametrizations[own].original  # type: ignore[index, union-attr, return-value]
        return module.get_parameter(own)

    def _unround(self, stored: str) -> None:
        for name in self._names[stored]:
            module, own = self._holder(name)
            if parametrize.is_parametrized(module, own):
                parametrize.remove_parametrizations(module, own, leave_parametrized=False)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        return self.module.get_submodule(path), own


class _Rounded(nn.Module):
    """A parameter in another type; its gradient is in its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter.to(self._dtype)


def _corrected(answer: Any, low_rank: LowRankPath, inputs: Tensor) -> Tensor:
    corrected: Tensor = low_rank(inputs, answer(inputs))
    return corrected


def _packed(linear: nn.Module, weight: PackedWeight, inputs: Tensor) -> Tensor:
    return product(inputs, weight, linear.bias)  # type: ignore[arg-type]
