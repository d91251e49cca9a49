"""Causal attention. Shapes: B batch, H query heads, G key-value heads, S query and P key positions, C width of queries
and keys, V width of values; N = B*G, L = H/G queries per key-value head, R rows of one block.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["auto", "sdpa", "blocks"]

_BLOCKS_MAX_POSITIONS = 1024  # beyond, at equal widths, SDPA is as fast: `benchmarks/attention.py`


def causal_attention(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    v_BGPV: Tensor,
    documents_BS: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax(scale * q k^T) v over positions up to each query's own; shape (B, H, S, V).

    The S queries are the last S of the P positions (with a cache, P > S). Query head h uses key-value head h // (H/G).

    Args:
        documents_BS: number of the document that each position belongs to; attention stays within a document. Only
            without a cache (S == P).
        scale: 1/sqrt(C) when None.
        backend: "sdpa" is torch's scaled_dot_product_attention; "blocks" takes the queries in blocks of rows, each
            against the keys up to its end, and keeps the probabilities for the backward pass; "auto" takes "blocks" on
            a CPU, where sequences are short or values have another width than keys, else "sdpa". In bf16 "blocks"
            rounds scores and probabilities to bf16, as transformers' eager attention does; SDPA is 2 to 7 times closer.
    """
    assert documents_BS is None or q_BHSC.shape[2] == k_BGPC.shape[2], "documents of cached positions are not known"
    scale = 1 / math.sqrt(q_BHSC.shape[-1]) if scale is None else scale
    if backend == "auto":
        backend = "blocks" if _blocks_are_faster(q_BHSC, k_BGPC, v_BGPV) else "sdpa"
    if backend == "blocks":
        assert q_BHSC.shape[2] == k_BGPC.shape[2], "row blocks have no cache"
        out_BHSV: Tensor = _RowBlocks.apply(q_BHSC, k_BGPC, v_BGPV, documents_BS, scale)  # type: ignore[no-untyped-call]
        return out_BHSV
    return _sdpa(q_BHSC, k_BGPC, v_BGPV, documents_BS, scale)


@torch.no_grad()
def max_logits(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    scale: float | None = None,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """The largest scale * q k^T of each query head over all sequences and attended pairs of positions; (H,).

    Arguments and which pairs are attended to: as in `causal_attention`. Of at least float32; -inf without positions.
    Takes the queries in blocks of rows and their products in the inputs' type: as exact as the scores that attention
    itself makes. Costs the first of attention's two products, forward only.
    """
    assert documents_BS is None or q_BHSC.shape[2] == k_BGPC.shape[2], "documents of cached positions are not known"
    (B, H, S, C), (G, P) = q_BHSC.shape, k_BGPC.shape[1:3]
    scale = 1 / math.sqrt(C) if scale is None else scale
    wide = torch.promote_types(q_BHSC.dtype, torch.float32)
    largest_H = torch.full((H,), -math.inf, dtype=wide, device=q_BHSC.device)
    position_P = torch.arange(P, device=q_BHSC.device)
    block_rows = _block_rows(C)
    for start in range(0, S if B else 0, block_rows):
        end = min(start + block_rows, S)
        seen = P - S + end  # by the last of these queries
        q_NRC = q_BHSC[:, :, start:end].reshape(B * G, -1, C)
        scores = torch.bmm(q_NRC, k_BGPC[:, :, :seen].reshape(B * G, seen, C).mT).view(B, H, end - start, seen)
        future_RP = position_P[:seen] > position_P[P - S + start : seen].unsqueeze(1)
        scores = scores.masked_fill_(future_RP, -math.inf)
        if documents_BS is not None:
            other_BRP = documents_BS[:, start:end].unsqueeze(2) != documents_BS[:, :seen].unsqueeze(1)
            scores.masked_fill_(other_BRP.unsqueeze(1), -math.inf)
        largest_H = torch.maximum(largest_H, scores.amax((0, 2, 3)).to(wide) * scale)
    return largest_H


def _blocks_are_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """On a CPU SDPA has no fused kernel for values of another width: it holds the whole square then.

    Whether there are gradients plays no part: a pass without them must route tokens as the one with them does.
    """
    if q.device.type != "cpu" or q.shape[2] != k.shape[2]:
        return False
    return q.shape[2] <= _BLOCKS_MAX_POSITIONS or q.shape[3] != v.shape[3]


def _block_rows(width: int) -> int:
    """Fewer rows waste less of the square; products of wide heads pay for more (`benchmarks/attention.py`)."""
    return 64 if width < 64 else 128


def _sdpa(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, documents_BS: Tensor | None, scale: float) -> Tensor:
    num_queries, num_keys = q_BHSC.shape[2], k_BGPC.shape[2]
    mask = None
    if documents_BS is not None:
        same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
        mask = same_BSS.tril().unsqueeze(1)
    elif 1 < num_queries < num_keys:
        position_S = torch.arange(num_keys - num_queries, num_keys, device=q_BHSC.device)
        mask = torch.arange(num_keys, device=q_BHSC.device) <= position_S.unsqueeze(1)
    return F.scaled_dot_product_attention(
        q_BHSC,
        k_BGPC,
        v_BGPV,
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=scale,
        enable_gqa=q_BHSC.shape[1] != k_BGPC.shape[1],
    )


class _RowBlocks(torch.autograd.Function):
    """Attention of blocks of query rows, each with the keys up to its end: most of the upper triangle is not computed.

    The queries of the L heads that share keys are rows of one product. Softmax and its gradient are in at least
    float32; the probabilities are kept, in the dtype of the inputs: about N * L * S^2 / 2 of them.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, documents_BS: Tensor | None, scale: float
    ) -> Tensor:
        B, H, S, C = q_BHSC.shape
        G, V = k_BGSC.shape[1], v_BGSV.shape[3]
        wide = torch.promote_types(q_BHSC.dtype, torch.float32)
        q_NLSC = torch.mul(q_BHSC, scale, out=q_BHSC.new_empty(B, H, S, C)).view(B * G, H // G, S, C)
        k_NSC, v_NSV = k_BGSC.reshape(B * G, S, C), v_BGSV.reshape(B * G, S, V)
        # In the order of the projection that follows, which would copy it otherwise.
        out_BSHV = q_NLSC.new_empty(B, S, H, V)
        block_rows = _block_rows(C)
        future_RR = torch.ones(block_rows, block_rows, dtype=torch.bool, device=q_BHSC.device).triu_(1)
        kept = []
        for start in range(0, S, block_rows):
            end = min(start + block_rows, S)
            scores = torch.bmm(q_NLSC[:, :, start:end].flatten(1, 2), k_NSC[:, :end].transpose(1, 2)).to(wide)
            by_batch = scores.view(B, H, end - start, end)
            by_batch[..., start:].masked_fill_(future_RR[: end - start, : end - start], -math.inf)
            if documents_BS is not None:
                other_BRP = documents_BS[:, start:end].unsqueeze(2) != documents_BS[:, :end].unsqueeze(1)
                by_batch.masked_fill_(other_BRP.unsqueeze(1), -math.inf)
            weights = torch.softmax(scores, -1).to(q_BHSC.dtype)
            if any(ctx.needs_input_grad):
                kept.append(weights)
            out_BHRV = torch.bmm(weights, v_NSV[:, :end]).view(B, H, end - start, V)
            out_BSHV[:, start:end] = out_BHRV.transpose(1, 2)
        ctx.save_for_backward(q_NLSC, k_NSC, v_NSV, *kept)
        ctx.scale, ctx.block_rows = scale, block_rows
        return out_BSHV.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSV: Tensor) -> tuple[Tensor | None, ...]:
        q_NLSC, k_NSC, v_NSV, *kept = ctx.saved_tensors
        (N, L, S, _), (B, H) = q_NLSC.shape, grad_BHSV.shape[:2]
        wide = torch.promote_types(q_NLSC.dtype, torch.float32)
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]  # not all, where projections are frozen
        grad_q_NLSC, grad_k_NSC, grad_v_NSV = torch.empty_like(q_NLSC), None, None
        # The last block meets all keys: its products begin the sums over blocks.
        for start, weights in reversed(list(zip(range(0, S, ctx.block_rows), kept, strict=True))):
            end = min(start + ctx.block_rows, S)
            grad_rows = grad_BHSV[:, :, start:end].reshape(N, L * (end - start), -1)
            q_rows = q_NLSC[:, :, start:end].flatten(1, 2)
            if needs_v:
                part_v = torch.bmm(weights.transpose(1, 2), grad_rows).to(wide)
                grad_v_NSV = part_v if grad_v_NSV is None else _add_rows(grad_v_NSV, part_v)
            if not (needs_q or needs_k):
                continue
            grad_weights = torch.bmm(grad_rows, v_NSV[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights.to(wide), weights.to(wide), -1, wide)
            grad_scores = grad_scores.to(q_NLSC.dtype)
            if needs_q:
                rows_q = torch.bmm(grad_scores, k_NSC[:, :end])
                grad_q_NLSC[:, :, start:end] = rows_q.mul_(ctx.scale).unflatten(1, (L, -1))
            if needs_k:
                part_k = torch.bmm(grad_scores.transpose(1, 2), q_rows).to(wide)
                grad_k_NSC = part_k if grad_k_NSC is None else _add_rows(grad_k_NSC, part_k)
        return (
            grad_q_NLSC.view(B, H, S, -1) if needs_q else None,
            None if grad_k_NSC is None else grad_k_NSC.to(q_NLSC.dtype).view(B, H // L, S, -1),
            None if grad_v_NSV is None else grad_v_NSV.to(q_NLSC.dtype).view(B, H // L, S, -1),
            None,
            None,
        )


def _add_rows(total: Tensor, part: Tensor) -> Tensor:
    """Add `part` to the first rows (of each batch) of `total`, in place."""
    total[:, : part.shape[1]] += part
    return total
