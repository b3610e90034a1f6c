"""What the settings of pruning and folding refuse, and what they say."""

from __future__ import annotations

import pytest

from compresso.errors import ConfigError
from compresso.recipe import make_step


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("prune", {"method": "random", "drop_count": 1, "protect": ["frist"]}, "mean `first`?"),
        ("prune", {"method": "random", "drop_count": 1, "protect": ["middle"]}, "nor a block"),
        ("prune", {"method": "random", "drop_count": 1, "ratio": 0.1}, "give only one of"),
        ("prune", {"method": "taylor"}, "give one of `ratio`, `drop_count`"),
        ("prune", {"method": "manual"}, "give one of `drop`, `order`"),
        ("prune", {"method": "manual", "drop": [1], "ratio": 0.1}, "`drop` says all"),
        ("prune", {"method": "manual", "drop": ["b3"]}, "`b3` is not a block, `a` or `m`"),
        ("prune", {"method": "manual", "order": "x"}, "give one of `ratio`, `drop_count`"),
        (
            "prune",
            {"method": "evopress", "ratio": 0.1, "offspring": 2, "survivors": 3},
            "`survivors` cannot be more",
        ),
        ("fold", {"method": "recursive", "slots": 3, "loops": 2}, "give only one of"),
        (
            "fold",
            {"method": "recursive", "slots": 3, "ratio": 0.1, "rank": 2},
            "the ratio decides the rank",
        ),
        ("fold", {"method": "foldgpt"}, "give one of `ratio`, `blocks`"),
    ],
)
def test_what_is_refused(stage, values, message):
    with pytest.raises(ConfigError) as raised:
        make_step(stage, values, where="test")
    assert message in str(raised.value)


def test_a_typo_in_a_method_is_answered():
    with pytest.raises(ConfigError) as raised:
        make_step("prune", {"method": "blokpruner", "ratio": 0.1}, where="test")
    assert raised.value.hint == "did you mean `blockpruner`?"
