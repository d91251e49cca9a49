"""Rotation against complex numbers, its gradient, and the layout and precision of its result."""

import pytest
import torch
from torch import Tensor

from earthshine.ops.rotary import rotate

B, H, S, C, R = 2, 3, 5, 10, 3


def tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles_SR = torch.arange(S, dtype=dtype).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.01], dtype=dtype)
    return angles_SR.cos(), angles_SR.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers_and_the_rest_stays(interleaved: bool) -> None:
    cos, sin = tables()
    x = torch.randn(B, S, H, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unrotated, rotated = x.transpose(1, 2).split((C - 2 * R, 2 * R), -1)
    pairs = rotated.unflatten(-1, (R, 2)) if interleaved else rotated.unflatten(-1, (2, R)).transpose(-1, -2)
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    expected = product.flatten(-2) if interleaved else product.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved=interleaved), torch.cat((unrotated, expected), -1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_is_that_of_finite_differences(interleaved: bool) -> None:
    x = torch.randn(1, S, 2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotate(t, *tables(), interleaved=interleaved), x)


def test_result_and_gradient_are_laid_out_as_their_readers_want_them() -> None:
    x = torch.randn(B, S, H, C, requires_grad=True)
    y = rotate(x, *tables(torch.float32))
    assert y.shape == (B, H, S, C)
    assert y.is_contiguous()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous()


def test_bfloat16_is_rounded_once() -> None:
    """Angles in bf16 would be off by degrees at position 1000; so products are in float32, and rounded at the end."""
    x = torch.randn(B, S, H, C, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = tables(torch.float32)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, about its tracer
def test_compiles_into_one_graph() -> None:
    """The trace alone ("aot_eager"): a break in a block's graph would cost speed silently; here it is an error."""
    x = torch.randn(B, S, H, C, generator=torch.Generator().manual_seed(3))
    direction = torch.randn(B, H, S, C, generator=torch.Generator().manual_seed(4))
    gradients = []
    for function in (rotate, torch.compile(rotate, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        (function(leaf, *tables(torch.float32)) * direction).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
