"""Newton-Schulz orthogonalization: G = U S V^T -> approximately U V^T, by matmuls only.

X_0 = G / ||G||_F;  X_k = a X + b (X X^T) X + c (X X^T)^2 X       (K. Jordan's Muon; arXiv:2502.16982 section 2.1)

Two forms of the same polynomial. "standard" iterates on X: per step X X^T, its square, and one matmul with X.
"gram" iterates on R = X X^T alone (Dao-AILab's gram-newton-schulz): with S_k = a + b R_k + c R_k^2,
    R_{k+1} = S_k R_k S_k,    Q_{k+1} = S_k Q_k,    O = Q X_0,
so the long side appears in two matmuls instead of ten, and all others are symmetric: half of each can be left out, by
blocks. Rounding leaves R with small negative eigenvalues that grow by a^2 per step; a restart (X <- Q X, R = X X^T)
before they matter keeps the accuracy of the standard form (`newton_schulz_tables.gram_restarts`).

How we differ from torch.optim.Muon: the norm is taken in at least fp32, before any cast, with a floor of 1e-30 instead
of 1e-7, which shrinks small gradients; the caller chooses the dtype (`device.resolve_ns_dtype`); the input is
overwritten only with `consume`.

In fp32 on a CPU a matrix's result has the same bits alone and in any batch, on any number of threads: "any layout gives
the bits of one process" rests on it. MKL guarantees that except for tiny sides (see _MIN_SIDE).

Legend: B matrices, M rows, N columns; transposed so that S = min(M, N), L = max(M, N).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError
from earthshine.ops.newton_schulz_tables import (
    COEFFICIENTS,
    Coefficients,
    Form,
    cheaper_form,
    coefficient_steps,
    default_steps,
    gram_restarts,
    newton_schulz_flops,
)

__all__ = [
    "COEFFICIENTS",
    "Coefficients",
    "Form",
    "Method",
    "choose_form",
    "coefficient_steps",
    "default_steps",
    "matrices_per_batch",
    "newton_schulz",
    "newton_schulz_flops",
    "resolve_form",
    "resolve_method",
]

# A Frobenius norm below this is treated as this: an all-zero matrix stays zero instead of becoming NaN.
EPS = 1e-30

# Bytes that one batch may take, working copies included. A CPU batch has to stay in its cache, measured: whole
# batches fall out of it and run at half the rate. An accelerator wants large batches; there it bounds memory.
_CPU_BATCH_BYTES = 4 << 20
_ACCELERATOR_BATCH_BYTES = 512 << 20

# Symmetric matmuls by blocks of at least 128 rows, half of them left out. Measured on a CPU in fp32: no gain at 256
# rows, 1.1x at 320 (two blocks), 1.2x at 512 (four), more in the gram form. Beyond p = 4 the saving, (p - 1) / 2p,
# hardly grows.
_MIN_ROWS_FOR_BLOCKS = 320
_MIN_BLOCK_ROWS = 128
_MAX_BLOCKS = 4
# In bf16, where thin matmuls lose more: 1.15x at 2048 x 2048 and 1.09x at 1408 x 2048, nothing at 352 rows.
_MIN_ROWS_FOR_BLOCKS_BELOW_FP32 = 1024

# A smaller side is padded to this with zeros, which Newton-Schulz keeps: MKL computes matmuls of fewer than 12 rows in
# an order that depends on batch, threads and alignment; for larger ones it does not (measured up to 300 rows).
_MIN_SIDE = 32


@dataclass(frozen=True)
class Method:
    """How matrices of one shape are orthogonalized.

    table: (a, b, c) per step. blocks: into how many row blocks symmetric matmuls are cut. restarts: of the gram form,
    see `gram_restarts`.
    """

    form: Literal["standard", "gram"]
    table: Coefficients
    blocks: int
    restarts: tuple[int, ...]

    def flops(self, M: int, N: int) -> int:
        """Floating-point operations of an M x N matrix's matmuls."""
        return newton_schulz_flops(M, N, len(self.table), self.form, self.blocks, len(self.restarts))


@torch.no_grad()
def newton_schulz(
    G_BMN: Tensor,
    coefficients: str | Sequence[Sequence[float]] = "keller5",
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    form: Form = "standard",
    *,
    consume: bool = False,
    compile: bool = False,
) -> Tensor:
    """Orthogonalize each matrix of [B, M, N], or one [M, N]; the result has G's shape and dtype `dtype`.

    Singular values become those of the polynomial (keller5: about 0.7 to 1.2), not 1. A zero matrix stays zero; a
    matrix that is not finite becomes NaN. Batches are cut to fit the cache, which changes no result. Gradients do not
    flow through it.

    coefficients, steps: as `coefficient_steps` takes them. form: see `resolve_form`.
    consume: G may be overwritten, and may be the result: saves memory of G's size where G has dtype `dtype`.
    compile: run each batch through torch.compile.
    Raises ConfigError for values that these do not allow.
    """
    if G_BMN.ndim == 2:
        return newton_schulz(G_BMN[None], coefficients, steps, dtype, form, consume=consume, compile=compile)[0]
    if G_BMN.ndim != 3:
        raise ConfigError(f"newton_schulz takes [M, N] or [B, M, N], not {list(G_BMN.shape)}.")
    M, N = G_BMN.shape[1:]
    method = resolve_method(form, M, N, dtype, G_BMN.device, coefficients, steps)
    if G_BMN.numel() == 0:
        return G_BMN.to(dtype, copy=True)
    transposed = M > N
    G_BSL = G_BMN.mT if transposed else G_BMN
    B, S, L = G_BSL.shape
    if S < _MIN_SIDE:
        padded = G_BSL.new_zeros(B, _MIN_SIDE, max(L, _MIN_SIDE))
        padded[:, :S, :L] = G_BSL
        padded = newton_schulz(padded, coefficients, steps, dtype, method.form, consume=True, compile=compile)
        O_BSL = padded[:, :S, :L].contiguous()
        return O_BSL.mT if transposed else O_BSL
    in_place = consume and G_BSL.dtype == dtype and G_BSL.is_contiguous()
    O_BSL = G_BSL if in_place else torch.empty((B, S, L), dtype=dtype, device=G_BSL.device)
    chunk = matrices_per_batch(S, L, dtype, G_BSL.device)
    for start in range(0, B, chunk):
        _orthogonalize(G_BSL[start : start + chunk], O_BSL[start : start + chunk], method, compile)
    return O_BSL.mT if transposed else O_BSL


def matrices_per_batch(M: int, N: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many M x N matrices one batch of matmuls should hold: what fits the cache; at least one."""
    S, L = min(M, N), max(M, N)
    per_matrix = dtype.itemsize * (2 * S * L + 3 * S * S)
    budget = _CPU_BATCH_BYTES if device.type == "cpu" else _ACCELERATOR_BATCH_BYTES
    return max(1, budget // max(1, per_matrix))


def resolve_method(
    form: Form,
    M: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    coefficients: str | Sequence[Sequence[float]] = "keller5",
    steps: int | None = None,
) -> Method:
    """What `newton_schulz` computes for an M x N matrix with these options. Raises ConfigError as it does."""
    rows = coefficients if isinstance(coefficients, str) else tuple(map(tuple, coefficients))
    return _resolve(form, M, N, dtype, device, rows, steps)


@functools.lru_cache(maxsize=1024)  # asked for every batch of every step
def _resolve(
    form: Form,
    M: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    coefficients: str | tuple[tuple[float, ...], ...],
    steps: int | None,
) -> Method:
    table = coefficient_steps(coefficients, steps)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"Newton-Schulz in {dtype} is not possible: use float32, bfloat16, float16 or float64.")
    restarts = gram_restarts(table, torch.finfo(dtype).eps)
    blocks = 1
    if form == "auto":
        form, blocks = _choose(M, N, dtype, device, len(table), len(restarts))
    elif form == "gram":
        blocks = _blocks(form, min(M, N), dtype, device)
    elif form != "standard":
        raise ConfigError(f"ns_form={form!r} must be one of standard, gram, auto.")
    return Method("gram" if form == "gram" else "standard", table, blocks, restarts if form == "gram" else ())


def resolve_form(
    form: Form,
    M: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int | None = None,
    coefficients: str | Sequence[Sequence[float]] = "keller5",
) -> tuple[Form, int]:
    """What is computed for an M x N matrix: ("standard" or "gram", number of row blocks of symmetric matmuls).

    "standard" is never blocked: it keeps torch.optim.Muon's operations. "auto" is `choose_form`.
    """
    method = resolve_method(form, M, N, dtype, device, coefficients, steps)
    return method.form, method.blocks


def choose_form(
    M: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int | None = None,
    coefficients: str | Sequence[Sequence[float]] = "keller5",
) -> tuple[Form, int]:
    """The rule of form="auto": (form, row blocks of symmetric matmuls).

    In fp32 and fp64 the form with fewer counted operations, symmetric matmuls cut in blocks on a CPU where S >= 320:
    without blocks and restarts the gram form wins from an aspect ratio L/S of 1.5 on, with four blocks from about 1.1.
    Below fp32 the gram form, with its restarts, from an aspect ratio of 2.5 on where that leaves at most 0.85 of the
    operations; else the standard form, in blocks on a CPU where S >= 1024. On an accelerator nothing is cut.
    """
    return resolve_form("auto", M, N, dtype, device, steps, coefficients)


def _choose(M: int, N: int, dtype: torch.dtype, device: torch.device, steps: int, restarts: int) -> tuple[Form, int]:
    S = min(M, N)
    blocks = {form: _blocks(form, S, dtype, device) for form in ("standard", "gram")}
    gram = newton_schulz_flops(M, N, steps, "gram", blocks["gram"], restarts)
    standard = newton_schulz_flops(M, N, steps, "standard", blocks["standard"])
    plain = newton_schulz_flops(M, N, steps, "standard")
    form = cheaper_form(M, N, gram, standard if dtype.itemsize >= 4 else plain, below_fp32=dtype.itemsize < 4)
    return form, blocks[form]


def _blocks(form: Form, S: int, dtype: torch.dtype, device: torch.device) -> int:
    """Row blocks of a symmetric S x S matmul; 1 where halving does not pay."""
    if device.type != "cpu":
        return 1
    if dtype.itemsize < 4:
        # Not in the gram form: factors that commute exactly do so only nearly when rounded, and mirroring one half of
        # their matmul doubled the largest singular value.
        return _MAX_BLOCKS if form == "standard" and S >= _MIN_ROWS_FOR_BLOCKS_BELOW_FP32 else 1
    return min(_MAX_BLOCKS, S // _MIN_BLOCK_ROWS) if S >= _MIN_ROWS_FOR_BLOCKS else 1


_Iterate = Callable[[Tensor, Tensor, Method], Tensor]


@functools.cache
def _compiled(iterate: _Iterate) -> _Iterate:
    # Dynamic: a model has more shapes than the 8 versions of a function that torch keeps.
    compiled: _Iterate = torch.compile(iterate, dynamic=True)
    return compiled


def _orthogonalize(G_BSL: Tensor, O_BSL: Tensor, method: Method, compile: bool) -> None:
    """One batch into O, which may be G itself. Each matmul with X swaps two buffers; the first is chosen so that the
    last result lands in O."""
    moves = len(method.table) if method.form == "standard" else len(method.restarts) + 1
    other_BSL = torch.empty_like(O_BSL)
    X_BSL, Y_BSL = (other_BSL, O_BSL) if moves % 2 else (O_BSL, other_BSL)
    _normalize(G_BSL, X_BSL)
    iterate = _gram if method.form == "gram" else _standard
    result_BSL = (_compiled(iterate) if compile else iterate)(X_BSL, Y_BSL, method)
    if result_BSL is not O_BSL:
        O_BSL.copy_(result_BSL)


def _normalize(G_BSL: Tensor, out_BSL: Tensor) -> None:
    """G / max(||G||_F, EPS) in at least fp32, cast to the dtype of `out`, which may be G.

    Divided by the largest element first: the squares of numbers below 1e-19 or above 1e19 leave fp32's range. Where
    that element is at least EPS the second norm is at least 1, so its floor of 1 is the first's floor of EPS. The norm
    is summed within rows, then over rows: a single matrix summed at once would be split by the number of threads.
    """
    acc_dtype = at_least_float32_dtype(G_BSL.dtype)
    X_BSL = out_BSL if out_BSL.dtype == acc_dtype else torch.empty_like(out_BSL, dtype=acc_dtype)
    # torch's infinity norm takes 13 times as long as these two on a CPU.
    high_B11, low_B11 = G_BSL.amax(dim=(-2, -1), keepdim=True), G_BSL.amin(dim=(-2, -1), keepdim=True)
    largest_B11 = torch.maximum(high_B11, -low_B11).to(acc_dtype).clamp_(min=EPS)
    torch.div(G_BSL, largest_B11, out=X_BSL)
    norm_BS1 = torch.linalg.vector_norm(X_BSL, dim=-1, keepdim=True)
    X_BSL.div_(torch.linalg.vector_norm(norm_BS1, dim=-2, keepdim=True).clamp_(min=1))
    if X_BSL is not out_BSL:
        out_BSL.copy_(X_BSL)


def _standard(X_BSL: Tensor, Y_BSL: Tensor, method: Method) -> Tensor:
    """The result in Y after an odd number of steps, in X after an even one; both are overwritten."""
    B, S, _ = X_BSL.shape
    A_BSS, P_BSS = X_BSL.new_empty(B, S, S), X_BSL.new_empty(B, S, S)
    for a, b, c in method.table:
        A_BSS = _matmul(X_BSL, X_BSL.mT, A_BSS, method.blocks)
        P_BSS = _matmul(A_BSS, A_BSS, P_BSS, method.blocks, c, A_BSS, b)
        X_BSL, Y_BSL = _matmul(P_BSS, X_BSL, Y_BSL, 1, 1.0, X_BSL, a), X_BSL
    return X_BSL


def _gram(X_BSL: Tensor, Y_BSL: Tensor, method: Method) -> Tensor:
    """The result in Y without restarts; every restart swaps the two. Both are overwritten.

    S = a I + P is formed only where it is the first factor of Q: below fp32, a constant added to the diagonal costs the
    diagonal's digits.
    """
    B, S, _ = X_BSL.shape
    R_BSS, P_BSS, Q_BSS, T_BSS = (X_BSL.new_empty(B, S, S) for _ in range(4))
    blocks, last = method.blocks, len(method.table)
    first = True  # of its segment: Q is still the identity
    R_BSS = _matmul(X_BSL, X_BSL.mT, R_BSS, blocks)
    for k, (a, b, c) in enumerate(method.table, start=1):
        P_BSS = _matmul(R_BSS, R_BSS, P_BSS, blocks, c, R_BSS, b)
        ends = k == last or k in method.restarts
        if not ends:
            T_BSS = _matmul(P_BSS, R_BSS, T_BSS, blocks, 1.0, R_BSS, a)
            R_BSS = _matmul(P_BSS, T_BSS, R_BSS, blocks, 1.0, T_BSS, a)
        if not first:
            Q_BSS, T_BSS = _matmul(P_BSS, Q_BSS, T_BSS, blocks, 1.0, Q_BSS, a), Q_BSS
        elif not ends:
            P_BSS.diagonal(dim1=-2, dim2=-1).add_(a)
            Q_BSS, P_BSS = P_BSS, Q_BSS
        if ends:
            moved_BSL = _matmul(Q_BSS, X_BSL, Y_BSL) if not first else _matmul(P_BSS, X_BSL, Y_BSL, 1, 1.0, X_BSL, a)
            X_BSL, Y_BSL = moved_BSL, X_BSL
            if k < last:
                R_BSS = _matmul(X_BSL, X_BSL.mT, R_BSS, blocks)
        first = ends
    return X_BSL


def _matmul(
    A_BSK: Tensor,
    C_BKS: Tensor,
    out_BSS: Tensor,
    blocks: int = 1,
    alpha: float = 1.0,
    add_BSS: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """alpha A C + beta add, in `out`; a new tensor when compiled, where torch 2.13 handles reused buffers wrongly.

    With more than one block the result must be symmetric: each block row is computed from the diagonal on, and
    mirrored.
    """
    if blocks == 1:
        if not torch.compiler.is_compiling():
            added_BSS = out_BSS if add_BSS is None else add_BSS
            return torch.baddbmm(added_BSS, A_BSK, C_BKS, beta=beta, alpha=alpha, out=out_BSS)
        if add_BSS is None:
            return torch.bmm(A_BSK, C_BKS) * alpha
        return torch.baddbmm(add_BSS, A_BSK, C_BKS, beta=beta, alpha=alpha)
    S = A_BSK.shape[1]
    rows = -(-S // blocks)
    if torch.compiler.is_compiling():
        out_BSS = torch.empty_like(out_BSS)
    for start in range(0, S, rows):
        stop = min(start + rows, S)
        added_BrS = None if add_BSS is None else add_BSS[:, start:stop, start:]
        upper_BrS = out_BSS[:, start:stop, start:]
        computed_BrS = _matmul(A_BSK[:, start:stop], C_BKS[:, :, start:], upper_BrS, 1, alpha, added_BrS, beta)
        if computed_BrS is not upper_BrS:
            upper_BrS.copy_(computed_BrS)
        out_BSS[:, stop:, start:stop].copy_(computed_BrS[:, :, stop - start :].mT)
    return out_BSS
