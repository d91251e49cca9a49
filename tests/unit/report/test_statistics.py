"""Differences and their errors, against formulas written another way and against drawing texts again."""

import dataclasses
import math
import random
import statistics

import pytest

from earthshine.report.runs import Heldout
from earthshine.report.statistics import moving_mean, paired, ratio


def heldout(losses, tokens, **other):
    mean = math.fsum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)
    values = {"loss": mean, "stderr": 0.1, "bits_per_byte": mean / 2, "tokens": sum(tokens), "bytes": 9.0}
    return Heldout(sequences=tuple(zip(losses, tokens, strict=True)), **(values | other))


def test_equal_lengths_give_the_textbook_error_of_a_mean():
    rng = random.Random(0)
    a = [rng.gauss(2, 0.5) for _ in range(20)]
    b = [x + rng.gauss(0.1, 0.05) for x in a]
    d = paired(heldout(b, [7] * 20), heldout(a, [7] * 20), "b", "a")
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    assert d.value == pytest.approx(statistics.mean(gaps))
    assert d.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(20))
    assert d.bits_per_byte == pytest.approx(d.value / 2)
    assert d.bits_per_byte_stderr == pytest.approx(d.stderr / 2)
    assert d.verdict == "higher"
    assert ratio(d) == pytest.approx(d.value / d.stderr)


def test_unequal_lengths_give_the_spread_of_texts_drawn_again():
    """The linearized error against a bootstrap; 4 % is near four times the noise of 4,000 draws, 1/sqrt(8,000)."""
    rng = random.Random(1)
    tokens = [rng.randrange(20, 500) for _ in range(60)]
    a = [rng.gauss(2, 0.5) for _ in tokens]
    b = [x + rng.gauss(0.1, 0.1) for x in a]
    d = paired(heldout(b, tokens), heldout(a, tokens), "b", "a")
    drawn = []
    for _ in range(4000):
        chosen = rng.choices(range(60), k=60)
        total = sum(tokens[i] for i in chosen)
        drawn.append(sum(tokens[i] * (b[i] - a[i]) for i in chosen) / total)
    assert d.stderr == pytest.approx(statistics.stdev(drawn), rel=0.04)


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([-0.2, -0.21, -0.19, -0.2], "lower"),
        ([0.2, 0.21, 0.19, 0.2], "higher"),
        ([0.2, -0.21, 0.19, -0.2], "unclear"),
        ([0.0, 0.0, 0.0, 0.0], "equal"),
        ([1e-6, 1.1e-6, 0.9e-6, 1e-6], "equal"),  # many errors from zero, and yet only rounding
        ([-0.2], "no error"),
    ],
)
def test_verdicts(gaps, verdict):
    n = len(gaps)
    d = paired(heldout([2 + g for g in gaps], [5] * n), heldout([2.0] * n, [5] * n), "b", "a")
    assert d.verdict == verdict


def test_twice_the_error_is_the_bar():
    """Gaps m +- s have mean m and error s/sqrt(3) over 4 sequences."""
    for factor, verdict in ((1.99, "unclear"), (2.01, "higher")):
        m = factor * 0.1 / math.sqrt(3)
        gaps = [m + 0.1, m - 0.1, m + 0.1, m - 0.1]
        d = paired(heldout([2 + g for g in gaps], [5] * 4), heldout([2.0] * 4, [5] * 4), "b", "a")
        assert ratio(d) == pytest.approx(factor)
        assert d.verdict == verdict


def test_other_sequences_are_not_compared():
    a = heldout([1.0, 2.0], [5, 6])
    assert paired(a, heldout([1.0, 2.0], [5, 7]), "a", "b") == "they were measured on different held-out sequences"
    for other in (dataclasses.replace(a, bytes=8.0), dataclasses.replace(a, identity=("another",))):
        assert "different" in paired(a, other, "a", "b")
    assert "not recorded" in paired(a, dataclasses.replace(a, sequences=()), "a", "b")


def test_moving_mean_skips_what_is_not_finite():
    assert moving_mean([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert moving_mean([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(moving_mean([math.nan], 3)[0])
