"""Every recipe that comes with compresso is right, and the first one needs no network."""

from pathlib import Path

import pytest

from compresso.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_right(path):
    recipe = load_recipe(path)
    # A recipe ends by telling what it did to the model.
    assert recipe.steps[-1].stage == "eval"
    assert path.read_text().startswith("# ")


def test_quickstart_needs_nothing():
    recipe = load_recipe(RECIPES[0].parent / "quickstart.yaml")
    assert recipe.model == "reference"
    assert recipe.calibration.dataset in ("stdlib", "auto")
    assert [step.stage for step in recipe.steps] == ["analyze", "prune", "quantize", "eval"]
    assert recipe.steps[-1].settings.each
