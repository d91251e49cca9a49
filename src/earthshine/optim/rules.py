"""The equations of a Muon step, in the papers' order, as functions of tensors; who calls them where: `optim.muon_step`.

    M <- mu M + G                              `momentum_`     a sum, not an average; M_0 = 0
    X  = mu M + G, or M without Nesterov       `direction_`
    O  = NewtonSchulz(X / ||X||_F)             `orthogonalize` or the steepest step under a Schatten norm
    O  = 0 where G is zero                     `update`        with skip_idle: an expert that no token chose
    O, v <- rows of O / sqrt(v)                `normuon`       with normuon_beta2
    O <- O / RMS(O)                            `exact_rms`     with exact_rms
    s  = 0.2 sqrt(max(rows, cols))             `scale`         0.2 alone where the RMS of O is 1 already
    W <- W - lr wd W - lr s O                  `step_`         with `decay_`, by the unscaled lr

`update` is O from X, of a batch. Momentum, decay and step work per element, on what a process holds; everything between
takes whole logical matrices, which their owner has. A trailing underscore: in place.

Legend: B matrices, M rows (outputs), N columns (inputs); in a batch S = min(M, N), L = max(M, N), tall ones transposed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError
from earthshine.ops import lmo
from earthshine.ops.orthogonalize import newton_schulz
from earthshine.optim.rounding import Noise, write_

ScaleRule = Callable[[int, int], float]

# Names that need more than rows and columns, or are ours: they cannot be registered over.
_BUILT_IN = ("match_rms_adamw", "original", "spectral")
_REGISTERED: dict[str, ScaleRule] = {}

# NorMuon's epsilon: below any row's RMS that an orthogonalized matrix of up to 1e12 columns has.
NORMUON_EPS = 1e-8


def momentum_(sums: Sequence[Tensor], grads: Sequence[Tensor], mu: float, acc_dtype: torch.dtype) -> Sequence[Tensor]:
    """M <- mu M + G in place; returns M as it was before rounding to a dtype narrower than fp32 in which it is kept."""
    if not sums:
        return []
    if all(m.dtype.itemsize >= 4 for m in sums):
        torch._foreach_mul_(list(sums), mu)
        torch._foreach_add_(list(sums), list(grads))
        return sums
    exact = [m.to(acc_dtype).mul_(mu).add_(g) for m, g in zip(sums, grads, strict=True)]
    for m, e in zip(sums, exact, strict=True):
        m.copy_(e)
    return exact


def direction_(X: Tensor, grad: Tensor, total: Tensor, options: Mapping[str, Any]) -> None:
    """X <- mu M + G with Nesterov, else M; total is M."""
    if options["nesterov"]:
        torch.add(grad, total, alpha=options["momentum"], out=X)
    else:
        X.copy_(total)


def update(
    X_BSL: Tensor,
    by_shape: Iterable[tuple[slice, tuple[int, int]]],
    options: Mapping[str, Any],
    ns_dtype: torch.dtype,
    busy_B: Tensor | None = None,
    v_BL: Tensor | None = None,
    stopwatch: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """O_BSL of a batch of directions, before its scale. May overwrite X.

    by_shape: runs of matrices of one shape, (which of B, (M, N)).
    busy_B: whether any element of a matrix's gradient is not zero; None without skip_idle.
    v_BL: NorMuon's second moment, of M rows from the left, updated in place; None without NorMuon.
    stopwatch: of the orthogonalization.
    """
    moving_B = X_BSL.flatten(1).any(dim=1) if v_BL is not None else None
    with nullcontext() if stopwatch is None else stopwatch:
        O_BSL = orthogonalize(X_BSL, options, ns_dtype)
    if busy_B is not None:
        O_BSL *= busy_B[:, None, None]
    if v_BL is not None and moving_B is not None:
        # The second moment is unchanged where no rank has a gradient, and where the update is left out.
        moving_B = moving_B if busy_B is None else moving_B & busy_B
        for which, (M, N) in by_shape:
            O_BMN = O_BSL[which].mT if M > N else O_BSL[which]
            v_BM, moving_B1 = v_BL[which, :M], moving_B[which, None]
            hat_BMN, new_BM = normuon(O_BMN, v_BM, options["normuon_beta2"])
            O_BMN.copy_(torch.where(moving_B1[..., None], hat_BMN, O_BMN))
            v_BM.copy_(torch.where(moving_B1, new_BM, v_BM))
    return exact_rms(O_BSL) if options["exact_rms"] else O_BSL


def orthogonalize(X_BSL: Tensor, options: Mapping[str, Any], ns_dtype: torch.dtype) -> Tensor:
    """The steepest direction under the spectral norm, by Newton-Schulz, or under a Schatten norm, by SVD.

    May overwrite X.
    """
    if options["norm"] == "schatten":
        return lmo.schatten(X_BSL, options["schatten_p"])
    return newton_schulz(
        X_BSL,
        options["ns_coefficients"],
        options["ns_steps"],
        ns_dtype,
        options["ns_form"],
        consume=True,
        compile=options["ns_compile"],
    )


def normuon(O_BMN: Tensor, v_BM: Tensor, beta2: float, eps: float = NORMUON_EPS) -> tuple[Tensor, Tensor]:
    """NorMuon's normalization of rows (arXiv:2510.05491, Algorithm 1): (O_hat with RMS 1 per matrix, the new v).

        v     <- beta2 v + (1 - beta2) mean over columns of O * O         one number per row; v_0 = 0
        O_hat  = O / (sqrt(v) + eps)                                      row by row
        W     <- (1 - lr wd) W - lr 0.2 sqrt(M N) / ||O_hat||_F  O_hat

    What is returned is sqrt(M N) / ||O_hat||_F O_hat, so that the caller's factor is 0.2 alone, without
    sqrt(max(rows, cols)); v has no bias correction, as its constant is gone with the norm. Takes [..., M, N] and
    [..., M]; v in float32 or float64, and not written to. Rows of zeros stay zero.
    """
    O_BMN = O_BMN.contiguous()  # sums in another order would differ in the last bit
    acc_dtype = torch.promote_types(O_BMN.dtype, v_BM.dtype)
    squares_BM = torch.linalg.vector_norm(O_BMN, dim=-1, dtype=acc_dtype).square_().div_(max(1, O_BMN.shape[-1]))
    v_BM = torch.lerp(squares_BM.to(v_BM.dtype), v_BM, beta2)
    O_hat_BMN = O_BMN / (v_BM.sqrt() + eps).unsqueeze(-1)
    return O_hat_BMN.mul_(_inverse_rms(O_hat_BMN)).to(O_BMN.dtype), v_BM


def exact_rms(O_BMN: Tensor) -> Tensor:
    """O / RMS(O) per matrix, in O's dtype: the RMS per element becomes 1 whatever the singular values are.

    Moonlight's "Update Norm" (arXiv:2502.16982 section 2.2 and its table of controlled experiments: W -= lr 0.2
    O / RMS(O)). Takes [..., M, N]. Norms are in at least fp32. A zero matrix stays zero.
    """
    O_BMN = O_BMN.contiguous()  # sums in another order would differ in the last bit
    return (O_BMN * _inverse_rms(O_BMN)).to(O_BMN.dtype)


def scale(options: Mapping[str, Any], rows: int, cols: int) -> float:
    """s, which multiplies an update O of rows x cols before the learning rate does."""
    if options["exact_rms"] or options["normuon_beta2"]:
        return float(options["update_rms"])
    return scale_factor(options["scale"], rows, cols, options["update_rms"])


def scale_factor(rule: str, rows: int, cols: int, update_rms: float) -> float:
    """What multiplies an orthogonalized rows x cols matrix O before the learning rate does.

    match_rms_adamw: update_rms * sqrt(max(rows, cols)), so that a full-rank O has the RMS update_rms of AdamW's updates
        (Moonlight, arXiv:2502.16982, equation 4 and lemma 1).
    original: sqrt(max(1, rows / cols)) (K. Jordan's Muon, and torch.optim.Muon's "original").
    spectral: sqrt(rows / cols), the size that keeps features moving at any width (arXiv:2310.17813, condition 1).
    Any other name: what `register_scale` gave it. Raises ConfigError for a name that nobody gave.
    """
    if rule == "match_rms_adamw":
        return update_rms * math.sqrt(max(rows, cols))
    if rule == "original":
        return math.sqrt(max(1.0, rows / cols))
    if rule == "spectral":
        return math.sqrt(rows / cols)
    if rule in _REGISTERED:
        return float(_REGISTERED[rule](rows, cols))
    known = ", ".join([*_BUILT_IN, *sorted(_REGISTERED)])
    raise ConfigError(
        f"scale={rule!r} is not a known rule; known: {known}. earthshine.optim.rules.register_scale(name, function) "
        f"adds one; call it before the optimizer is made, also when resuming."
    )


def step_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    rate: float,
    decay: float,
    cautious: bool,
    noises: Sequence[Noise | None] = (),
) -> None:
    """W <- W - decay W - rate U in place, as `decay_` and then the update; rounded to W's dtype once.

    Narrow weights are computed in float32: in bf16 a decay of 1e-4 would round to nothing twice, and the rate as well.
    noises: how each weight is rounded, as `optim.rounding.write_` does; () is to nearest.
    """
    if all(w.dtype.itemsize >= 4 for w in weights):
        decay_(weights, updates, decay, cautious)
        torch._foreach_add_(list(weights), list(updates), alpha=-rate)
        return
    for w, u, noise in zip(weights, updates, noises or [None] * len(weights), strict=True):
        exact = w.to(at_least_float32_dtype(w.dtype))
        decay_([exact], [u], decay, cautious)
        exact.add_(u.to(exact.dtype), alpha=-rate)
        if w is not exact:
            write_(w, exact, noise)


def decay_(weights: Sequence[Tensor], updates: Sequence[Tensor], factor: float, cautious: bool) -> None:
    """Decoupled weight decay in place: W <- W - factor W, with factor = lr * weight decay.

    cautious: only the elements that the update moves towards zero as well, W <- W - factor 1[U W >= 0] W, where the
        step that follows is W <- W - lr U (Cautious Weight Decay, arXiv:2510.12402, Algorithm 1). Scale U as you
        like: only its signs are read; without `cautious`, nothing is.
    """
    if not factor or not weights:
        return
    if cautious:
        for w, u in zip(weights, updates, strict=True):  # one at a time: few temporaries
            agrees = w.sign().mul(u) >= 0  # the product W U itself underflows
            torch.where(agrees, w * (1 - factor), w, out=w)
    elif all(w.is_cpu for w in weights):
        for w in weights:  # torch's foreach is a loop here, and rounds a bf16 weight's factor to bf16: 0.9999 to 1
            w.mul_(1 - factor)
    else:
        torch._foreach_mul_(list(weights), 1 - factor)


def register_scale(name: str, function: ScaleRule) -> None:
    """Give `function(rows, cols) -> float` a name, which is what checkpoints and configs hold instead of it.

    Raises ConfigError for a name that is taken by another function.
    """
    if not name or name in _BUILT_IN:
        raise ConfigError(
            f"scale name {name!r} must be non-empty and not one of {', '.join(_BUILT_IN)}: choose another."
        )
    if _REGISTERED.setdefault(name, function) is not function:
        raise ConfigError(f"scale name {name!r} is registered for another function: choose another name.")


def scale_name(rule: str | ScaleRule) -> str:
    """The name of a rule, given by name or as the function itself. Raises ConfigError for what has no name."""
    if isinstance(rule, str):
        if rule not in _BUILT_IN and rule not in _REGISTERED:
            scale_factor(rule, 1, 1, 0.0)  # raises, with the names that are known
        return rule
    for name, function in _REGISTERED.items():
        if function is rule:
            return name
    raise ConfigError(
        f"scale={rule!r} has no name, by which a checkpoint could ask for it again: call "
        f"earthshine.optim.rules.register_scale('a_name', function) first, then pass either."
    )


def _inverse_rms(O_BMN: Tensor) -> Tensor:
    """1 / RMS of each matrix, [..., 1, 1] in at least fp32; 1 where everything is zero."""
    acc_dtype = at_least_float32_dtype(O_BMN.dtype)
    norm_B11 = torch.linalg.vector_norm(O_BMN, dim=(-2, -1), keepdim=True, dtype=acc_dtype)
    root = math.sqrt(O_BMN.shape[-2] * O_BMN.shape[-1])
    return torch.where(norm_B11 > 0, root / norm_B11, 1.0).to(acc_dtype)
