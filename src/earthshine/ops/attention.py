"""Causal attention. Shapes: B batch, H query heads, G key-value heads, S query and P key positions, C width of queries
and keys, V width of values; N = B*G, L = H/G queries per key-value head, R rows of one block.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from earthshine.device import at_least_float32_dtype, has_flash_attention, to_device

Backend = Literal["auto", "sdpa", "blocks", "varlen"]

_BLOCKS_MAX_POSITIONS = 1024  # beyond, at equal widths, SDPA is as fast: `benchmarks/attention.py`
_WIDTHS = 8  # an accelerator's kernels take multiples of this; padding with zeros changes no score and no output


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees, in the form that one forward's kernel reads. Made once, for all layers.

    num_keys: P. documents_BS: on the device of the queries; None without documents.
    visible: for "sdpa", where more than position decides; (B, 1, S, S) or (S, P). On a CPU a bool, True for visible
        keys; on an accelerator 0 for these and -inf for the others, which SDPA would make of a bool in every layer.
    starts: for "varlen", int32: where each sequence of queries, and of keys, starts among the B*S, or B*P, positions of
        all rows, and where the last one ends.
    """

    backend: Backend
    num_keys: int
    documents_BS: Tensor | None = None
    visible: Tensor | None = None
    starts: tuple[Tensor, Tensor] | None = None


def make_mask(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int],
    widths: tuple[int, int],
    documents_BS: Tensor | None = None,
    backend: Backend = "auto",
) -> Mask:
    """The mask of `causal_attention` for queries, keys and values on `device`.

    Args:
        shape: B, S, P. widths: C, V.
        documents_BS: see `causal_attention`. For an accelerator best on the CPU, where the loader makes it: there the
            documents can be counted without waiting for the device.
    """
    (batch, num_queries, num_keys), documents = shape, documents_BS is not None
    assert not documents or num_queries == num_keys, "documents of cached positions are not known"
    if backend == "auto":
        backend, _ = choose_backend(device, dtype, widths, num_queries, num_keys, documents=documents)
    starts = None
    if backend == "varlen":
        starts = _starts(device, batch, num_queries, num_keys, documents_BS)
        backend = "varlen" if starts else "sdpa"
    if documents_BS is not None:
        documents_BS = to_device(documents_BS, device)
    visible = None
    if backend == "sdpa":
        visible = _visible(device, num_queries, num_keys, documents_BS)
        if visible is not None and device.type != "cpu":
            hidden = ~visible
            visible = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    return Mask(backend, num_keys, documents_BS, visible, starts)


def documents_of(documents_BS: Tensor | Mask | None) -> Tensor | None:
    """The document numbers: as given, or those that a mask was made of."""
    return documents_BS.documents_BS if isinstance(documents_BS, Mask) else documents_BS


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    num_queries: int,
    num_keys: int,
    *,
    documents: bool,
) -> tuple[Backend, str]:
    """The kernel that "auto" takes for heads of `widths` (queries and keys, values), and why.

    On an accelerator none of them stores the scores, as SDPA's math kernel does (8.6 GB per layer for Llama-3-8B at
    8,192 positions). SDPA falls back to that kernel for a mask with grouped heads, so "sdpa" repeats their keys and
    values there, and takes the memory-efficient one. In float64 there is only the math kernel.

    On a CPU SDPA has no fused kernel where values are narrower than keys: it then stores all S x P scores. Whether
    gradients are needed plays no part: a pass without them must route tokens exactly as the one with them.
    """
    if device.type == "cpu":
        if num_queries == num_keys and (num_queries <= _BLOCKS_MAX_POSITIONS or widths[0] != widths[1]):
            return "blocks", "measured on CPUs: blocks of rows are faster up to 1,024 positions, or for narrow values"
        return "sdpa", "measured on CPUs: SDPA's kernel is as fast beyond 1,024 positions"
    if not documents and (num_queries == num_keys or num_queries == 1):
        return "sdpa", "causal by position alone: SDPA's flash or memory-efficient kernel"
    if has_flash_attention(device, dtype, _padded(max(widths))):
        return "varlen", "variable-length flash attention, one document after another"
    return "sdpa", "no flash attention for this device, dtype or width: SDPA's memory-efficient kernel, with a mask"


def _padded(width: int) -> int:
    return -(-width // _WIDTHS) * _WIDTHS


def _starts(
    device: torch.device, batch: int, num_queries: int, num_keys: int, documents_BS: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """`Mask.starts`; None where a document is interrupted by another, which starts cannot express."""
    if documents_BS is None:
        q_starts, k_starts = (
            torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device) for n in (num_queries, num_keys)
        )
        return q_starts, k_starts
    starts = document_starts(documents_BS.cpu())
    if starts is None:
        return None
    starts = to_device(starts, device)
    return starts, starts


def document_starts(documents_BS: Tensor) -> Tensor | None:
    """Where each document of each row starts among the B*S positions, and B*S: int32 (N + 1,).

    A document ends with its row at the latest. None where a document is interrupted by another.
    """
    first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    sorted_BS = documents_BS.sort(1).values
    num_documents = documents_BS.shape[0] + int((sorted_BS[:, 1:] != sorted_BS[:, :-1]).sum())
    starts_N = first_BS.flatten().nonzero().flatten()
    if len(starts_N) != num_documents:
        return None
    return torch.cat((starts_N, starts_N.new_tensor([documents_BS.numel()]))).to(torch.int32)


def _visible(device: torch.device, num_queries: int, num_keys: int, documents_BS: Tensor | None) -> Tensor | None:
    """True where a query sees a key; None where SDPA's `is_causal` says the same."""
    if documents_BS is not None:
        same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
        return same_BSS.tril().unsqueeze(1)
    if not 1 < num_queries < num_keys:
        return None
    position_S = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) <= position_S.unsqueeze(1)


def causal_attention(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    v_BGPV: Tensor,
    documents_BS: Tensor | Mask | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    max_logits_H: Tensor | None = None,
) -> Tensor:
    """Softmax(scale * q k^T) v over positions up to each query's own; shape (B, H, S, V).

    The S queries are the last S of the P positions (with a cache, P > S). Query head h uses key-value head h // (H/G).

    Args:
        documents_BS: number of the document that each position belongs to; attention stays within a document. Only
            without a cache (S == P). Or the `Mask` that was made of them, for all layers of a forward.
        scale: 1/sqrt(C) when None.
        backend: where no `Mask` is given. "sdpa" is torch's scaled_dot_product_attention; "varlen" its variable-length
            flash attention, for accelerators: documents (or chunks after cached positions) one after another, heads
            padded with zeros to the wider of C and V, which latent attention needs (192 and 128); "blocks" takes the
            queries in blocks of rows, each against the keys up to its end, and saves the probabilities for the backward
            pass; "auto" is `choose_backend`. In bf16 "blocks" rounds scores and probabilities to bf16, as transformers'
            eager attention does; SDPA is 2 to 7 times closer.
        max_logits_H: raised in place, where given, to the largest logit of each query head. "blocks" takes it from its
            scores; the other kernels do not expose theirs, so `max_logits` computes them once more.
    """
    (B, _, S, C), (P, V) = q_BHSC.shape, v_BGPV.shape[2:]
    scale = 1 / math.sqrt(C) if scale is None else scale
    mask = documents_BS
    if not isinstance(mask, Mask) or mask.num_keys != P:  # keys of other ranks may have been gathered
        documents_BS = documents_of(mask)
        mask = make_mask(
            q_BHSC.device, q_BHSC.dtype, shape=(B, S, P), widths=(C, V), documents_BS=documents_BS, backend=backend
        )
    if mask.backend == "blocks":
        assert S == P, "row blocks have no cache"
        wants_max = max_logits_H is not None
        out_BHSV, largest_H = _RowBlocks.apply(q_BHSC, k_BGPC, v_BGPV, mask.documents_BS, scale, wants_max)  # type: ignore[no-untyped-call]
        if max_logits_H is not None:
            _raise_to(max_logits_H, largest_H)
        blocks_BHSV: Tensor = out_BHSV
        return blocks_BHSV
    if max_logits_H is not None:
        _raise_to(max_logits_H, max_logits(q_BHSC, k_BGPC, scale, mask.documents_BS))
    if mask.backend == "varlen":
        packed_BHSV: Tensor = _varlen(q_BHSC, k_BGPC, v_BGPV, mask, scale)
        return packed_BHSV
    return _sdpa(q_BHSC, k_BGPC, v_BGPV, mask.visible, scale)


def _raise_to(max_logits_H: Tensor, largest_H: Tensor) -> None:
    """In place, so that a compiled model sees the same tensor in every step."""
    max_logits_H.copy_(torch.maximum(max_logits_H, largest_H.to(max_logits_H)))


@torch.no_grad()
def max_logits(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    scale: float | None = None,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """The largest scale * q k^T of each query head over all sequences and attended pairs of positions; (H,).

    Arguments and which pairs are attended to: as in `causal_attention`. Of at least float32; -inf without positions.
    Takes the queries in blocks of rows and multiplies in the inputs' dtype: as exact as the scores that attention
    itself computes. Costs the first of attention's two matmuls, forward only.
    """
    assert documents_BS is None or q_BHSC.shape[2] == k_BGPC.shape[2], "documents of cached positions are not known"
    (B, H, S, C), (G, P) = q_BHSC.shape, k_BGPC.shape[1:3]
    scale = 1 / math.sqrt(C) if scale is None else scale
    acc_dtype = at_least_float32_dtype(q_BHSC.dtype)
    largest_H = torch.full((H,), -math.inf, dtype=acc_dtype, device=q_BHSC.device)
    block_rows = _block_rows(C)
    future_RR = torch.ones(block_rows, block_rows, dtype=torch.bool, device=q_BHSC.device).triu_(1)
    for start in range(0, S if B else 0, block_rows):
        end = min(start + block_rows, S)
        num_seen = P - S + end  # keys that the last of these queries sees
        q_NRC = q_BHSC[:, :, start:end].reshape(B * G, -1, C)
        scores = torch.bmm(q_NRC, k_BGPC[:, :, :num_seen].reshape(B * G, num_seen, C).mT)
        scores = scores.view(B, H, end - start, num_seen)
        scores[..., P - S + start :].masked_fill_(future_RR[: end - start, : end - start], -math.inf)
        if documents_BS is not None:
            other_BRP = documents_BS[:, start:end].unsqueeze(2) != documents_BS[:, :num_seen].unsqueeze(1)
            scores.masked_fill_(other_BRP.unsqueeze(1), -math.inf)
        largest_H = torch.maximum(largest_H, scores.amax((0, 2, 3)).to(acc_dtype) * scale)
    return largest_H


def _block_rows(width: int) -> int:
    """Fewer rows compute less above the diagonal; wide heads gain by larger matmuls (`benchmarks/attention.py`)."""
    return 64 if width < 64 else 128


def _sdpa(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    width = v_BGPV.shape[3]
    if q_BHSC.device.type != "cpu":
        device, dtype = q_BHSC.device, q_BHSC.dtype
        flash = visible is None and q_BHSC.shape[3] == width and has_flash_attention(device, dtype, _padded(width))
        q_BHSC, k_BGPC, v_BGPV = _for_fused_kernels(q_BHSC, k_BGPC, v_BGPV, grouped=flash)
    out_BHSV = F.scaled_dot_product_attention(
        q_BHSC,
        k_BGPC,
        v_BGPV,
        attn_mask=visible,
        is_causal=visible is None and q_BHSC.shape[2] > 1,
        scale=scale,
        enable_gqa=q_BHSC.shape[1] != k_BGPC.shape[1],
    )
    return _cut(out_BHSV, width)


def _for_fused_kernels(
    q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to the kernels' widths; keys and values repeated per query head unless `grouped` (flash attention)."""
    q_BHSC, k_BGPC, v_BGPV = (_pad(x, _padded(x.shape[3])) for x in (q_BHSC, k_BGPC, v_BGPV))
    times = q_BHSC.shape[1] // k_BGPC.shape[1]
    if grouped or times == 1:
        return q_BHSC, k_BGPC, v_BGPV
    return q_BHSC, _repeat(k_BGPC, times), _repeat(v_BGPV, times)


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _cut(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else x[..., :width]


def _repeat(x_BGPC: Tensor, times: int) -> Tensor:
    """Each head `times` times, one after the other; the gradient is a sum, where repeat_interleave's is a scatter."""
    return x_BGPC.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


# Not compiled: the number of documents depends on the data, and each would be another graph.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _varlen(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, mask: Mask, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert mask.starts is not None
    (B, H, S, C), (G, P, V) = q_BHSC.shape, v_BGPV.shape[1:]
    width = _padded(max(C, V))
    q_THC, k_TGC, v_TGC = (_pad(x.transpose(1, 2).flatten(0, 1), width) for x in (q_BHSC, k_BGPC, v_BGPV))
    # S and P bound every sequence's length; the longest itself would have to be read from the device.
    out_THC: Any = varlen_attn(
        q_THC, k_TGC, v_TGC, *mask.starts, S, P, scale=scale, window_size=(-1, 0), enable_gqa=H != G
    )
    out_BHSV: Tensor = _cut(out_THC, V).unflatten(0, (B, S)).transpose(1, 2)
    return out_BHSV


class _RowBlocks(torch.autograd.Function):
    """Attention of blocks of query rows, each with the keys up to its end: most of the upper triangle is skipped.

    The queries of the L heads that share keys are rows of one matmul. Softmax and its gradient are in at least
    float32; about N * L * S^2 / 2 probabilities are saved, in the dtype of the inputs.

    Returns the output and, if `wants_max`, the largest logit of each head, (H,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHSC: Tensor,
        k_BGSC: Tensor,
        v_BGSV: Tensor,
        documents_BS: Tensor | None,
        scale: float,
        wants_max: bool,
    ) -> tuple[Tensor, Tensor | None]:
        B, H, S, C = q_BHSC.shape
        G, V = k_BGSC.shape[1], v_BGSV.shape[3]
        acc_dtype = at_least_float32_dtype(q_BHSC.dtype)
        q_NLSC = torch.mul(q_BHSC, scale, out=q_BHSC.new_empty(B, H, S, C)).view(B * G, H // G, S, C)
        k_NSC, v_NSV = k_BGSC.reshape(B * G, S, C), v_BGSV.reshape(B * G, S, V)
        # In the memory order of the output projection, which would copy it otherwise.
        out_BSHV = q_NLSC.new_empty(B, S, H, V)
        block_rows = _block_rows(C)
        future_RR = torch.ones(block_rows, block_rows, dtype=torch.bool, device=q_BHSC.device).triu_(1)
        saved, largest = [], []
        for start in range(0, S, block_rows):
            end = min(start + block_rows, S)
            scores = torch.bmm(q_NLSC[:, :, start:end].flatten(1, 2), k_NSC[:, :end].transpose(1, 2)).to(acc_dtype)
            by_batch = scores.view(B, H, end - start, end)
            by_batch[..., start:].masked_fill_(future_RR[: end - start, : end - start], -math.inf)
            if documents_BS is not None:
                other_BRP = documents_BS[:, start:end].unsqueeze(2) != documents_BS[:, :end].unsqueeze(1)
                by_batch.masked_fill_(other_BRP.unsqueeze(1), -math.inf)
            if wants_max:
                largest.append(by_batch.amax((0, 2, 3)))
            weights = torch.softmax(scores, -1).to(q_BHSC.dtype)
            if any(ctx.needs_input_grad):
                saved.append(weights)
            out_BHRV = torch.bmm(weights, v_NSV[:, :end]).view(B, H, end - start, V)
            out_BSHV[:, start:end] = out_BHRV.transpose(1, 2)
        ctx.save_for_backward(q_NLSC, k_NSC, v_NSV, *saved)
        ctx.scale, ctx.block_rows = scale, block_rows
        if not wants_max:
            return out_BSHV.transpose(1, 2), None
        largest_H = torch.stack(largest).amax(0)
        ctx.mark_non_differentiable(largest_H)
        return out_BSHV.transpose(1, 2), largest_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSV: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q_NLSC, k_NSC, v_NSV, *saved = ctx.saved_tensors
        (N, L, S, _), (B, H) = q_NLSC.shape, grad_BHSV.shape[:2]
        acc_dtype = at_least_float32_dtype(q_NLSC.dtype)
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]  # not all, where projections are frozen
        grad_q_NLSC, grad_k_NSC, grad_v_NSV = torch.empty_like(q_NLSC), None, None
        # The last block sees all keys: its matmuls start the sums over blocks.
        for start, weights in reversed(list(zip(range(0, S, ctx.block_rows), saved, strict=True))):
            end = min(start + ctx.block_rows, S)
            grad_rows = grad_BHSV[:, :, start:end].reshape(N, L * (end - start), -1)
            q_rows = q_NLSC[:, :, start:end].flatten(1, 2)
            if needs_v:
                part_v = torch.bmm(weights.transpose(1, 2), grad_rows).to(acc_dtype)
                grad_v_NSV = part_v if grad_v_NSV is None else _add_rows(grad_v_NSV, part_v)
            if not (needs_q or needs_k):
                continue
            grad_weights = torch.bmm(grad_rows, v_NSV[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights.to(acc_dtype), weights.to(acc_dtype), -1, acc_dtype)
            grad_scores = grad_scores.to(q_NLSC.dtype)
            if needs_q:
                rows_q = torch.bmm(grad_scores, k_NSC[:, :end])
                grad_q_NLSC[:, :, start:end] = rows_q.mul_(ctx.scale).unflatten(1, (L, -1))
            if needs_k:
                part_k = torch.bmm(grad_scores.transpose(1, 2), q_rows).to(acc_dtype)
                grad_k_NSC = part_k if grad_k_NSC is None else _add_rows(grad_k_NSC, part_k)
        return (
            grad_q_NLSC.view(B, H, S, -1) if needs_q else None,
            None if grad_k_NSC is None else grad_k_NSC.to(q_NLSC.dtype).view(B, H // L, S, -1),
            None if grad_v_NSV is None else grad_v_NSV.to(q_NLSC.dtype).view(B, H // L, S, -1),
            None,
            None,
            None,
        )


def _add_rows(total: Tensor, part: Tensor) -> Tensor:
    """Add `part` to the first rows (of each batch) of `total`, in place."""
    total[:, : part.shape[1]] += part
    return total
