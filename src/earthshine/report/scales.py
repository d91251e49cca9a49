"""Human-readable numbers and names, axes and their ticks, thinning of long series."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ALIKE = 1e-5  # values that differ by less, relatively, are drawn as one: ticks between them would only show rounding
MINUS = "\N{MINUS SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def fixed(value: float, digits: int = 4, sign: bool = False) -> str:
    """A fixed number of decimals and a true minus sign; 'n/a' when the value is not finite."""
    if not math.isfinite(value):
        return "n/a"
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def with_error(value: float, error: float, sign: bool = False) -> str:
    """A value and its standard error: four decimals, or as many as show two digits of the error; the value alone if the
    error is not finite."""
    if not math.isfinite(error):
        return fixed(value, 4, sign)
    digits = min(8, max(4, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{fixed(value, digits, sign)} \u00b1 {fixed(error, digits)}"


def short(value: float, digits: int = 3) -> str:
    """A few significant digits: 0.0123, 4.56, 123, 1.2e-07 written as 1.2 x 10 to a power."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else ("\u221e" if value > 0 else f"{MINUS}\u221e")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return text.replace("-", MINUS)
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    times = "" if mantissa == "1" else f"{mantissa.replace('-', MINUS)}\N{MULTIPLICATION SIGN}"
    return f"{times}10{str(int(power)).translate(SUPERSCRIPTS)}"


def whole(value: float) -> str:
    """Rounded to an integer, with thousands separated: 1,234,567."""
    return f"{round(value):,}"


def compact(value: float) -> str:
    """1,234,567 as 1.23M; then B and T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return short(value / size) + unit
    return short(value)


def flops(value: float) -> str:
    """FLOPs with their metric prefix: 5.02 TFLOP."""
    for size, prefix in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{short(value / size)} {prefix}FLOP"
    return f"{short(value)} FLOP"


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks; `place` maps a value to 0..1."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def linear_axis(
    values: Sequence[float], target: int = 5, *, integers: bool = False, tight: bool = False, from_zero: bool = False
) -> Axis:
    """Round ticks (steps of 1, 2, 2.5 or 5 times a power of ten) around the finite values.

    tight: the range ends at the values, not at a tick, or at a zero that is near (for steps).
    from_zero: zero is always seen.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if from_zero or (tight and 0 < low <= 0.05 * high):
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= _ALIKE * max(abs(low), abs(high)):
        pad = 1.0 if integers else (abs(high) * 0.05 or 1.0)
        low, high = low if from_zero else low - pad, high + pad
    step = _round_step((high - low) / max(1, target), integers)
    if tight:
        tick = math.ceil(high / step - 1e-9) * step
        high = tick if tick - high < 0.02 * (high - low) else high  # thinned series end just short of a round step
    else:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(low, high, ticks, _labels(ticks, step))


def log_axis(values: Sequence[float], target: int = 5) -> Axis:
    """Powers of ten, or 1, 2 and 5 times them when the range is short. Values must be positive."""
    low, high = min(values), max(values)
    if high <= low * (1 + 1e-9):
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    multiples = (1,) if last - first > 3 else (1, 2, 5)
    every = max(1, math.ceil((last - first) / target)) if multiples == (1,) else 1
    ticks = [m * 10.0**e for e in range(first, last + 1, every) for m in multiples]
    below = [t for t in ticks if t <= low * (1 + 1e-9)] or [low]
    above = [t for t in ticks if t >= high * (1 - 1e-9)] or [high]
    low, high = max(below), min(above)
    inside = tuple(t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9))
    return Axis(low, high, inside, tuple(short(t, 1) if t < 1e4 else compact(t) for t in inside), log=True)


def _round_step(raw: float, integers: bool) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    if integers:
        step = max(1.0, math.ceil(step) if step < 10 else step)
    return step


def _labels(ticks: Sequence[float], step: float) -> tuple[str, ...]:
    largest = max((abs(t) for t in ticks), default=0.0)
    if largest >= 10_000:
        return tuple(compact(t) for t in ticks)
    if 0 < largest < 1e-3:
        return tuple(short(t, 3) for t in ticks)
    digits = next(d for d in range(12) if abs(step - round(step, d)) < 1e-6 * step)  # enough, by `_ALIKE`
    return tuple(fixed(t, digits) for t in ticks)


@dataclass(frozen=True)
class Thinned:
    """A series for drawing. Where `group` > 1, y is a mean of `group` neighbors and low..high their range."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    group: int


def thin(x: Sequence[float], y: Sequence[float], max_points: int = 480) -> Thinned:
    """At most `max_points` groups of equal size (the last may be smaller). Points that are not finite are left out."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    group = max(1, math.ceil(len(points) / max_points))
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return Thinned(
        x=tuple(math.fsum(a for a, _ in part) / len(part) for part in parts),
        y=tuple(math.fsum(b for _, b in part) / len(part) for part in parts),
        low=tuple(min(b for _, b in part) for part in parts),
        high=tuple(max(b for _, b in part) for part in parts),
        group=group,
    )


def optimizer_name(optimizer: Mapping[str, Any]) -> str:
    """Which optimizer trains what, from an encoded `OptimizerConfig`; an absent field means its default."""
    algorithm = str(optimizer.get("algorithm"))
    if algorithm != "muon":
        return {"adamw": "AdamW"}.get(algorithm, algorithm)
    non_matrix = str(optimizer.get("non_matrix") or optimizer.get("rest", "adamw"))  # "rest" in older runs
    others = {"adamw": "AdamW", "scion": "Scion"}.get(non_matrix, non_matrix)
    routers = ", AdamW for routers" if optimizer.get("router") == "adamw" else ""
    heads = ", by attention heads" if optimizer.get("heads") == "split" else ""
    norm = f" under the Schatten-{optimizer.get('schatten_p')} norm" if optimizer.get("norm") == "schatten" else ""
    return f"Muon{norm}{heads} ({others} for norms, embedding and head{routers})"
