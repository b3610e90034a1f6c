"""What the two halves of a block do to its hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """What the two halves of a block did to one batch; every tensor is (B, T, d).

    input:     the hidden states that entered.
    attention: what attention added to them. mlp: what the MLP added.
    output:    the hidden states that left. A half that the block lacks has added zeros.
    parallel:  both halves read the input, rather than the MLP what attention left.
    """

    input: Tensor
    attention: Tensor
    mlp: Tensor
    output: Tensor
    parallel: bool

    @property
    def after_attention(self) -> Tensor:
        """What attention made of `input`."""
        return self.input + self.attention

    @property
    def before_mlp(self) -> Tensor:
        """The residual stream that the MLP reads and adds to."""
        return self.input if self.parallel else self.after_attention

    @property
    def after_mlp(self) -> Tensor:
        """What the MLP made of `before_mlp`."""
        return self.input + self.mlp if self.parallel else self.output
