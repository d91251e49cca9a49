"""Steepest directions of a gradient under a norm: what Muon's orthogonalization is for the spectral norm.

For a norm the direction that a step takes is the minimizer of <G, X> over its unit ball, without the minus sign:
lmo(G) = argmax over ||X|| <= 1 of <G, X> (Scion, arXiv:2502.07529, equation 3 and its tables of norms). Scaling G
changes none of them. A zero matrix, row or vector, for which any X would do, gives zero.

Legend: B matrices, M rows (outputs), N columns (inputs).
"""

import math

import torch
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError

# Those functions below that are for parameters other than hidden matrices, by the names that parameter groups use.
KINDS = ("row_rms", "sign", "rms")


def schatten(G_BMN: Tensor, p: float) -> Tensor:
    """Under the Schatten-p norm (the p-norm of the singular values): of each matrix of [..., M, N], by SVD.

    With G = U diag(s) V^T and 1/p + 1/q = 1 it is U diag((s / ||s||_q)^(q - 1)) V^T, the case of equality in Hoelder's
    inequality. p = inf gives U V^T, which Newton-Schulz approximates; p = 2 gives G / ||G||_F. The result, in at least
    float32, has Schatten-p norm 1, and <G, result> = ||s||_q. Singular values below the rounding error of the largest,
    max(M, N) eps s_1, count as zeros and stay zero: their directions are noise. A matrix that is not finite becomes
    NaN, alone in its batch. Raises ConfigError for p outside (1, inf].
    """
    if not p > 1:
        raise ConfigError(f"schatten_p={p} must be above 1: use 2 (the gradient, normalized) to inf (Muon).")
    G_BMN = G_BMN.to(at_least_float32_dtype(G_BMN.dtype))
    if G_BMN.numel() == 0:
        return G_BMN.clone()
    finite_B11 = G_BMN.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    # LAPACK stops at a NaN. One matrix at a time, as it does itself: in a batch its last bits depend on the neighbors.
    clean_BMN = torch.where(finite_B11, G_BMN, 0).reshape(-1, *G_BMN.shape[-2:])
    O_BMN = torch.stack([_schatten(G_MN, p) for G_MN in clean_BMN]).view(G_BMN.shape)
    return torch.where(finite_B11, O_BMN, math.nan)


def _schatten(G_MN: Tensor, p: float) -> Tensor:
    U_MS, s_S, Vh_SN = torch.linalg.svd(G_MN, full_matrices=False)
    q = 1.0 if math.isinf(p) else p / (p - 1)
    nonzero_S = s_S > max(G_MN.shape) * torch.finfo(s_S.dtype).eps * s_S[0]
    ratio_S = torch.where(nonzero_S, s_S / s_S[0], 0)  # no power of it leaves the range
    weight_S = torch.where(nonzero_S, (ratio_S / torch.linalg.vector_norm(ratio_S, q)) ** (q - 1), 0)
    O_MN: Tensor = (U_MS * weight_S) @ Vh_SN
    return O_MN


def row_rms(G_MN: Tensor) -> Tensor:
    """Each row scaled to RMS 1: row * sqrt(N) / ||row||_2, for an embedding stored [V, D], a row per token.

    Scion's ColNorm for inputs that are one-hot: the norm from 1-norm to RMS, max over tokens of the RMS of a token's
    vector (its column in the paper, where the table is stored transposed); col_j -> sqrt(d_out) col_j / ||col_j||_2.
    Takes [..., M, N]; at least float32. A row without a gradient stays zero.
    """
    G_MN = G_MN.to(at_least_float32_dtype(G_MN.dtype))
    return _unit(G_MN, -1).mul_(math.sqrt(G_MN.shape[-1]))


def sign(G_MN: Tensor) -> Tensor:
    """Under the max norm: the signs of the elements, sign(0) = 0. Takes any shape; in G's own dtype.

    Scion takes sign(G) / d_in for the output layer [V, D], d_in = D: the norm from RMS to infinity, max over i, j of
    d_in |W_ij|. Here the result has RMS 1, like the other directions, and `update_rms` scales them all.
    """
    return G_MN.sign()


def rms(g: Tensor, squares: Tensor | None = None, count: int | None = None) -> Tensor:
    """g / RMS(g) = g sqrt(n) / ||g||_2 over all elements: Scion's choice for biases, and here for norms' gains.

    squares, count: sum of squares and number of elements of the whole vector, where `g` is one process's part of it.
    At least float32; zeros stay zero.
    """
    acc_dtype = at_least_float32_dtype(g.dtype)
    g = g.to(acc_dtype)
    root = math.sqrt(g.numel() if count is None else count)
    if squares is None:
        return _unit(g, None).mul_(root)
    norm = squares.to(acc_dtype).sqrt()
    return g * torch.where(norm > 0, root / norm, 0)


def _unit(x: Tensor, dim: int | None) -> Tensor:
    """x / ||x||_2 as a new tensor; zeros stay zero. The largest element is divided out first: squares of numbers below
    1e-19 or above 1e19 leave fp32's range."""
    if x.numel() == 0:
        return x.clone()
    largest = torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x.div_(torch.where(norm > 0, norm, 1))
