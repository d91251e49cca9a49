"""recipes/: found by name, whole, and unchanged by accident."""

import json
from pathlib import Path

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError
from earthshine.model.presets import PRESETS
from earthshine.recipes.registry import RECIPES, recipe
from earthshine.train.derive import derive
from earthshine.train.job import TrainJob

GOLDEN = Path(__file__).parents[2] / "golden" / "recipes"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"recipe 'tiny_meo' is not known. Did you mean 'tiny_moe'"):
        recipe("tiny_meo")


def test_no_recipe_hides_a_preset() -> None:
    """`earthshine show NAME` finds both by name alone."""
    assert not set(RECIPES) & set(PRESETS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole(name: str) -> None:
    job = recipe(name)
    assert job.name == name and RECIPES[name].__doc__
    assert derive(job).parameters > 0
    assert decode(TrainJob, encode(job)) == job


@pytest.mark.parametrize("name", RECIPES)
def test_every_resolved_default_is_the_recorded_one(name: str) -> None:
    """A changed default shows here as a difference; record it by writing `encode(recipe(name))` into the file."""
    assert encode(recipe(name)) == json.loads((GOLDEN / f"{name}.json").read_text())
