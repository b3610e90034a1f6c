"""What a process of its own can do, for the tests of it."""

import os
import sys

from compresso.errors import ConfigError


def end(how):
    """By a signal, after a last word."""
    print("\nGGML_ASSERT(x) failed\n", file=sys.stderr, flush=True)
    os.kill(os.getpid(), how)


def fail():
    """By a mistake of the program."""
    raise ValueError("a mistake")


def refuse():
    """By an error of compresso's own."""
    raise ConfigError("no such thing", hint="another")


def exhaust():
    """For lack of memory."""
    raise MemoryError


def echo(**values):
    """With what it was given."""
    return values


def ones():
    """With a tensor."""
    import torch

    return torch.ones(2, 3)
