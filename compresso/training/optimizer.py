"""AdamW over parameters of which not all need move in every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compresso.training.options import TrainOptions
from compresso.training.processes import like, whole

BETAS = (0.9, 0.999)
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}  # names in a kept state, and in PyTorch


class Optimizer:
    """AdamW (arXiv:1711.05101). Matrices are decayed, vectors are not."""

    def __init__(self, parameters: Sequence[nn.Parameter], options: TrainOptions) -> None:
        self._parameters = list(parameters)
        self._clip = options.clip or inf
        decays = [[p for p in parameters if (p.ndim > 1) is matrix] for matrix in (True, False)]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(decays, (options.weight_decay, 0.0), strict=True)
            if group
        ]
        split = any(isinstance(parameter, DTensor) for parameter in parameters)
        self._adam = torch.optim.AdamW(groups, lr=options.rate, betas=BETAS, fused=not split)

    def clip(self, moved: Iterable[int]) -> float:
        """Shorten the gradient of these parameters if it is too long; its length before."""
        chosen = [self._parameters[number] for number in moved]
        return float(whole(nn.utils.clip_grad_norm_(chosen, self._clip)))

    def move(self, moved: Iterable[int], rate: float) -> None:
        """Move these parameters, and drop all gradients."""
        for number in {*range(len(self._parameters))} - {*moved}:
            self._parameters[number].grad = None
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def forget(self, numbers: Iterable[int]) -> None:
        """Let these parameters begin anew."""
        for number in numbers:
            self._adam.state.pop(self._parameters[number], None)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What is remembered of gradients, by name; split among processes as parameters are."""
        for number, parameter in enumerate(self._parameters):
            if held := self._adam.state.get(parameter):
                for name, own in MOMENTS.items():
                    yield f"{name}.{number}", held[own]

    def moves(self) -> list[float]:
        """How often each parameter was moved, since it began anew."""
        held = [self._adam.state.get(parameter) for parameter in self._parameters]
        return [float(one["step"]) if one else 0.0 for one in held]

    def restore(self, tensors: dict[str, Tensor], moves: Sequence[float]) -> None:
        """Go on from what `moments`, put together, and `moves` gave."""
        for number, parameter in enumerate(self._parameters):
            if moves[number]:
                self._adam.state[parameter] = {
                    "step": torch.tensor(moves[number], device=parameter.device),
                    **{
                        own: like(parameter, tensors[f"{name}.{number}"])
                        for name, own in MOMENTS.items()
                    },
                }
