"""The settings of the methods that heal a model by training. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings

DEFAULT_STEPS = 300
Switch = Literal["auto", "on", "off"]


@settings
class HealSettings:
    """Training after compression."""

    steps: Annotated[
        int | None,
        limit(ge=1, description=f"Steps of the optimizer, at most; {DEFAULT_STEPS} if not given."),
    ] = None
    tokens: Annotated[
        int | None,
        limit(
            ge=1,
            description="Tokens to train on, in place of `steps`: as many whole steps as they make,"
            " at least one.",
        ),
    ] = None
    sequences: Annotated[int, limit(ge=1, description="Sequences per step of the optimizer.")] = 8
    rate: Annotated[
        float | None,
        limit(gt=0, description="Largest learning rate; if not given, as suits what is trained."),
    ] = None
    warmup: Annotated[
        float, limit(ge=0, lt=1, description="Share of the steps over which the rate rises.")
    ] = 0.05
    schedule: Annotated[
        Literal["cosine", "constant"], limit(description="What the rate does afterwards.")
    ] = "cosine"
    weight_decay: Annotated[
        float, limit(ge=0, description="What matrices lose per step, times the rate.")
    ] = 0.0
    clip: Annotated[
        float, limit(ge=0, description="Longest gradient; longer ones are shortened. 0: any.")
    ] = 1.0
    distill: Annotated[
        Literal["none", "logits", "tail", "hidden"],
        limit(
            description="What is to become like the original's, beside the next token: its scores,"
            " these and its last blocks' states, or the states of every block."
        ),
    ] = "none"
    distill_weight: Annotated[
        float, limit(gt=0, le=1, description="What that counts; the next token counts the rest.")
    ] = 0.5
    temperature: Annotated[
        float, limit(gt=0, description="What scores are divided by for `distill`.")
    ] = 1.0
    top: Annotated[
        int | None,
        limit(ge=1, description="Most likely tokens to keep scores of for `distill`; else all."),
    ] = None
    teacher: Annotated[
        Literal["auto", "disk", "resident"],
        limit(description="Where the original is: asked once and written to disk, or in memory."),
    ] = "auto"
    original: Annotated[
        str | None,
        limit(description="The model to learn from; else the recorded ancestor."),
    ] = None
    evaluate_every: Annotated[
        int, limit(ge=1, description="Steps between measurements of held-out text.")
    ] = 25
    heldout: Annotated[int, limit(ge=1, description="Held-out sequences to measure.")] = 32
    patience: Annotated[
        int,
        limit(ge=0, description="Measurements without a gain that end training; 0 for never."),
    ] = 5
    checkpointing: Annotated[
        Switch,
        limit(
            description="Run blocks again on the way back, to save memory; `auto` where memory is"
            " short."
        ),
    ] = "auto"
    compile: Annotated[
        Switch,
        limit(
            description="Compile blocks with torch.compile; `auto`: on GPUs, for 200 steps or more."
        ),
    ] = "auto"
    plot: Annotated[
        bool | None,
        limit(description="Draw training as a .png; done if matplotlib is installed."),
    ] = None
    seed: Annotated[int, limit(ge=0, description="Seed of every random choice.")] = 0

    def steps_of(self, length: int) -> int:
        """Steps of the optimizer, at most, on sequences of so many tokens."""
        if self.tokens is None:
            return self.steps or DEFAULT_STEPS
        return max(1, self.tokens // (self.sequences * length))

    def reads(self, length: int) -> int:
        """Sequences of so many tokens that these steps read."""
        return self.steps_of(length) * self.sequences

    @checked
    def _check_amount(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give only one of `steps`, `tokens`")
        return self

    @checked
    def _check_distill(self) -> Self:
        scores: dict[str, object] = {"temperature": 1.0, "top": None}
        unread: dict[str, object] = {"teacher": "auto", "distill_weight": 0.5} | scores
        if self.distill != "none":
            unread = scores if self.distill == "hidden" else {}
        for name, default in unread.items():
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` does nothing with `distill` {self.distill}")
        return self


@settings
class LoraSettings(HealSettings):
    """Training a low-rank correction of every linear."""

    rank: Annotated[int, limit(ge=1, description="Rank of every correction.")] = 16
    alpha: Annotated[
        float | None,
        limit(gt=0, description="Over the rank, what a correction counts; the rank if not given."),
    ] = None
    dropout: Annotated[
        float, limit(ge=0, lt=1, description="Share of inputs that corrections do not see.")
    ] = 0.0
    linears: Annotated[
        Literal["all", "attention", "mlp"], limit(description="Linears that are corrected.")
    ] = "all"
    merge: Annotated[
        bool | None,
        limit(
            description="Add corrections to the weights; otherwise they become an adapter beside"
            " them. Done where the weights are dense, if not given."
        ),
    ] = None


@settings
class QloraSettings(LoraSettings):
    """The same beside weights that stay codes in memory."""


@settings
class FullSettings(HealSettings):
    """Training all weights."""


@settings
class LastSettings(HealSettings):
    """Training the last blocks, the final norm and the head."""

    last: Annotated[int, limit(ge=1, description="How many of the last blocks are trained.")] = 3


@settings
class LisaSettings(HealSettings):
    """Training a few blocks at a time, drawn anew every few steps, embeddings and head always."""

    active: Annotated[int, limit(ge=1, description="Blocks trained at a time.")] = 2
    interval: Annotated[int, limit(ge=1, description="Steps between draws.")] = 20


@settings
class NormsSettings(HealSettings):
    """Training norms and biases alone."""


@settings
class NeighboursSettings(HealSettings):
    """Training the blocks beside removed ones."""

    reach: Annotated[
        int, limit(ge=1, description="Blocks trained on each side of what was removed.")
    ] = 1
