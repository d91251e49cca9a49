"""The language-model loss, which never holds all logits. Shapes: T tokens, D width, V vocabulary (of this rank)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from earthshine.device import at_least_float32_dtype

IGNORE = -100
Reduce = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def cross_entropy_sum(
    h_TD: Tensor,
    w_VD: Tensor,
    targets_T: Tensor,
    *,
    chunk_tokens: int | None = None,
    vocab_start: int = 0,
    reduce_max: Reduce = _identity,
    reduce_sum: Reduce = _identity,
) -> Tensor:
    """The sum over tokens of -log softmax(w h)[target], in nats, skipping targets of -100.

    Logits are made `chunk_tokens` rows at a time, and each chunk's gradient with them: the cost is that of the plain
    loss (three matmuls), the memory that of one chunk. Softmax and sums are in at least float32.

    Args:
        h_TD, w_VD: hidden states and head, of one dtype.
        targets_T: int64 in [0, V), or -100. Any other has no probability: the result is NaN.
        chunk_tokens: None for 256 on a CPU, where a chunk of logits should stay in the cache, and 1,024 elsewhere.
        vocab_start, reduce_max, reduce_sum: for a head that holds rows vocab_start.. of a larger vocabulary; the
            reductions run over the ranks that hold the others. Defaults: the whole vocabulary is here.

    Returns:
        A 0-d tensor, float32 (float64 for float64 input).
    """
    assert targets_T.shape == h_TD.shape[:1], f"{list(targets_T.shape)} targets for {h_TD.shape[0]} tokens"
    if chunk_tokens is None:
        chunk_tokens = 256 if h_TD.device.type == "cpu" else 1024
    needs_grad = tuple(torch.is_grad_enabled() and t.requires_grad for t in (h_TD, w_VD))
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_TD, w_VD, targets_T, chunk_tokens, vocab_start, reduce_max, reduce_sum, needs_grad
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        w_VD: Tensor,
        targets_T: Tensor,
        chunk_tokens: int,
        vocab_start: int,
        reduce_max: Reduce,
        reduce_sum: Reduce,
        needs_grad: tuple[bool, bool],
    ) -> Tensor:
        acc_dtype = at_least_float32_dtype(h_TD.dtype)
        total = torch.zeros((), dtype=torch.float64, device=h_TD.device)
        grad_h_TD = torch.empty_like(h_TD) if needs_grad[0] else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=acc_dtype) if needs_grad[1] else None
        # 16 columns more than needed: rows a power of two apart would compete for the same few cache lines.
        buffer_CV = h_TD.new_empty(min(chunk_tokens, h_TD.shape[0]), w_VD.shape[0] + 16)[:, :-16]
        for start in range(0, h_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            h_CD, target_C = h_TD[rows], targets_T[rows]
            valid_C = target_C != IGNORE
            column_C = target_C - vocab_start
            is_local_C = valid_C & (column_C >= 0) & (column_C < w_VD.shape[0])
            column_C1 = column_C.where(is_local_C, 0).unsqueeze(1)
            logits_CV = torch.mm(h_CD, w_VD.T, out=buffer_CV[: h_CD.shape[0]]).to(acc_dtype)
            logits_CV -= reduce_max(logits_CV.amax(1, keepdim=True))
            target_logit_C = logits_CV.gather(1, column_C1).squeeze(1).where(is_local_C, 0.0)
            holders = is_local_C.to(acc_dtype)
            target_logit_C, num_holders_C = reduce_sum(torch.stack((target_logit_C, holders))).unbind()
            sums_C = reduce_sum(logits_CV.exp_().sum(1))
            loss_C = (sums_C.log() - target_logit_C).where(num_holders_C > 0, torch.nan)
            total += loss_C.where(valid_C, 0.0).sum(dtype=torch.float64)
            if any(needs_grad):
                grad_CV = logits_CV.mul_((valid_C / sums_C).unsqueeze(1))
                grad_CV.scatter_add_(1, column_C1, -holders.unsqueeze(1))
                grad_CV = grad_CV.to(h_TD.dtype)
                if grad_h_TD is not None:
                    grad_h_TD[rows] = reduce_sum(grad_CV @ w_VD)
                if grad_w_VD is not None and grad_CV.dtype == acc_dtype:
                    torch.addmm(grad_w_VD, grad_CV.T, h_CD, out=grad_w_VD)
                elif grad_w_VD is not None:
                    grad_w_VD += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h_TD, grad_w_VD)
        ctx.head_dtype = w_VD.dtype
        return total.to(acc_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_TD, grad_w_VD = ctx.saved_tensors
        # Not in place: a retained graph may run backward again. In the dtype of `grad`: a step's 1/N rounded to bf16
        # would be one error common to all gradients.
        return (
            None if grad_h_TD is None else (grad_h_TD.to(grad.dtype) * grad).to(grad_h_TD.dtype),
            None if grad_w_VD is None else (grad_w_VD * grad).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )
