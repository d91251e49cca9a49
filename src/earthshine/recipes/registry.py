"""Recipes by name: functions that return a whole `TrainJob`, described by the first line of their docstrings."""

from collections.abc import Callable

from earthshine.errors import ConfigError, nearest
from earthshine.recipes import tiny
from earthshine.train.job import TrainJob

RECIPES: dict[str, Callable[[], TrainJob]] = {
    f.__name__: f for f in (tiny.tiny, tiny.tiny_moe, tiny.tiny_switch, tiny.tiny_moonlight)
}


def recipe(name: str) -> TrainJob:
    """The job of that recipe. Raises ConfigError, with the nearest name, when there is none."""
    if name not in RECIPES:
        raise ConfigError(f"recipe '{name}' is not known.{nearest(name, RECIPES)}")
    return RECIPES[name]()
