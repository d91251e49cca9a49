"""Recipes by name: functions that return a whole `TrainJob`, described by the first line of their docstrings."""

from collections.abc import Callable

from earthshine.recipes import tiny
from earthshine.train.job import TrainJob

RECIPES: dict[str, Callable[[], TrainJob]] = {
    f.__name__: f for f in (tiny.tiny, tiny.tiny_moe, tiny.tiny_switch, tiny.tiny_moonlight)
}
