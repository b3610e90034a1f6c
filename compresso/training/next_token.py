"""The loss that language models are trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compresso.training.model import TrainingModel
from compresso.training.options import NEXT_TOKEN

LOGITS_BYTES = 256 * 2**20  # of one copy; the loss and its gradient need about four


def next_token(model: TrainingModel, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The mean cross-entropy of the next token: an `Objective`.

    tokens: ids, (B, T) int64. rows: of no use here.
    """
    loss = next_token_loss(model, model.hidden(tokens), tokens)
    return {"loss": loss, NEXT_TOKEN: loss}


def next_token_loss(model: TrainingModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, a float32 scalar, in nats.

    hidden: what `TrainingModel.hidden` gives for `tokens`, (B, T, d). tokens: (B, T) int64.

    Logits of long texts are made a few positions at a time, and again on the way back.
    """
    targets = tokens[:, 1:]
    vocabulary = model.adapter.config.get_text_config().vocab_size
    step = max(1, LOGITS_BYTES // (4 * vocabulary * len(tokens)))
    if step >= targets.shape[1]:
        return _summed(model, hidden[:, :-1], targets) / targets.numel()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, targets.shape[1], step):
        part = slice(start, min(start + step, targets.shape[1]))
        total = total + checkpoint(
            _summed, model, hidden[:, part], targets[:, part], use_reentrant=False
        )
    return total / targets.numel()


def _summed(model: TrainingModel, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(hidden)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
