from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data.mixture import Mixture


def take(weights: Sequence[float], samples: int) -> list[list[int]]:
    """The counts after each of `samples` samples."""
    mixture, counts, history = Mixture(weights), [0] * len(weights), []
    for _ in range(samples):
        counts[mixture.choose(counts)] += 1
        history.append(list(counts))
    return history


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9))
def test_always_within_one_sample_of_the_weights(weights: list[float]) -> None:
    k, total = len(weights), sum(weights)
    bound = 1 - 1 / (2 * k - 2) if k > 1 else 0.0  # Tijdeman's; 1e-9 for the arithmetic of this test
    for n, counts in enumerate(take(weights, 200), start=1):
        assert sum(counts) == n
        assert max(abs(c - n * w / total) for c, w in zip(counts, weights, strict=True)) <= bound + 1e-9


def test_equal_weights_take_turns_and_scale_does_not_matter() -> None:
    assert take([1, 1, 1], 6)[2::3] == [[1, 1, 1], [2, 2, 2]]
    assert take([3, 5, 2], 50) == take([6, 10, 4], 50)


def test_stays_exact_after_very_many_samples() -> None:
    """Counts beyond the precision of a float: after 2**60 samples the next choices are those of the start."""
    weights = [1, 2, 5]
    mixture, far = Mixture(weights), [w << 57 for w in weights]
    counts, base = list(far), [0, 0, 0]
    for _ in range(16):
        chosen = mixture.choose(counts)
        assert chosen == mixture.choose(base)
        counts[chosen] += 1
        base[chosen] += 1


@pytest.mark.parametrize("counts", [[0, 0], [3, 1], [5, 5]])
def test_choice_depends_on_counts_alone(counts: list[int]) -> None:
    assert Mixture([2, 1]).choose(counts) == Mixture([2, 1]).choose(list(counts))
