"""Rows sorted by expert, a matrix product per group of rows, and the way back.

Shapes: T tokens, K experts per token, R = T*K routed rows, D model width, F expert width, E experts; O, I the output
and input width of one product.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "grouped", "loop"]
_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Routed:
    """The order of routed rows. `order_R[r]` is the flat (token, choice) that row r serves; `inverse_R` undoes it."""

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor
    top_k: int


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Routed:
    """Group the T*K choices by expert; within one expert they keep the order of the tokens."""
    flat_R = expert_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return Routed(order_R, inverse_R, torch.bincount(flat_R, minlength=num_experts), expert_TK.shape[1])


class _Permute(torch.autograd.Function):
    """x_RD[r] = x_TD[token of r]. Its gradient is a gather and a sum over K, not a scatter: deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routed: Routed) -> Tensor:
        ctx.routed = routed
        return x_TD[routed.order_R // routed.top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_RD,) = grads
        routed: Routed = ctx.routed
        grad_TD: Tensor = grad_RD[routed.inverse_R].unflatten(0, (-1, routed.top_k)).sum(1)
        return grad_TD, None


class _Unpermute(torch.autograd.Function):
    """y_TKD[t, k] = y_RD[row of (t, k)]; both directions are gathers."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, routed: Routed) -> Tensor:
        ctx.routed = routed
        y_TKD: Tensor = y_RD[routed.inverse_R].unflatten(0, (-1, routed.top_k))
        return y_TKD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_TKD,) = grads
        return grad_TKD.flatten(0, 1)[ctx.routed.order_R], None


def permute(x_TD: Tensor, routed: Routed) -> Tensor:
    """Each token's row, once for each of its experts, sorted by expert: shape (R, D)."""
    result: Tensor = _Permute.apply(x_TD, routed)  # type: ignore[no-untyped-call]
    return result


def unpermute(y_RD: Tensor, routed: Routed, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's expert outputs, shape (T, D), summed in the dtype of the weights."""
    y_TKD: Tensor = _Unpermute.apply(y_RD, routed)  # type: ignore[no-untyped-call]
    return torch.bmm(weights_TK.unsqueeze(1), y_TKD.to(weights_TK.dtype)).squeeze(1).to(y_RD.dtype)


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor, backend: Backend = "auto") -> Tensor:
    """y[r] = w[expert of r] @ x[r] for rows sorted by expert; experts without rows are allowed.

    Backends: "loop" is one product per expert, the oracle, any dtype; "grouped" is torch's grouped matrix product
    (float32 and half types, widths in multiples of 16 bytes); "auto" takes "grouped" where it can run.
    """
    if backend == "auto":
        backend = "grouped" if can_group(x_RI, w_EOI) else "loop"
    if backend == "loop":
        parts = x_RI.split(counts_E.tolist())
        return torch.cat([F.linear(x, w) for x, w in zip(parts, w_EOI.unbind(0), strict=True)])
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=ends_E)


def can_group(x_RI: Tensor, w_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these: its kernels want 16-byte rows and at most float32."""
    aligned = all(n * x_RI.element_size() % 16 == 0 for n in w_EOI.shape[1:])
    return aligned and x_RI.dtype in _GROUPED_MM_DTYPES


def swiglu_experts(
    x_RD: Tensor, w_gate_EFD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, counts_E: Tensor, backend: Backend = "auto"
) -> Tensor:
    """down(silu(gate x) * up x) with each row's own expert (arXiv:2002.05202): shape (R, D)."""
    gate_RF = grouped_linear(x_RD, w_gate_EFD, counts_E, backend)
    up_RF = grouped_linear(x_RD, w_up_EFD, counts_E, backend)
    return grouped_linear(F.silu(gate_RF) * up_RF, w_down_EDF, counts_E, backend)
