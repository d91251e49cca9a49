"""The SwiGLU feed-forward network, down(silu(gate x) * up x) (arXiv:2002.05202): of a dense layer, and of experts on a
CPU, in segments of rows.

Shapes: D model width, F hidden width, E experts, R rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from earthshine.device import at_least_float32_dtype

_SEGMENT_ROWS = 1024  # 3 MB per activation at a width of 704: a few of them fit the last-level cache of a small CPU


def swiglu(x: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor) -> Tensor:
    """The network of a dense layer: x (..., D) as the rows of one expert."""
    if x.device.type != "cpu":
        return F.linear(F.silu(F.linear(x, w_gate_FD)) * F.linear(x, w_up_FD), w_down_DF)
    x_RD = x.reshape(-1, x.shape[-1])
    weights = (w.unsqueeze(0) for w in (w_gate_FD, w_up_FD, w_down_DF))
    y_RD: Tensor = swiglu_segments(x_RD, *weights, [x_RD.shape[0]])
    return y_RD.view(x.shape)


# Not compiled: the loads depend on the data, and each would be another graph.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def swiglu_segments(
    x_RD: Tensor, w_gate_EFD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, counts: Sequence[int]
) -> Tensor:
    """down(silu(gate x) * up x) for rows sorted by expert, `counts` of each, on a CPU; rows beyond them give zeros.

    A segment of rows at a time, so that what one matmul wrote is still cached for the next. Matmuls write straight into
    the result, element-wise work is in place, and only the outputs of gate and up are saved for the backward pass.
    """
    y_RD: Tensor = _Segments.apply(x_RD, w_gate_EFD, w_up_EFD, w_down_EDF, counts)  # type: ignore[no-untyped-call]
    return y_RD


def _add_matmul(into: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """into = a b, plus what is there when `accumulate`; `into` may be wider than the factors."""
    if into.dtype == a.dtype:  # not `addmm_`, because torch's FLOP counter does not see that
        torch.addmm(into, a, b, beta=int(accumulate), out=into)
    elif accumulate:
        into += a @ b
    else:
        into.copy_(a @ b)


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, slice, bool]]:
    """(expert, rows, whether these are the expert's first), at most `_SEGMENT_ROWS` rows of one expert at a time."""
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, _SEGMENT_ROWS):
            yield expert, slice(first, min(first + _SEGMENT_ROWS, end)), first == start


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts: Sequence[int]
    ) -> Tensor:
        saved = []  # by segment: memory of that size is reused, while one tensor of all rows would be mapped anew
        y_RD = torch.empty_like(x_RD)
        y_RD[sum(counts) :] = 0
        for expert, rows, _ in _segments(counts):
            gate, up = x_RD[rows] @ gate_EFD[expert].T, x_RD[rows] @ up_EFD[expert].T
            torch.mm(F.silu(gate).mul_(up), down_EDF[expert].T, out=y_RD[rows])
            if any(ctx.needs_input_grad):
                saved += [gate, up]
        ctx.save_for_backward(x_RD, gate_EFD, up_EFD, down_EDF, *saved)
        ctx.counts = counts
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_EFD, up_EFD, down_EDF, *saved = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down, _ = ctx.needs_input_grad
        grad_x_RD = torch.empty_like(x_RD)
        grad_x_RD[sum(ctx.counts) :] = 0
        # Sums over segments are in at least float32: in bf16 each of them would be rounded again.
        acc_dtype = at_least_float32_dtype(x_RD.dtype)
        weights = (gate_EFD, up_EFD, down_EDF)
        grad_gate_EFD, grad_up_EFD, grad_down_EDF = (torch.empty_like(w, dtype=acc_dtype) for w in weights)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                for grad in (grad_gate_EFD, grad_up_EFD, grad_down_EDF):
                    grad[expert] = 0
        segments = zip(_segments(ctx.counts), saved[0::2], saved[1::2], strict=True)
        for (expert, rows, first), gate, up in segments:
            x, grad_y = x_RD[rows], grad_y_RD[rows]
            accumulate = not first  # onto what the expert's earlier rows gave
            silu = F.silu(gate)
            if needs_down:
                _add_matmul(grad_down_EDF[expert], grad_y.T, silu * up, accumulate)
            if not (needs_x or needs_gate or needs_up):
                continue
            grad_hidden = grad_y @ down_EDF[expert]
            grad_up = silu.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
            if needs_x:
                _add_matmul(grad_x_RD[rows], grad_gate, gate_EFD[expert], False)
                _add_matmul(grad_x_RD[rows], grad_up, up_EFD[expert], True)
            if needs_gate:
                _add_matmul(grad_gate_EFD[expert], grad_gate.T, x, accumulate)
            if needs_up:
                _add_matmul(grad_up_EFD[expert], grad_up.T, x, accumulate)
        return (
            grad_x_RD if needs_x else None,
            grad_gate_EFD.to(x_RD.dtype) if needs_gate else None,
            grad_up_EFD.to(x_RD.dtype) if needs_up else None,
            grad_down_EDF.to(x_RD.dtype) if needs_down else None,
            None,
        )
