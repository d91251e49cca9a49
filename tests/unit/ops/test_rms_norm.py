"""The norm and its gradients equal torch's in float64, and float32 accumulation holds under bf16."""

import pytest
import torch
import torch.nn.functional as F

from earthshine.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 16), (0, 8)])
def test_values_and_gradients_equal_torch(shape: tuple[int, ...]) -> None:
    """2e-6 of the largest: float32 sums over 24 and 15 terms."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(*shape, generator=g).requires_grad_(), torch.randn(shape[-1], generator=g).requires_grad_()
    grad = torch.randn(*shape, generator=g)
    got = rms_norm(x, w, 1e-5)
    wanted = F.rms_norm(x.double(), shape[-1:], w.double(), 1e-5)
    expected = torch.autograd.grad(wanted, (x, w), grad.double())
    for a, b in zip((got, *torch.autograd.grad(got, (x, w), grad)), (wanted, *expected), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6)


def test_double_is_double_and_gradients_are_those_of_finite_differences() -> None:
    x, w = torch.randn(2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x.requires_grad_(), w.requires_grad_()))


def test_a_tiny_and_a_huge_row_are_normalized() -> None:
    x = torch.tensor([[1e-12, -1e-12], [1e15, 1e15]])
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 1e-30)[0], torch.tensor([1.0, -1.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 1e-30)[1], torch.tensor([1.0, 1.0]), rtol=1e-5, atol=0)


def test_bf16_is_rounded_once() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.rand(32)
    assert torch.equal(rms_norm(x, w, 1e-5), rms_norm(x.float(), w, 1e-5).bfloat16())
