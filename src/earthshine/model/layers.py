"""The building blocks: linear maps, norms, the feed-forward network, and the one cast to the compute dtype.

Parameters are float32 (or float64 when asked for); activations carry the compute dtype, and every matmul casts its
weight to it here. Shapes: D model width, F feed-forward width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from earthshine.device import at_least_float32_dtype
from earthshine.ops.rms_norm import rms_norm
from earthshine.ops.swiglu import swiglu


def to_compute(weight: Tensor, like: Tensor) -> Tensor:
    """The weight in the dtype of the activation that it meets: the only place where parameters are cast."""
    return weight.to(like.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Routers, softmax, norms and losses are computed in float32 or wider whatever the compute dtype."""
    return x.to(at_least_float32_dtype(x.dtype))


class Linear(nn.Linear):
    """A linear map, in Hugging Face's layout (out, in); only queries, keys and values of some families have a bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Nothing: `transformer.initialize` or a checkpoint sets the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, to_compute(self.weight, x), None if self.bias is None else to_compute(self.bias, x))


class Embedding(nn.Embedding):
    """Token embedding (V, D)."""

    def reset_parameters(self) -> None:
        """As in `Linear`."""


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in at least float32 (`ops.rms_norm`)."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(at_least_float32_dtype(x.dtype)), self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (to_compute(proj.weight, x) for proj in (self.gate_proj, self.up_proj, self.down_proj))
        return swiglu(x, gate, up, down)
