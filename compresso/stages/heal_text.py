"""What healing learns from, what it is judged by, and what it tries to come near to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from compresso.calibration.data import Calibration, load_heldout
from compresso.calibration.generated import Author
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, CompressoError
from compresso.provenance import lineage
from compresso.recipe import Step
from compresso.runtime import Runtime
from compresso.settings import CalibrationSettings
from compresso.stages.original import block_count, block_map, original_of
from compresso.stages.training_text import Text
from compresso.stages.whole_model import check_next_token
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.processes import join
from compresso.training.teacher import Beside, Wanted, open_teacher

TAIL_BLOCKS = 2


def load_text(calibration: Calibration, step: Step, source: Checkpoint, author: Author) -> Text:
    """The calibration's sequences, and held-out ones of the same dataset and length.

    author: who writes those of the dataset `self`.

    Raises CheckpointError if they are too few for a step of the optimizer.
    """
    data, settings = torch.cat(calibration.batches), step.settings
    dataset, length = calibration.record["dataset"], calibration.record["length"]
    if len(data) < settings.sequences:
        raise CheckpointError(
            f"`{dataset}` gives {len(data)} sequences to learn from, fewer than the"
            f" {settings.sequences} of one step",
            hint="pass a larger `--nsamples`, or a smaller `--sequences`",
        )
    check_next_token(calibration)
    drawn = {
        name: calibration.record[name]
        for name in ("seed", "sampling_temperature", "top_p")
        if name in calibration.record
    }
    asked = CalibrationSettings(dataset=dataset, samples=settings.heldout, length=length, **drawn)
    heldout = load_heldout(
        asked,
        source,
        kept_back=True,
        trust_remote_code=author.runtime.trust_remote_code,
        author=author,
    )
    return Text(data, torch.cat(heldout.batches), len(calibration.batches[0]), heldout.record)


def find_original(
    source: Checkpoint, step: Step, warnings: list[str], *, trust_remote_code: bool = False
) -> Checkpoint | None:
    """What the source was made from; None, with a warning, if that is not needed and not to be had.

    Raises as `original_of` does if the user names it, or the loss needs it.
    """
    given, needed = step.settings.original, step.settings.distill != "none"
    if given is not None or needed:
        return original_of(source, given, trust_remote_code=trust_remote_code)
    if len(lineage(source)) == 1:
        return None
    try:
        return original_of(source, None, trust_remote_code=trust_remote_code)
    except CompressoError as error:
        warnings.append(f"what was lost cannot be said: {error}")
        return None


@contextmanager
def open_objective(
    source: Checkpoint,
    original: Checkpoint | None,
    step: Step,
    text: Text,
    directory: Path,
    runtime: Runtime,
    *,
    beside: Beside,
) -> Iterator[MixedObjective]:
    """What is to become small; the teacher is there as long as the context is.

    directory: for what the teacher says. beside: what training takes beside the teacher.

    Raises as `open_teacher` does.
    """
    settings = step.settings
    weight = settings.distill_weight
    if settings.distill == "none":
        yield MixedObjective(Shares(next_token=1.0))
        return
    assert original is not None
    shares, pairs = Shares(next_token=1 - weight, divergence=weight), {}
    if settings.distill != "logits":
        pairs = followed(block_map(source, original), block_count(original))
        if settings.distill == "tail":
            shares = Shares(next_token=1 - weight, divergence=weight, blocks=weight)
            pairs = dict(list(pairs.items())[-TAIL_BLOCKS:])
        else:
            shares = Shares(next_token=1 - weight, hidden=weight, blocks=weight)
    wanted = Wanted(
        hidden=bool(shares.hidden),
        blocks=tuple(pairs.values()),
        scores=bool(shares.divergence),
        top=settings.top,
        temperature=settings.temperature,
    )
    processes = join(runtime.device)
    with processes.first_alone():
        teacher = open_teacher(
            original,
            torch.cat((text.data, text.heldout)),
            wanted,
            place=settings.teacher,
            directory=directory,
            runtime=runtime,
            beside=beside,
        )
    with ExitStack() as open_:
        with processes.first_alone():
            open_.enter_context(teacher)
        yield MixedObjective(shares, teacher, pairs)


def followed(origins: list[int], count: int) -> dict[int, int]:
    """Every block -> the block of the original whose output the next one was made for.

    origins: the original's block that each block was. count: blocks of the original. A block in
    front of a gap is to give what the last removed one gave, and the last what the last gave.
    """
    after = [*origins[1:], count]
    return {block: following - 1 for block, following in enumerate(after)}
