"""Damping is raised where a gram needs it, in a run and in the ladder of a target alike."""

import pytest
import torch

from compresso.errors import NumericalError
from compresso.quantize_settings import GptqSettings
from compresso.stages.damping import with_damping_raised
from compresso.stages.ladder import make_ladder


def test_raises_damping_until_it_is_enough(capsys):
    def quantize(damping):
        if damping < 0.5:
            raise NumericalError("not positive definite", hint="more tokens")
        return "codes"

    found, damping = with_damping_raised(quantize, 0.01, where="`q_proj`")

    assert found == "codes" and damping == pytest.approx(1.0)
    assert capsys.readouterr().err.count("trying") == 2


def test_gives_up_after_three_times_and_names_the_place():
    tried = []

    def quantize(damping):
        tried.append(damping)
        raise NumericalError("not positive definite", hint="more tokens")

    with pytest.raises(NumericalError, match="`q_proj`: not positive definite") as raised:
        with_damping_raised(quantize, 0.01, where="`q_proj`")

    assert tried == pytest.approx([0.01, 0.1, 1.0, 10.0])
    assert raised.value.hint == "more tokens"


def test_asks_a_quantizer_without_damping_once():
    tried = []

    def quantize(damping):
        tried.append(damping)
        raise NumericalError("not finite")

    with pytest.raises(NumericalError, match="`q_proj`: not finite"):
        with_damping_raised(quantize, 0.0, where="`q_proj`")

    assert tried == [0.0]


def test_the_ladder_of_a_target_raises_damping_too(capsys):
    torch.manual_seed(0)
    rank_deficient = torch.randn(64, 4)
    gram = rank_deficient @ rank_deficient.T
    gram[0, 0] -= 2 * gram.diagonal().mean()  # negative in some direction
    weight = torch.randn(8, 64)
    ladder = make_ladder("gptq", GptqSettings(group_size=32), torch.float32)

    decoded = ladder.quantize(weight, gram, 4).decode()

    assert "trying" in capsys.readouterr().err
    assert torch.isfinite(decoded).all()
