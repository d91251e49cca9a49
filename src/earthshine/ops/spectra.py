"""What the singular values of a matrix say: entropy, stable rank; and the root mean square of a tensor.

Legend: B matrices, M rows, N columns, S = min(M, N) singular values.
"""

import math

import torch
from torch import Tensor

from earthshine.device import at_least_float32_dtype


def _energy(W_BMN: Tensor) -> Tensor:
    """Squared singular values as fractions of their sum, [..., S] in at least fp32; zeros for a zero matrix."""
    acc_dtype = at_least_float32_dtype(W_BMN.dtype)
    energy_BS: Tensor = torch.linalg.svdvals(W_BMN.to(acc_dtype)).square()
    # A zero matrix has no spectrum: dividing by the smallest normal number leaves its zeros in place.
    return energy_BS / energy_BS.sum(-1, keepdim=True).clamp(min=torch.finfo(acc_dtype).tiny)


def svd_entropy(W_BMN: Tensor) -> Tensor:
    """Entropy of the squared singular values over log(S), in [0, 1]; [..., M, N] -> [...].

    H = -1/log(S) * sum_i q_i log(q_i), q_i = s_i^2 / sum_j s_j^2 (Moonlight, arXiv:2502.16982 section 3.4): 1 for a
    matrix whose directions are equally strong, 0 for rank 1, and 0 where it says nothing (S = 1, a zero matrix).
    """
    q_BS = _energy(W_BMN)
    if q_BS.shape[-1] < 2:
        return q_BS.new_zeros(q_BS.shape[:-1])
    log_S = torch.log(torch.tensor(q_BS.shape[-1], dtype=q_BS.dtype, device=q_BS.device))
    entropy_B: Tensor = -torch.special.xlogy(q_BS, q_BS).sum(-1) / log_S
    return entropy_B


def stable_rank(W_BMN: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm, in [1, S]; 0 for a zero matrix; [..., M, N] -> [...].

    Rudelson and Vershynin, arXiv:math/0503442.
    """
    q_BS = _energy(W_BMN)
    largest_B = q_BS.amax(-1)
    return torch.where(largest_B > 0, 1 / largest_B.clamp(min=torch.finfo(q_BS.dtype).tiny), 0)


def rms(x: Tensor) -> Tensor:
    """Root mean square over all elements, a 0-d tensor in at least fp32; 0 for an empty tensor."""
    acc_dtype = at_least_float32_dtype(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=acc_dtype)
    return norm / math.sqrt(max(1, x.numel()))
