"""The feed-forward network in segments of rows: values, gradients, and what is left out for frozen weights."""

import pytest
import torch

import earthshine.ops.swiglu as swiglu_module
from earthshine.ops.swiglu import swiglu

D, F = 16, 24


def test_a_dense_network_is_one_expert_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In segments of 7 rows, the last of them short: the weights' gradients add up. 1e-6: sums in another order."""
    monkeypatch.setattr(swiglu_module, "_SEGMENT_ROWS", 7)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*s, generator=g).requires_grad_() for s in ((2, 10, D), (F, D), (F, D), (D, F))]
    x, gate, up, down = tensors
    wanted = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    grad = torch.randn(wanted.shape, generator=g)
    got = swiglu(*tensors)
    for a, b in zip(
        (got, *torch.autograd.grad(got, tensors, grad)),
        (wanted, *torch.autograd.grad(wanted, tensors, grad)),
        strict=True,
    ):
        assert float((a - b).detach().abs().max()) <= 1e-6 * max(1.0, float(b.detach().abs().max()))


def test_frozen_weights_take_no_gradient() -> None:
    x = torch.randn(5, D)
    gate, up, down = torch.randn(F, D), torch.randn(F, D).requires_grad_(), torch.randn(D, F)
    swiglu(x, gate, up, down).sum().backward()
    assert up.grad is not None and up.grad.any()


def test_bf16_gradients_over_segments_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5: each segment is rounded, and then the sum. Summed in bf16, sixteen segments are 1.7 times as far."""
    g = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(*s, generator=g).bfloat16() for s in ((64, D), (F, D), (F, D), (D, F)))
    grad = torch.randn(64, D, generator=g).bfloat16()
    weights = [w.requires_grad_() for w in (gate, up, down)]
    exact = torch.autograd.grad(swiglu(x.double(), *(w.double() for w in weights)), weights, grad.double())
    errors = []
    for rows in (64, 4):
        monkeypatch.setattr(swiglu_module, "_SEGMENT_ROWS", rows)
        got = torch.autograd.grad(swiglu(x, *weights), weights, grad)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)])
    assert all(many <= 1.5 * one for one, many in zip(*errors, strict=True)), errors
