"""Newton-Schulz coefficients, (a, b, c) per step of X <- a X + b (X X^T) X + c (X X^T)^2 X, and what its forms cost.

No torch import, so that a dry run can ask.

keller5: K. Jordan's Muon and Moonlight (arXiv:2502.16982), the largest slope at 0 that keeps singular values within
    about 0.7 to 1.2.
you5: J. You's five, in modded-nanogpt and heavyball.
polar_express: arXiv:2505.16932, with its safety factor (all rows but the last divided by 1.01, 1.01^3, 1.01^5); for any
    number of steps, the last of its eight rows repeating.
deepseek_v4: eight steps of keller5, then two that converge to 1 (2, -1.5, 0.5).
"""

import math
from collections.abc import Sequence
from typing import Literal

from earthshine.errors import ConfigError

Coefficients = tuple[tuple[float, float, float], ...]
Form = Literal["standard", "gram", "auto"]
Table = Literal["keller5", "you5", "polar_express", "deepseek_v4"]  # the names in COEFFICIENTS

_KELLER = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01

COEFFICIENTS: dict[str, Coefficients] = {
    "keller5": (_KELLER,) * 5,
    "you5": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]),
        _POLAR_EXPRESS[-1],
    ),
    "deepseek_v4": (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}

# As many steps as the others take: the last three rows refine beyond what Muon needs.
_DEFAULT_STEPS = {"polar_express": 5}

# The gram form below fp32: after how many steps X is recomputed. Measured on Gaussian, ill-conditioned, rank-deficient
# and few-token gradients at aspect ratios 1 to 4, against torch.optim.Muon's own error in bf16: three steps of
# keller5 hold before the first restart but not after it, two of the others do; of polar_express, whose first step
# enlarges by 8, not even two. Any other table gets one step each, which is the standard form.
_RESTARTS_BELOW_FP32: dict[Coefficients, tuple[int, ...]] = {
    COEFFICIENTS["keller5"]: (3,),
    COEFFICIENTS["you5"]: (2, 4),
    COEFFICIENTS["deepseek_v4"]: (2, 4, 6, 8),
}
# From fp32 on: the product of a^2 over the steps since the last restart, times the dtype's epsilon, stays below this.
# A singular value of 0 leaves an eigenvalue of the Gram matrix of about -epsilon, which grows by a^2 per step and
# diverges when it nears 1; at this bound the error is below 0.015 on the same matrices (ten steps of keller5: 1e28).
_GROWTH_LIMIT = 0.012
_FP32_EPSILON = 1.2e-7
# Below fp32 the gram form from this aspect ratio on, measured: 1.39x at 4, 1.23x at 2.75, a loss at 1.
_MIN_ASPECT_BELOW_FP32 = 2.5
# ... and where restarts leave at least this saving, counted: 0.8 for keller5 at that ratio.
_MAX_COST_BELOW_FP32 = 0.85


def default_steps(coefficients: str | Sequence[Sequence[float]]) -> int:
    """How many steps a table is made for. Raises ConfigError for one that is unknown or empty."""
    rows = len(_rows(coefficients))
    return _DEFAULT_STEPS.get(coefficients, rows) if isinstance(coefficients, str) else rows


def coefficient_steps(coefficients: str | Sequence[Sequence[float]], steps: int | None = None) -> Coefficients:
    """The (a, b, c) of each of `steps` steps; the last row repeats for steps beyond the table.

    coefficients: a name of COEFFICIENTS, or rows of three finite numbers. steps: None for `default_steps`.
    Raises ConfigError for an unknown name, a table that is empty or misshapen, and steps below 1.
    """
    rows = _rows(coefficients)
    steps = default_steps(coefficients) if steps is None else steps
    if steps < 1:
        raise ConfigError(f"ns_steps={steps} must be at least 1; {default_steps(coefficients)} is this table's own.")
    return tuple(rows[min(k, len(rows) - 1)] for k in range(steps))


def gram_restarts(table: Coefficients, epsilon: float) -> tuple[int, ...]:
    """After how many steps the gram form starts again, X <- Q X with a fresh R = X X^T, to stay accurate.

    table: of `coefficient_steps`. epsilon: of the dtype (torch.finfo(dtype).eps).
    """
    if epsilon > _FP32_EPSILON:
        return _RESTARTS_BELOW_FP32.get(table, tuple(range(1, len(table))))
    restarts, growth = [], epsilon
    for k, (a, _, _) in enumerate(table[:-1], start=1):
        growth *= max(1.0, a * a)
        if growth > _GROWTH_LIMIT:
            restarts.append(k)
            growth = epsilon
    return tuple(restarts)


def newton_schulz_flops(
    M: int, N: int, steps: int = 5, form: Form = "standard", blocks: int = 1, restarts: int = 0
) -> int:
    """Floating-point operations (2 per multiply-add) of one matrix's matmuls.

    blocks as in `resolve_form`; restarts: how many the gram form makes.
    """
    S, L = min(M, N), max(M, N)
    # p block rows compute (p + 1) / 2p of a symmetric matmul.
    square, gram = S**3 * (blocks + 1) // blocks, S * S * L * (blocks + 1) // blocks
    if form == "gram":
        segments = restarts + 1
        return (4 * steps - 3 * segments) * square + segments * (gram + 2 * S * S * L)
    return steps * (gram + square + 2 * S * S * L)


def cheaper_form(M: int, N: int, gram: float, standard: float, *, below_fp32: bool) -> Form:
    """The form that ns_form="auto" takes, by the FLOPs of both: see `ops.orthogonalize.choose_form`."""
    if not below_fp32:
        return "gram" if gram < standard else "standard"
    elongated = max(M, N) >= _MIN_ASPECT_BELOW_FP32 * min(M, N)
    return "gram" if elongated and gram <= _MAX_COST_BELOW_FP32 * standard else "standard"


def _rows(coefficients: str | Sequence[Sequence[float]]) -> Coefficients:
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = ", ".join(COEFFICIENTS)
            raise ConfigError(f"ns_coefficients={coefficients!r} is not a known table; known: {known}.")
        return COEFFICIENTS[coefficients]
    rows = tuple(tuple(float(x) for x in row) for row in coefficients)
    if not rows or any(len(row) != 3 or not all(map(math.isfinite, row)) for row in rows):
        raise ConfigError(
            f"ns_coefficients={coefficients!r} must be one or more rows (a, b, c) of finite numbers, one row per step."
        )
    return tuple((a, b, c) for a, b, c in rows)
