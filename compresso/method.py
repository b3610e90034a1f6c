"""What the table of stages and methods is made of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """One way to do a stage.

    settings:   its record.
    code:       "module:function" of its formula, or of what applies that.
    follows:    paper or specification.
    calibrated: whether it reads calibration text.
    packed_as:  the layout of the linears it quantizes, if it does.
    """

    settings: type
    code: str
    follows: str
    calibrated: bool
    packed_as: Literal["compressed-tensors", "coded", "bitsandbytes"] = "compressed-tensors"


@dataclass(frozen=True)
class Stage:
    """One thing that can be done to a checkpoint.

    code:   "module:function".
    takes:  the kind of weights it reads. leaves: the kind it writes (`same`: what it read),
            or None if it writes none.
    methods: the first is the default.
    copies:  whether it copies stored tensors, so that an adapter beside them would be lost.
    trains:  whether it learns from text, so that some of that is kept apart to judge by.
    exports: whether it writes the model in a form that other programs read; no stage goes on from
             that unless told to.
    named:   what users call a method of this stage.
    together: whether several processes can share its work.
    presets: name -> method and settings.
    """

    code: str
    takes: Literal["dense", "any"]
    leaves: Literal["dense", "quantized", "same"] | None
    methods: dict[str, Method]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    copies: bool = False
    trains: bool = False
    exports: bool = False
    named: Literal["method", "format"] = "method"
    together: bool = False
