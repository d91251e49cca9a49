"""How large an update was: norms, which stay where they were computed until somebody asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """Norms of the parts of a group's update, before the learning rate.

    total: the sum of squares of the update's elements and their number, from the elements of each of `norms` on the
    host.
    """

    norms: Sequence[Tensor]
    total: Callable[[Sequence[Sequence[float]]], tuple[float, int]]
