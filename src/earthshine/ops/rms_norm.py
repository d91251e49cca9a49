"""Root-mean-square normalization. Shapes: D width, the last dimension."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), computed in at least float32.

    The weight is in the dtype of the computation. One function, because torch's composition of several makes twice as
    many passes over x on a CPU.
    """
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_acc: Tensor = x.to(weight_D.dtype)
        square = torch.linalg.vector_norm(x_acc, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        y: Tensor = (x_acc * inverse).mul_(weight_D)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        x_acc, grad_acc = x.to(weight_D.dtype), grad.to(weight_D.dtype)
        product_TD = (grad_acc * x_acc).reshape(-1, x.shape[-1])
        grad_weight_D = inverse.flatten() @ product_TD
        along = (product_TD @ weight_D).view_as(inverse).mul_(inverse.pow(3)).div_(x.shape[-1])
        grad_x = (grad_acc * weight_D).mul_(inverse).addcmul_(x_acc, along, value=-1)
        return grad_x.to(x.dtype), grad_weight_D, None
