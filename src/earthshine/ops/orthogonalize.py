"""Newton-Schulz orthogonalisation: G = U S V^T -> approximately U V^T, by matrix products only.

X_0 = G / ||G||_F;  X_k = a X + b (X X^T) X + c (X X^T)^2 X       (K. Jordan's Muon; arXiv:2502.16982 section 2.1)

Two forms of the same polynomial. "standard" iterates on X: per step X X^T, its square, and one product with X.
"gram" iterates on R = X X^T alone (Dao-AILab's gram-newton-schulz): with S_k = a + b R_k + c R_k^2,
    R_{k+1} = S_k R_k S_k,    Q_{k+1} = S_k Q_k,    O = Q X_0,
so the long side appears in two products instead of ten. All factors are polynomials in one matrix and commute, hence
every product of the gram form is symmetric and half of it can be left out, by blocks. In bf16 the gram form squares
rounding errors into singular values above 2, so it is offered in fp32 and fp64 only, where it needs no restarts.

How we differ from torch.optim.Muon: normalisation is in at least fp32, before any cast, with a floor of 1e-30 instead
of 1e-7 (which shrinks small gradients); the type is the caller's; the input is never written to or returned.

Legend: B matrices, M rows, N columns; turned so that S = min(M, N), L = max(M, N).
"""

from typing import Literal

import torch
from torch import Tensor

from earthshine.errors import ConfigError

Form = Literal["standard", "gram", "auto"]
Coefficients = tuple[tuple[float, float, float], ...]

# (a, b, c) per step; the last row repeats for steps beyond the table.
COEFFICIENTS: dict[str, Coefficients] = {
    # K. Jordan: the largest slope at 0 that keeps singular values within about 0.7 to 1.2.
    "keller5": ((3.4445, -4.7750, 2.0315),),
}

# A Frobenius norm below this is treated as this: an all-zero matrix stays zero instead of becoming NaN.
EPS = 1e-30

# Bytes that one batch may take, working copies included. A CPU batch has to stay in its cache, measured: whole
# batches fall out of it and run at half the rate. An accelerator wants large batches; there it bounds memory.
_CPU_BATCH_BYTES = 2 << 20
_ACCELERATOR_BATCH_BYTES = 512 << 20

# Half products by blocks, measured on a CPU in fp32: worthwhile from 3 blocks of 128 rows; a GEMM thinner than that
# loses more than it saves, and beyond 4 blocks the saving, (p - 1) / 2p, hardly grows.
_MIN_BLOCK_ROWS = 128
_MAX_BLOCKS = 4


def coefficient_steps(coefficients: str | Coefficients, steps: int) -> Coefficients:
    """The (a, b, c) of each of `steps` steps. Raises ConfigError for an unknown name or an empty table."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = ", ".join(sorted(COEFFICIENTS))
            raise ConfigError(f"ns_coefficients={coefficients!r} is not a known table; known: {known}.")
        coefficients = COEFFICIENTS[coefficients]
    if not coefficients or steps < 1:
        raise ConfigError(f"Newton-Schulz needs a row of coefficients and steps={steps} of at least 1.")
    return tuple(coefficients[min(k, len(coefficients) - 1)] for k in range(steps))


def default_steps(coefficients: str | Coefficients) -> int:
    """How many steps a table is made for."""
    return 5 if isinstance(coefficients, str) else len(coefficients)


def newton_schulz(
    G_BMN: Tensor,
    coefficients: str | Coefficients = "keller5",
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    form: Form = "standard",
    *,
    consume: bool = False,
    compile: bool = False,
) -> Tensor:
    """Orthogonalize each matrix of [B, M, N], or one [M, N]; the result has G's shape and type `dtype`.

    Singular values become those of the polynomial (keller5: about 0.7 to 1.2), not 1. A zero matrix stays zero; a
    matrix that is not finite becomes NaN. Batches are cut to fit the cache; each matrix's result does not depend on
    that beyond the rounding of the matrix products. Raises ConfigError for form="gram" outside fp32 and fp64.
    """
    if G_BMN.ndim == 2:
        return newton_schulz(G_BMN[None], coefficients, steps, dtype, form)[0]
    if G_BMN.ndim != 3:
        raise ConfigError(f"newton_schulz takes [M, N] or [B, M, N], not {list(G_BMN.shape)}.")
    table = coefficient_steps(coefficients, steps)
    B, M, N = G_BMN.shape
    form, blocks = resolve_form(form, M, N, dtype, G_BMN.device, steps)
    if G_BMN.numel() == 0:
        return G_BMN.to(dtype, copy=True)
    chunk = matrices_per_batch(M, N, dtype, G_BMN.device)
    if chunk >= B:
        return _orthogonalize(G_BMN, table, dtype, form, blocks)
    O_BMN = torch.empty(G_BMN.shape, dtype=dtype, device=G_BMN.device)
    for start in range(0, B, chunk):
        part = slice(start, start + chunk)
        O_BMN[part] = _orthogonalize(G_BMN[part], table, dtype, form, blocks)
    return O_BMN


def matrices_per_batch(M: int, N: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many M x N matrices one batch of products should hold: what fits the cache; at least one."""
    S, L = min(M, N), max(M, N)
    per_matrix = dtype.itemsize * (2 * S * L + 3 * S * S)
    budget = _CPU_BATCH_BYTES if device.type == "cpu" else _ACCELERATOR_BATCH_BYTES
    return max(1, budget // max(1, per_matrix))


def newton_schulz_flops(M: int, N: int, steps: int = 5, form: Form = "standard", blocks: int = 1) -> int:
    """Floating-point operations (2 per multiply-add) of one matrix's products; `blocks` as in `resolve_form`."""
    S, L = min(M, N), max(M, N)
    # p block rows compute (p + 1) / 2p of a symmetric product.
    square, gram = S**3 * (blocks + 1) // blocks, S * S * L * (blocks + 1) // blocks
    if form == "gram":
        return (4 * steps - 3) * square + gram + 2 * S * S * L
    return steps * (gram + square + 2 * S * S * L)


def resolve_form(
    form: Form, M: int, N: int, dtype: torch.dtype, device: torch.device, steps: int = 5
) -> tuple[Form, int]:
    """What is computed for an M x N matrix: ("standard" or "gram", number of row blocks of symmetric products).

    "standard" is never blocked: it keeps torch.optim.Muon's operations. "auto" is `choose_form`.
    Raises ConfigError for "gram" in a type where it is not accurate.
    """
    if form == "auto":
        return choose_form(M, N, dtype, device, steps)
    if form == "gram" and dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f'ns_form="gram" with ns_dtype={dtype} diverges (singular values above 2): use float32, or "standard".'
        )
    if form not in ("standard", "gram"):
        raise ConfigError(f"ns_form={form!r} must be one of standard, gram, auto.")
    return form, _blocks(min(M, N), device) if form == "gram" else 1


def choose_form(M: int, N: int, dtype: torch.dtype, device: torch.device, steps: int = 5) -> tuple[Form, int]:
    """The cheaper form by counted operations, for form="auto": (form, row blocks of symmetric products).

    Below fp32 always ("standard", 1): the gram form is not accurate there. In fp32 and fp64 the one with fewer
    operations, symmetric products halved by blocks on a CPU where S >= 384; without blocks the gram form wins from an
    aspect ratio L/S of 1.5 (5 steps), with four from about 1.1.
    """
    if dtype not in (torch.float32, torch.float64):
        return "standard", 1
    blocks = _blocks(min(M, N), device)
    gram = newton_schulz_flops(M, N, steps, "gram", blocks)
    standard = newton_schulz_flops(M, N, steps, "standard", blocks)
    return ("gram" if gram < standard else "standard"), blocks


def _blocks(S: int, device: torch.device) -> int:
    """Row blocks of a symmetric S x S product; 1 where halving does not pay."""
    blocks = min(_MAX_BLOCKS, S // _MIN_BLOCK_ROWS)
    return blocks if device.type == "cpu" and blocks >= 3 else 1


def _orthogonalize(G_BMN: Tensor, table: Coefficients, dtype: torch.dtype, form: Form, blocks: int) -> Tensor:
    """One batch, of a resolved form; always a new tensor."""
    X_BMN = _normalized(G_BMN).to(dtype)
    tall = X_BMN.shape[-2] > X_BMN.shape[-1]
    X_BSL = X_BMN.mT if tall else X_BMN
    O_BSL = _gram(X_BSL, table, blocks) if form == "gram" else _standard(X_BSL, table, blocks)
    return O_BSL.mT if tall else O_BSL


def _normalized(G_BMN: Tensor) -> Tensor:
    """G / max(||G||_F, EPS) in at least fp32, as a new tensor.

    Divided by the largest element first: the squares of numbers below 1e-19 or above 1e19 leave fp32's range. Where
    that element is at least EPS the second norm is at least 1, so its floor of 1 is the floor EPS of the first.
    """
    wide = torch.promote_types(G_BMN.dtype, torch.float32)
    G_BMN = G_BMN.to(wide)
    largest_B11 = torch.linalg.vector_norm(G_BMN, ord=float("inf"), dim=(-2, -1), keepdim=True).clamp_(min=EPS)
    X_BMN: Tensor = G_BMN / largest_B11
    return X_BMN.div_(torch.linalg.vector_norm(X_BMN, dim=(-2, -1), keepdim=True).clamp_(min=1))


def _standard(X_BSL: Tensor, table: Coefficients, blocks: int) -> Tensor:
    for a, b, c in table:
        A_BSS = _symmetric(X_BSL, X_BSL.mT, blocks)
        X_BSL = torch.baddbmm(X_BSL, _polynomial(A_BSS, b, c, blocks), X_BSL, beta=a)
    return X_BSL


def _gram(X_BSL: Tensor, table: Coefficients, blocks: int) -> Tensor:
    R_BSS = _symmetric(X_BSL, X_BSL.mT, blocks)
    Q_BSS: Tensor | None = None
    for k, (a, b, c) in enumerate(table):
        S_BSS = _polynomial(R_BSS, b, c, blocks)
        S_BSS.diagonal(dim1=-2, dim2=-1).add_(a)
        Q_BSS = S_BSS if Q_BSS is None else _symmetric(S_BSS, Q_BSS, blocks)
        if k + 1 < len(table):
            R_BSS = _symmetric(S_BSS, _symmetric(S_BSS, R_BSS, blocks), blocks)
    assert Q_BSS is not None  # coefficient_steps gives at least one row
    return torch.bmm(Q_BSS, X_BSL)


def _polynomial(A_BSS: Tensor, b: float, c: float, blocks: int) -> Tensor:
    """b A + c A^2 of a symmetric A, as a new tensor."""
    if blocks == 1:
        return torch.baddbmm(A_BSS, A_BSS, A_BSS, beta=b, alpha=c)
    return _symmetric(A_BSS, A_BSS, blocks).mul_(c).add_(A_BSS, alpha=b)


def _symmetric(A_BSK: Tensor, C_BKS: Tensor, blocks: int) -> Tensor:
    """A @ C where the product is known to be symmetric: with p > 1 block rows, those right of the diagonal and the
    mirror image."""
    if blocks == 1:
        return torch.bmm(A_BSK, C_BKS)
    B, S, _ = A_BSK.shape
    rows = -(-S // blocks)
    P_BSS = A_BSK.new_empty(B, S, S)
    for start in range(0, S, rows):
        stop = min(start + rows, S)
        upper_BrS = torch.bmm(A_BSK[:, start:stop], C_BKS[:, :, start:])
        P_BSS[:, start:stop, start:] = upper_BrS
        P_BSS[:, stop:, start:stop] = upper_BrS[:, :, stop - start :].mT
    return P_BSS
