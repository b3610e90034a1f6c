"""What one process does of a step: run its sequences, and add up with the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compresso.training.model import TrainingModel
from compresso.training.options import Objective, TrainOptions
from compresso.training.processes import Processes


class Share:
    """A model, the parameters of it that move, and what is to become small.

    parameters: as the optimizer sees them; split among the processes if these are sharded.
    """

    def __init__(
        self,
        model: TrainingModel,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        options: TrainOptions,
        processes: Processes,
    ) -> None:
        self.model = model
        self.processes = processes
        self.parameters = list(parameters)
        self._options = options
        self._run: nn.Module = _Run(model, objective)
        model.run_blocks(again=options.checkpointing, compiled=options.compile)
        if processes.sharded:
            self.parameters = self._sharded()

    def measure(
        self, sequences: Tensor, rows: Sequence[int], step: int, *, backward: bool
    ) -> dict[str, float]:
        """The objective's mean over some sequences; backward: add its gradients up, too.

        sequences: of which `rows` are the numbers, (N, T) int64. step: decides what dropout drops.
        """
        totals: dict[str, Tensor] = {}
        # FSDP takes the mean over processes where the sum is wanted.
        factor = self.processes.count if self.processes.sharded else 1
        runs = self.processes.batches(rows, self._options.micro)
        for number, (own, weight) in enumerate(runs):
            torch.manual_seed(
                hash((self._options.seed, step, self.processes.index, number, backward))
            )
            tokens = sequences[own].to(self.model.adapter.device)
            parts = self._run(tokens, torch.tensor(own))
            if backward:
                (parts["loss"] * (weight * factor)).backward()
            for name, value in parts.items():
                part = value.detach().double() * weight
                totals[name] = totals[name] + part if name in totals else part
        if not backward:
            self.processes.put_away(self._run)
        found = torch.stack(list(totals.values()))
        self.processes.add_up([found])
        return dict(zip(totals, found.tolist(), strict=True))

    def add_gradients(self, moved: Sequence[int]) -> None:
        """Make the gradients of these parameters the sums over all processes."""
        if not self.processes.sharded:
            grads = [self.parameters[number].grad for number in moved]
            self.processes.add_up([grad for grad in grads if grad is not None])

    def only(self, moved: Sequence[int]) -> None:
        """Let only these parameters get gradients."""
        if self.processes.sharded:  # it takes them of all parameters, whatever is asked later
            return
        for number, parameter in enumerate(self.parameters):
            parameter.requires_grad_(number in moved)

    def _sharded(self) -> list[nn.Parameter]:
        """Split what the model holds; the parameters in their new form."""
        module = self.model.module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        chosen = [names[id(parameter)] for parameter in self.parameters]
        # A block whose linears others use would be put away before they do.
        shares = bool(self.model.adapter.structure.shared)
        self.processes.shard([] if shares else list(self.model.adapter.blocks), self._run)
        return [module.get_parameter(name) for name in chosen]


class _Run(nn.Module):
    """The whole computation of an objective as one module, so that FSDP sees where it begins."""

    def __init__(self, model: TrainingModel, objective: Objective) -> None:
        super().__init__()
        self.module = model.module
        self._model = model
        self._objective = objective

    def forward(self, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return self._objective(self._model, tokens, rows)
