"""The stages that give back what compression took. Imports no torch."""

from __future__ import annotations

from compresso.compensate_settings import (
    EoraSettings,
    LoftqSettings,
    LqLoraSettings,
    LrecSettings,
    RilqSettings,
)
from compresso.heal_settings import (
    FullSettings,
    LastSettings,
    LisaSettings,
    LoraSettings,
    NeighboursSettings,
    NormsSettings,
    QloraSettings,
)
from compresso.method import Method, Stage

COMPENSATE = Stage(
    "compresso.stages.compensate:compensate",
    takes="any",
    leaves="same",
    methods={
        "eora": Method(
            EoraSettings,
            "compresso.kernels.lowrank:truncate",
            "arXiv:2410.21271",
            calibrated=True,
        ),
        "lq-lora": Method(
            LqLoraSettings,
            "compresso.kernels.decomposition:decompose",
            "arXiv:2311.12023",
            calibrated=True,
        ),
        "loftq": Method(
            LoftqSettings,
            "compresso.kernels.decomposition:decompose",
            "arXiv:2310.08659",
            calibrated=False,
        ),
        "rilq": Method(
            RilqSettings,
            "compresso.stages.compensate_trained:rilq",
            "arXiv:2412.01129",
            calibrated=True,
        ),
        "lrec": Method(
            LrecSettings,
            "compresso.stages.compensate_trained:rilq",
            "arXiv:2306.08162",
            calibrated=True,
        ),
    },
)

HEAL = Stage(
    "compresso.stages.heal:heal",
    takes="any",
    leaves="same",
    trains=True,
    together=True,
    methods={
        "lora": Method(
            LoraSettings,
            "compresso.stages.heal_choice:trained",
            "arXiv:2106.09685",
            calibrated=True,
        ),
        "qlora": Method(
            QloraSettings,
            "compresso.stages.heal_choice:trained",
            "arXiv:2305.14314",
            calibrated=True,
        ),
        "full": Method(
            FullSettings,
            "compresso.stages.heal_choice:trained",
            "all weights",
            calibrated=True,
        ),
        "last-k": Method(
            LastSettings,
            "compresso.stages.heal_choice:trained",
            "arXiv:2411.15558",
            calibrated=True,
        ),
        "lisa": Method(
            LisaSettings,
            "compresso.stages.heal_choice:trained",
            "arXiv:2403.17919",
            calibrated=True,
        ),
        "norms": Method(
            NormsSettings,
            "compresso.stages.heal_choice:trained",
            "arXiv:2312.15230",
            calibrated=True,
        ),
        "neighbours": Method(
            NeighboursSettings,
            "compresso.stages.heal_choice:trained",
            "compresso's own",
            calibrated=True,
        ),
    },
)
