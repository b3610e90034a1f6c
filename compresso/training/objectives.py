"""What training makes small: the error of the next token, and the distance from an original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compresso.kernels.distillation import unit_states
from compresso.training.model import TrainingModel
from compresso.training.options import NEXT_TOKEN
from compresso.training.returned import returned_by
from compresso.training.teacher import Lesson, Teacher

LOGITS_BYTES = 64 * 2**20  # of one copy; the parts and their gradients need about six
FLOAT32_BYTES = 4
DIVERGENCE, HIDDEN, BLOCKS = "divergence", "hidden", "blocks"


@dataclass(frozen=True)
class Shares:
    """What each part counts in the loss. Parts that count nothing are not computed.

    next_token: mean cross-entropy of the next token, in nats.
    divergence: mean KL(original || trained) of the next token's softened scores, in nats, times
                the square of the temperature.
    hidden:     mean squared difference of what the head reads, over all tokens and channels.
    blocks:     the same of what some blocks return, every token's state scaled to a root mean
                square of 1 first; mean over these blocks.
    """

    next_token: float = 0.0
    divergence: float = 0.0
    hidden: float = 0.0
    blocks: float = 0.0


@dataclass(frozen=True)
class MixedObjective:
    """A weighted sum of parts; an `Objective` of `train`.

    teacher: gives what the original says of the same sequences; None for next_token alone.
    pairs:   block of the trained model -> block of the original that it is to be like.

    Source: next_token and hidden as Lee et al., arXiv:2412.01129 (RILQ); divergence as Hinton et
    al., arXiv:1503.02531; blocks in the manner of FoldGPT, arXiv:2407.00928, and of layer-wise
    distillation, with a norm of our own.
    """

    shares: Shares
    teacher: Teacher | None = None
    pairs: Mapping[int, int] = field(default_factory=dict)

    def __call__(self, model: TrainingModel, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; without gradients `next_token` is always among them."""
        shares = self.shares
        lesson = Lesson() if self.teacher is None else self.teacher.lesson(tokens, rows)
        with returned_by(model, self.pairs if shares.blocks else ()) as returned:
            hidden = model.hidden(tokens)
        parts = self._of_scores(model, hidden, tokens, lesson)
        if shares.hidden:
            assert lesson.hidden is not None
            parts[HIDDEN] = (hidden.float() - lesson.hidden.float()).square().mean()
        if shares.blocks:
            errors = [
                (unit_states(returned[own]) - lesson.blocks[other].float()).square().mean()
                for own, other in self.pairs.items()
            ]
            parts[BLOCKS] = torch.stack(errors).mean()
        counted = [getattr(shares, name) * part for name, part in parts.items()]
        return {"loss": torch.stack(counted).sum(), **parts}

    def _of_scores(
        self, model: TrainingModel, hidden: Tensor, tokens: Tensor, lesson: Lesson
    ) -> dict[str, Tensor]:
        """Those parts that need logits, of a few positions at a time."""
        predicts = bool(self.shares.next_token) or not torch.is_grad_enabled()
        compares = bool(self.shares.divergence)
        if not (predicts or compares):
            return {}
        batch, length, _ = hidden.shape
        vocabulary = int(model.adapter.config.get_text_config().vocab_size)
        step = max(1, LOGITS_BYTES // (FLOAT32_BYTES * vocabulary * batch))

        def score(piece: Tensor, start: int) -> tuple[Tensor, Tensor]:
            logits, part = model.logits(piece), slice(start, start + piece.shape[1])
            lost, distance = logits.new_zeros(()), logits.new_zeros(())
            if predicts:
                targets = tokens[:, start + 1 : part.stop + 1]
                known = logits[:, : targets.shape[1]]
                lost = nn.functional.cross_entropy(
                    known.flatten(0, 1), targets.flatten(), reduction="sum"
                )
            if compares:
                assert lesson.divergence is not None
                distance = lesson.divergence(logits, part).sum()
            return lost, distance

        pieces = []
        for start in range(0, length, step):
            piece = hidden[:, start : start + step]
            if step < length and torch.is_grad_enabled():  # nothing of a piece's logits is kept
                found = checkpoint(
                    score, piece, start, use_reentrant=False, preserve_rng_state=False
                )
            else:
                found = score(piece, start)
            pieces.append(found)
        lost, distance = (torch.stack(sums).sum() for sums in zip(*pieces, strict=True))
        parts = {}
        if predicts:
            parts[NEXT_TOKEN] = lost / (batch * (length - 1))
        if compares:
            parts[DIVERGENCE] = distance / (batch * length)
        return parts
