"""The measures, and when a row holds."""

import math

import pytest
import torch

from earthshine.verify.measure import mean_kl, relative_difference, row


def test_the_measures() -> None:
    a, b = torch.tensor([[[100.0, 0.0]]]), torch.tensor([[[101.0, 0.0]]])
    assert relative_difference(a, b) == pytest.approx(1 / 101)
    assert mean_kl(b, b) == 0 and mean_kl(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])) == pytest.approx(
        0.1201, abs=1e-4
    )
    assert row("x", 1.0, 1.0)["ok"] and not row("x", float("nan"), 1.0)["ok"]


@pytest.mark.parametrize("measured", [math.nan, math.inf])
@pytest.mark.parametrize("tolerance", [1.0, math.nan, math.inf])
def test_nothing_holds_by_numbers_that_are_not_finite(measured: float, tolerance: float) -> None:
    """An infinite difference is not within an infinite tolerance."""
    failed = row("x", measured, tolerance, "of nothing")
    assert not failed["ok"] and failed["note"].startswith(f"measured is {measured}, so nothing was shown; ")
    assert failed["note"].endswith("; of nothing")
    assert not row("x", 0.0, math.inf)["ok"]
