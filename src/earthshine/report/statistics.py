"""The difference of two held-out losses beside its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from earthshine.report.runs import Heldout

# A difference is significant when it exceeds this many of its standard errors.
BAR = 2.0
# Two fp32 evaluations of one function differ by about this, relative to the loss; smaller differences count as none.
ROUNDING = 1e-5

Verdict = Literal["lower", "higher", "unclear", "equal", "no error"]


@dataclass(frozen=True)
class Difference:
    """`of` minus `to`, paired by sequence: nats per token and bits per byte, each with its standard error."""

    of: str
    to: str
    value: float
    stderr: float  # NaN for a single sequence
    bits_per_byte: float
    bits_per_byte_stderr: float
    num_sequences: int
    verdict: Verdict


def paired(of: Heldout, to: Heldout, of_name: str, to_name: str) -> Difference | str:
    """The difference of two evaluations of the same sequences, or the reason why they cannot be compared.

    With w_i the fraction of tokens that are in sequence i and d_i the difference of its mean losses, the difference is
    d = sum w_i d_i and its standard error sqrt(n/(n-1) * sum (w_i (d_i - d))^2): the linearized variance of a ratio
    (Cochran 1977, section 6.3). What makes a text easy or hard for both models cancels in d_i, so this is far smaller
    than the two losses' own errors.
    """
    if not of.sequences or not to.sequences:
        return "the losses of individual sequences are not recorded"
    counts = [n for _, n in of.sequences]
    if counts != [n for _, n in to.sequences] or of.bytes != to.bytes or of.identity != to.identity:
        return "they were measured on different held-out sequences"
    total = sum(counts)
    weights = [n / total for n in counts]
    gaps = [a - b for (a, _), (b, _) in zip(of.sequences, to.sequences, strict=True)]
    value = math.fsum(w * d for w, d in zip(weights, gaps, strict=True))
    n = len(gaps)
    stderr = math.nan
    if n > 1:
        squares = math.fsum((w * (d - value)) ** 2 for w, d in zip(weights, gaps, strict=True))
        stderr = math.sqrt(n / (n - 1) * squares)
    bits = of.bits_per_byte / of.loss if of.loss else math.nan
    verdict = _verdict(value, stderr, max(1.0, abs(of.loss)))
    return Difference(of_name, to_name, value, stderr, value * bits, stderr * bits, n, verdict)


def _verdict(value: float, stderr: float, scale: float) -> Verdict:
    if abs(value) <= ROUNDING * scale:
        return "equal"
    if math.isnan(stderr):
        return "no error"
    if abs(value) <= BAR * stderr:
        return "unclear"
    return "lower" if value < 0 else "higher"


def ratio(difference: Difference) -> float:
    """How many standard errors the difference is away from zero (infinite for an error of zero)."""
    if difference.stderr == 0:
        return math.inf if difference.value else 0.0
    return abs(difference.value) / difference.stderr


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over `width` neighbors around each value (fewer at the ends); NaN values are skipped."""
    half = width // 2
    total, count = [0.0], [0]
    for v in values:
        total.append(total[-1] + (v if math.isfinite(v) else 0.0))
        count.append(count[-1] + math.isfinite(v))
    out = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        n = count[high] - count[low]
        out.append((total[high] - total[low]) / n if n else math.nan)
    return out
