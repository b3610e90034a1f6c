"""GPTQ's layout, which transformers reads with gptqmodel, and vLLM.

What is written, and why:

- Symmetric codes in version 1, which every reader knows; asymmetric ones in version 2, as version 1
  cannot tell a zero of 0 from others. vLLM reads 4 and 8 bits, symmetric, alone.
- One form for all linears: transformers drops rules by layer. Where some linears of blocks stay
  dense, those that are not are listed by their full names, which loaders match by their ends.
- The head stays dense: a head of codes is reported as left over, and replaced by random weights.
- No act-order: columns are where they are in memory, and `g_idx` says so.
"""

from __future__ import annotations

from compresso.checkpoint.gptq_layout import GPTQ, gptq_config
from compresso.formats.parts import corrections, dense_config, written
from compresso.formats.uniform import TOLERANCE, plan
from compresso.formats.writing import Export, Written
from compresso.models.unfolded import ENTRY

PACKAGES = {"gptqmodel": "'compresso-llm[gptq]'", "optimum": "'compresso-llm[gptq]'"}
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)  # of gptqmodel's kernels


def write(export: Export) -> Written:
    """The codes that the model has where the layout holds them exactly, others rounded if asked."""
    found = plan(export, GPTQ, head=False, groups=GROUPS, one=True)
    scheme = next(iter(found.schemes.values()))
    parts = found.write(export, less_one=scheme.symmetric, ordered=True)
    only = list(found.by_module()) if found.dense() else None
    config = dense_config(found.model)
    config[ENTRY] = gptq_config(scheme, only=only)
    return written(
        parts,
        found.model,
        found.adapter,
        config,
        packages=PACKAGES,
        tolerance=TOLERANCE,
        corrected=corrections(export, found.model, found.adapter),
    )
