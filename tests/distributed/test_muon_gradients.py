"""Muon after a real backward: gradients differ in their last bits between layouts, and so may the parameters.

The bar is 1e-4 of the step's size, because Newton-Schulz amplifies the last bits of directions in which a gradient is
weak: 3.4445^5 = 485 times where there is nothing but rounding. The router comes nearest, 9e-5 measured: a softmax does
not see what all experts have in common, so that direction of its gradient is rounding alone. All others: 2e-5.
"""

import pytest
import torch
from harness import Worlds
from layouts import LAYOUTS, assemble, plain
from tasks import learn


@pytest.mark.parametrize(
    "layout, options",
    [
        ("fsdp-4", {}),
        ("ddp-4", {}),
        ("zero1-4", {"reduce_gradients": True}),
        ("tp-column-4", {}),
        ("tp-2-fsdp-2", {}),
        pytest.param("hsdp-2x2", {}, marks=pytest.mark.slow),
        pytest.param("fsdp-2", {}, marks=pytest.mark.slow),
        pytest.param("ddp-2", {}, marks=pytest.mark.slow),
        pytest.param("zero1-2", {"reduce_gradients": True}, marks=pytest.mark.slow),
        pytest.param("tp-row-4", {}, marks=pytest.mark.slow),
    ],
)
def test_gradients_from_backward(worlds: Worlds, layout: str, options: dict[str, bool]) -> None:
    before, after = (
        assemble(list(p)) for p in zip(*worlds.run(LAYOUTS[layout].world, learn, layout, options, 2), strict=True)
    )
    ((start, want),) = worlds.run(1, learn, plain(layout), {}, 2)
    start, want = assemble([start]), assemble([want])
    for name, p in want.items():
        assert torch.equal(before[name], start[name])
        step = (p - start[name]).abs().max()
        assert (after[name] - p).abs().max() <= 1e-4 * step, name
