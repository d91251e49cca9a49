"""recipes/: found by name, whole, and unchanged by accident."""

import json
from pathlib import Path

import pytest

from earthshine.config import decode, encode
from earthshine.model.presets import PRESETS
from earthshine.recipes.registry import RECIPES
from earthshine.train.derive import derive
from earthshine.train.job import TrainJob

GOLDEN = Path(__file__).parents[2] / "golden" / "recipes"


def test_no_recipe_hides_a_preset() -> None:
    """`earthshine show NAME` finds both by name alone."""
    assert not set(RECIPES) & set(PRESETS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole(name: str) -> None:
    job = RECIPES[name]()
    assert job.name == name and RECIPES[name].__doc__
    assert derive(job).parameters > 0
    assert decode(TrainJob, encode(job)) == job


@pytest.mark.parametrize("name", RECIPES)
def test_every_resolved_default_is_the_recorded_one(name: str) -> None:
    """A changed default shows here as a difference; record it by writing `encode(RECIPES[name]())` into the file."""
    assert encode(RECIPES[name]()) == json.loads((GOLDEN / f"{name}.json").read_text())
