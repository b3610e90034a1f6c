"""Text of a stage that trains: what it learns from, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from compresso.calibration.data import Calibration, heldout_count
from compresso.compensate_settings import RilqSettings
from compresso.errors import CheckpointError
from compresso.stages.whole_model import check_next_token


@dataclass(frozen=True)
class Text:
    """Sequences of ids, all of one length.

    data:    to learn from, (N, T) int64. heldout: to judge by, (M, T) int64.
    micro:   run at once. record: of the held-out ones.
    """

    data: Tensor
    heldout: Tensor
    micro: int
    record: dict[str, Any]

    @property
    def batches(self) -> list[Tensor]:
        """The held-out sequences, as many at a time as are run at once."""
        return list(self.heldout.split(self.micro))

    def first(self, count: int) -> Self:
        """The same with the first sequences alone to learn from."""
        return replace(self, data=self.data[:count])


def split_text(calibration: Calibration, settings: RilqSettings) -> Text:
    """The first sequences to learn from, and the last to judge by, as `load_calibration` has them.

    Raises CheckpointError if they are too few, or have no next token.
    """
    check_next_token(calibration)
    sequences = torch.cat(calibration.batches)
    heldout = heldout_count(settings.heldout_share, len(sequences))
    left = len(sequences) - heldout
    if left < settings.sequences:
        raise CheckpointError(
            f"`{calibration.record['dataset']}` gives {left} sequences to learn from, beside"
            f" {heldout} to judge by: fewer than the {settings.sequences} of one step",
            hint="pass a larger `--nsamples`, or a smaller `--sequences`",
        )
    return Text(
        data=sequences[:left],
        heldout=sequences[left:],
        micro=len(calibration.batches[0]),
        record=calibration.record,
    )
