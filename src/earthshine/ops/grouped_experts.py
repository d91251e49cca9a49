"""Rows sorted by expert, a matmul per group of rows, and the way back.

Shapes: T tokens, K experts per token, R = T*K routed rows, D model width, F expert width, E experts, C rows of each
expert in the padded layout.

A dropped choice has expert E: its row is sorted to the end and not counted. Rows beyond sum(counts_E) come out as zeros
and take no part in any gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from earthshine.device import has_grouped_matmul
from earthshine.ops.routing import count_tokens
from earthshine.ops.swiglu import swiglu_segments

Backend = Literal["auto", "grouped", "padded", "loop"]


@dataclass(frozen=True)
class Routed:
    """The order of routed rows. `order_R[r]` is the flat (token, choice) that row r serves; `inverse_R` undoes it."""

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor
    top_k: int


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Routed:
    """Group the T*K choices by expert, dropped ones last; within one expert they keep the order of the tokens."""
    flat_R = expert_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = count_tokens(expert_TK, num_experts + 1)[:num_experts]
    return Routed(order_R, inverse_R, counts_E, expert_TK.shape[1])


class _Permute(torch.autograd.Function):
    """x_RD[r] = x_TD[token of r]. Its gradient is a gather and a sum over K, not a scatter: deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R).view(-1, ctx.top_k, grad_RD.shape[1]).sum(1), None, None, None


class _Unpermute(torch.autograd.Function):
    """y_TD[t] = sum_k weights_TK[t, k] * y_RD[row of (t, k)]; both directions are gathers."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, order_R, inverse_R, weights_TK)
        y_TKD = y_RD.index_select(0, inverse_R).view(*weights_TK.shape, y_RD.shape[1]).to(weights_TK.dtype)
        return torch.bmm(weights_TK.unsqueeze(1), y_TKD).squeeze(1).to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor]:
        y_RD, order_R, inverse_R, weights_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, order_R // weights_TK.shape[1]).to(weights_TK.dtype)
        grad_weights_R = (y_RD.to(weights_TK.dtype) * grad_RD).sum(-1).index_select(0, inverse_R)
        weights_R1 = weights_TK.flatten().index_select(0, order_R).unsqueeze(1)
        return grad_RD.mul_(weights_R1).to(y_RD.dtype), None, None, grad_weights_R.view_as(weights_TK)


def permute(x_TD: Tensor, routed: Routed) -> Tensor:
    """Each token's row, once for each of its experts, sorted by expert: shape (R, D)."""
    rows: Tensor = _Permute.apply(x_TD, routed.order_R, routed.inverse_R, routed.top_k)  # type: ignore[no-untyped-call]
    return rows


def unpermute(y_RD: Tensor, routed: Routed, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's expert outputs, shape (T, D), summed in the dtype of the weights."""
    sums: Tensor = _Unpermute.apply(y_RD, routed.order_R, routed.inverse_R, weights_TK)  # type: ignore[no-untyped-call]
    return sums


def swiglu_experts(
    x_RD: Tensor,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    counts_E: Tensor,
    backend: Backend = "auto",
    capacity: int = 0,
) -> Tensor:
    """down(silu(gate x) * up x) with each row's own expert (arXiv:2002.05202): shape (R, D).

    Backends:
        "loop": one expert after another; the oracle.
        "padded": a batched matmul over `capacity` rows per expert (where 0, as many as the fullest expert has).
        "grouped": on an accelerator torch's grouped matmul, for widths in multiples of 16 bytes; without a kernel
            (`device.has_grouped_matmul`) each of its calls waits for the device. On a CPU `swiglu_segments`.
        "auto": `choose_backend`.

    Args:
        x_RD: rows sorted by expert; experts without rows are allowed.
        capacity: the most rows an expert has; 0 when that is not known.
    """
    if backend == "auto":
        backend, _ = choose_backend(x_RD, w_gate_EFD, capacity)
    if backend == "padded":
        return _padded(x_RD, w_gate_EFD, w_up_EFD, w_down_EDF, counts_E, capacity)
    if backend == "grouped" and x_RD.device.type == "cpu":
        y_RD: Tensor = swiglu_segments(x_RD, w_gate_EFD, w_up_EFD, w_down_EDF, counts_E.tolist())
        return y_RD
    if backend == "grouped":
        return _grouped(x_RD, w_gate_EFD, w_up_EFD, w_down_EDF, counts_E)
    looped: Tensor = _loop(x_RD, w_gate_EFD, w_up_EFD, w_down_EDF, counts_E)
    return looped


def choose_backend(x_RD: Tensor, w_EFD: Tensor, capacity: int) -> tuple[Backend, str]:
    """The backend that "auto" takes, and why.

    On an accelerator without torch's kernel (an A100, or in float32) it is the loop: it copies the counts to the host
    once for a layer's forward and backward pass, not in each of the nine matmuls; "padded" would wait as often, and
    multiply the work by the fullest expert's load over the mean. With a capacity nothing has to wait.
    """
    if x_RD.device.type == "cpu":
        return "grouped", "on a CPU a matmul per expert is as fast as a batched one, and pads nothing"
    if capacity:
        return "padded", "with a capacity all shapes are known in advance"
    if not has_grouped_matmul(x_RD.device, x_RD.dtype):
        return "loop", f"torch has no grouped matmul in {str(x_RD.dtype).removeprefix('torch.')} for this device"
    if any(n * x_RD.element_size() % 16 for n in w_EFD.shape[1:]):
        return "loop", f"torch's grouped matmul wants widths of multiples of 16 bytes, not {list(w_EFD.shape[1:])}"
    return "grouped", "torch's grouped matmul takes these"


# Not compiled: the loads depend on the data, and each would be another graph.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop(x_RD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor) -> Tensor:
    *parts, dropped = x_RD.split([*(counts := counts_E.tolist()), x_RD.shape[0] - sum(counts)])
    experts = zip(parts, gate_EFD.unbind(), up_EFD.unbind(), down_EDF.unbind(), strict=True)
    outputs = [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in experts]
    return torch.cat([*outputs, torch.zeros_like(dropped)])


def _grouped(x_RD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    # The grouped matmul leaves rows beyond the last group, and their gradients, uninitialized: neither may be used.
    used_R1 = (torch.arange(x_RD.shape[0], device=x_RD.device) < ends_E[-1]).unsqueeze(1)
    x_RD = x_RD.where(used_R1, 0)
    gate_RF = F.grouped_mm(x_RD, gate_EFD.transpose(1, 2), offs=ends_E)
    up_RF = F.grouped_mm(x_RD, up_EFD.transpose(1, 2), offs=ends_E)
    hidden_RF = (F.silu(gate_RF) * up_RF).where(used_R1, 0)
    y_RD: Tensor = F.grouped_mm(hidden_RF, down_EDF.transpose(1, 2), offs=ends_E)
    return y_RD.where(used_R1, 0)


def _padded(
    x_RD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor, capacity: int
) -> Tensor:
    num_rows, num_experts = x_RD.shape[0], gate_EFD.shape[0]
    if num_rows == 0:  # gradients of zero, not None
        return x_RD + 0 * (gate_EFD.sum() + up_EFD.sum() + down_EDF.sum())
    width = capacity or max(1, int(counts_E.max()))
    torch._assert_async((counts_E <= width).all(), "an expert has more rows than its capacity")
    ends_E = counts_E.cumsum(0)
    row_R = torch.arange(num_rows, device=x_RD.device)
    expert_R = torch.searchsorted(ends_E, row_R, right=True)
    used_R1 = (expert_R < num_experts).unsqueeze(1)
    expert_R = expert_R.clamp(max=num_experts - 1)
    slot_R = expert_R * width + row_R - (ends_E - counts_E)[expert_R]
    # One extra slot at the end takes every unused row.
    slot_R = slot_R.where(used_R1.squeeze(1), num_experts * width)
    x_ECD = x_RD.new_zeros(num_experts * width + 1, x_RD.shape[1]).index_copy(0, slot_R, x_RD)[:-1]
    x_ECD = x_ECD.unflatten(0, (num_experts, width))
    hidden_ECF = F.silu(x_ECD @ gate_EFD.transpose(1, 2)) * (x_ECD @ up_EFD.transpose(1, 2))
    y_SD: Tensor = (hidden_ECF @ down_EDF.transpose(1, 2)).flatten(0, 1)
    return y_SD.index_select(0, slot_R.clamp(max=num_experts * width - 1)).where(used_R1, 0)
