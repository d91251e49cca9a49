"""Muon on every layout equals Muon on one process, bit for bit, when the whole gradients are the same.

Every model of `models.py` has plain, fused (rows, columns, interleaved, heads) and stacked matrices, a convolution, and
AdamW's parameters; each layout moves them as torch does.
"""

import pytest
from harness import Worlds
from layouts import LAYOUTS, differences
from tasks import OneProcess, train, whole

SPREAD = [name for name, layout in LAYOUTS.items() if layout.world > 1]


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if LAYOUTS[n].world == 4 else [pytest.mark.slow]) for n in SPREAD]
)
def test_injected_gradients(worlds: Worlds, one_process: OneProcess, layout: str) -> None:
    """Five steps: parameters, momentum and AdamW's moments."""
    got = whole(worlds.run(LAYOUTS[layout].world, train, layout, {}))
    want = one_process(layout, {})
    assert any(name.endswith("/momentum_sum") for name in want)
    assert not differences(got, want)
