"""What a method at some width is counted as is what is stored, where the layout is compresso's."""

from __future__ import annotations

import pytest
import torch

from compresso.checkpoint import coded
from compresso.quantize_settings import HiggsSettings, RtnSettings
from compresso.stages.ladder import make_ladder

SETTINGS = [
    RtnSettings(group_size=32, scale_bits=8),
    RtnSettings(group_size=16, scale_bits=8, symmetric=False),
    HiggsSettings(block=16, scale_bits=8),
    HiggsSettings(block=32, dimension=1, scale_bits=8),
    HiggsSettings(block=32, dimension=1),
]


@pytest.mark.parametrize("shape", [(24, 96), (7, 160)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sizes_are_those_of_what_is_coded(settings, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    uniform = isinstance(settings, RtnSettings)
    ladder = make_ladder("rtn" if uniform else "higgs", settings, torch.bfloat16)
    for bits in ladder.bits:
        codes = ladder.quantize(weight, None, bits)
        stored = coded.pack("x", codes, symmetric=uniform and settings.symmetric)
        assert ladder.nbytes(shape, bits) == sum(tensor.nbytes for tensor in stored.values())


def test_scales_are_part_of_the_key():
    keys = [make_ladder("rtn", settings, torch.bfloat16).key for settings in SETTINGS[:2]]
    keys.append(make_ladder("rtn", RtnSettings(group_size=32), torch.bfloat16).key)
    assert len({*keys}) == 3
