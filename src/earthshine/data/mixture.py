"""Which source the next sample comes from: weights without chance. Standard library only.

Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), 323-330: with k sources of fractions w_i,
after any number n of samples, every source has been taken within 1 - 1/(2k - 2) of n * w_i times: the best bound there
is. (Taking the source that lags most, as is common, falls behind by more than one sample when there are many sources.)
The choice depends on the counts alone, so a state of one number per source resumes it; and it is made in whole
numbers, so it is the same on every machine, however long the run.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm


class Mixture:
    """A fixed set of weights, each greater than 0."""

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(w) for w in weights]
        scale = lcm(*(w.denominator for w in exact))
        self._weights = [int(w * scale) for w in exact]
        self._total = sum(self._weights)

    def choose(self, counts: Sequence[int]) -> int:
        """The source of the next sample, where counts[i] samples have been taken from source i."""
        k = len(self._weights)
        if k == 1:
            return 0
        taken = sum(counts) + 1
        best, best_key = -1, 0.0
        for i, (weight, count) in enumerate(zip(self._weights, counts, strict=True)):
            # (2k - 2) * W * sigma_i, where sigma_i = w_i * (n + 1) - count_i is how far source i lags behind its due
            lag = (2 * k - 2) * (weight * taken - count * self._total)
            if lag < self._total:
                continue  # sigma_i < 1/(2k - 2): taking it now would put it too far ahead
            key = ((2 * k - 3) * self._total - lag) / weight  # how long it could still wait
            if best < 0 or key < best_key:
                best, best_key = i, key
        return best
