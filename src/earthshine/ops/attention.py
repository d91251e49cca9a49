"""Causal attention. Shapes: B batch, H query heads, G key-value heads, S query and P key positions, C head width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(C)) v over positions up to each query's own; shape (B, H, S, C).

    The S queries are the last S of the P positions (with a cache, P > S). Query head h uses key-value head h // (H/G).

    Args:
        documents_BS: number of the document that each position belongs to; attention stays within a document. Only
            without a cache (S == P).
    """
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
        v_BGPC,
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=q_BHSC.shape[1] != k_BGPC.shape[1],
    )


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotary positions on the halves of each head (arXiv:2104.09864, Hugging Face's layout), in at least float32."""
    wide = x_BHSC.to(torch.promote_types(x_BHSC.dtype, cos_SC.dtype))
    first, second = wide.chunk(2, -1)
    return (wide * cos_SC + torch.cat((-second, first), -1) * sin_SC).to(x_BHSC.dtype)
