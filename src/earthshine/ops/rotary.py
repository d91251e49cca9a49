"""Rotary positions (RoPE, arXiv:2104.09864).

Shapes: B batch, H heads, S positions, C head width, R rotated pairs of a head (2R <= C).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x_BSHC: Tensor, cos_SR: Tensor, sin_SR: Tensor, *, interleaved: bool = False) -> Tensor:
    """The last 2R numbers of each head rotated, pair by pair, by their position's angles; (B, H, S, C), contiguous.

    It takes a projection's output as it is and returns what attention reads, and the gradient goes the same way back:
    the transposition costs no pass of its own. Computed in at least float32.

    Args:
        x_BSHC: queries or keys.
        cos_SR, sin_SR: the tables of `model.attention.rope_table`.
        interleaved: pairs are neighbors (2i, 2i+1), as DeepSeek stores them, not (i, i + R), as Hugging Face's Llama.
            Numbers stay in their places: dot products of queries and keys do not depend on the order that both share.
    """
    out: Tensor = _Rotate.apply(x_BSHC, cos_SR, sin_SR, interleaved)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """One function, because autograd would save and add a tensor for each of the four multiplications.

    The gradient is the rotation by the opposite angles, for which x is not needed.
    """

    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos_SR: Tensor, sin_SR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_SR, sin_SR)
        ctx.interleaved = interleaved
        x_BHSC = x_BSHC.transpose(1, 2)
        out_BHSC = x_BSHC.new_empty(x_BHSC.shape)
        _rotate_into(out_BHSC, x_BHSC, cos_SR, sin_SR, interleaved)
        return out_BHSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSC: Tensor) -> tuple[Tensor, None, None, None]:
        cos_SR, sin_SR = ctx.saved_tensors
        out_BSHC = grad_BHSC.new_empty(grad_BHSC.transpose(1, 2).shape)
        _rotate_into(out_BSHC.transpose(1, 2), grad_BHSC, cos_SR, -sin_SR, ctx.interleaved)
        return out_BSHC, None, None, None


def _rotate_into(out_BHSC: Tensor, x_BHSC: Tensor, cos_SR: Tensor, sin_SR: Tensor, interleaved: bool) -> None:
    num_unrotated = x_BHSC.shape[-1] - 2 * cos_SR.shape[-1]
    if num_unrotated:
        out_BHSC[..., :num_unrotated] = x_BHSC[..., :num_unrotated]
    acc_dtype = torch.promote_types(x_BHSC.dtype, cos_SR.dtype)
    a, b = _pairs(x_BHSC[..., num_unrotated:].to(acc_dtype), interleaved)
    out_a, out_b = _pairs(out_BHSC[..., num_unrotated:], interleaved)
    out_a.copy_((a * cos_SR).addcmul_(b, sin_SR, value=-1))
    out_b.copy_((b * cos_SR).addcmul_(a, sin_SR))


def _pairs(x_BHSC: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second numbers of all pairs, each (B, H, S, R)."""
    if interleaved:
        return x_BHSC[..., 0::2], x_BHSC[..., 1::2]
    half = x_BHSC.shape[-1] // 2
    return x_BHSC[..., :half], x_BHSC[..., half:]
