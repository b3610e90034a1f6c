"""auto-round's use of GPTQ's layout: every linear its own bits, groups and zeros.

What is written, and why:

- All symmetric: `auto_round:auto_gptq`, with zeros less 1, which vLLM reads too (4 and 8 bits).
  Otherwise `auto_round`, with zeros as they are: the other is read wrongly if asymmetric.
- The commonest form stands in the config once, and every linear that has another by its own name;
  a head of codes always, as it is in no block. Linears that stay dense have 16 bits there.
- No `g_idx`: it is not read.
"""

from __future__ import annotations

from compresso.checkpoint.gptq_layout import AUTO_ROUND, auto_round_config
from compresso.errors import ConfigError
from compresso.formats.parts import dense_config, written
from compresso.formats.uniform import TOLERANCE, plan
from compresso.formats.writing import Export, Written
from compresso.models.unfolded import ENTRY

PACKAGES = {"auto_round": "'compresso-llm[auto-round]'"}


def write(export: Export) -> Written:
    """The codes that the model has where the layout holds them exactly, others rounded if asked.

    Raises ConfigError for corrections that are to lie beside them: PEFT does not take its linears.
    """
    if export.beside:
        raise ConfigError(
            f"PEFT cannot put the adapter of `{export.source.path}` on the linears of"
            f" `{AUTO_ROUND}`",
            hint="pass `--format gptq` or `--format compressed-tensors`, or take the adapter away",
        )
    found = plan(export, AUTO_ROUND, head=True, groups=None, one=False)
    symmetric = all(scheme.symmetric for scheme in found.schemes.values())
    parts = found.write(export, less_one=symmetric, ordered=False)
    config = dense_config(found.model)
    config[ENTRY] = auto_round_config(
        found.by_module(), blocks=found.adapter.family.blocks, kept=found.dense()
    )
    return written(
        parts, found.model, found.adapter, config, packages=PACKAGES, tolerance=TOLERANCE
    )
