"""Tensor rules, the core of upcycling: how to make any slice of a target tensor.

A rule is a pure function of (dense tensors, slices). Whatever part is asked for, its bits are those of the same part
of the whole, so one process that streams every target to disk and many that fill only their own shards agree by
construction. Random numbers are therefore counter-based: a function of (key, index of the element), not of a stream.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthshine.checkpoint.safetensors_store import Store, check_finite, resolve_slices

Floats = NDArray[np.float64]


class TensorRule(Protocol):
    """Makes one target tensor. Equal rules make equal tensors."""

    @property
    def kind(self) -> str:
        """A word for the ledger."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the dense tensors that are read."""

    def read(self, store: Store, slices: Sequence[slice] | None = None) -> Tensor:
        """The target tensor, or the part given by one slice of step 1 per leading dimension."""


@dataclass(frozen=True)
class Copy:
    """The source, bit for bit."""

    source: str
    kind: str = "copy"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def read(self, store: Store, slices: Sequence[slice] | None = None) -> Tensor:
        """Raises WeightsError when the part that is read holds a NaN or an infinity."""
        part = store.read(self.source, slices)
        check_finite(self.source, part)
        return part


@dataclass(frozen=True)
class Zeros:
    """Zeros of a shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "zeros"

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def read(self, store: Store, slices: Sequence[slice] | None = None) -> Tensor:
        return torch.zeros([b - a for a, b in resolve_slices(self.shape, slices)], dtype=self.dtype)


@dataclass(frozen=True)
class Normal:
    """Independent N(0, std) numbers, each a function of (seed, layer, expert, matrix, index of the element).

    They are computed in float64 from operations that IEEE 754 rounds exactly, and cast once: the same bits on any
    machine.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    std: float
    seed: int
    layer: int
    matrix: str
    expert: int = -1
    kind: str = "normal"

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def read(self, store: Store, slices: Sequence[slice] | None = None) -> Tensor:
        index: NDArray[np.uint64] = np.asarray(0, dtype=np.uint64)
        for (start, stop), size in zip(resolve_slices(self.shape, slices), self.shape, strict=True):
            within = np.arange(start, stop, dtype=np.uint64)
            index = np.asarray(index[..., None] * np.uint64(size) + within, dtype=np.uint64)
        key = hashlib.sha256(f"{self.seed}/{self.layer}/{self.expert}/{self.matrix}".encode()).digest()
        normals = normal_at(index, int.from_bytes(key[:8], "little")) * self.std
        return torch.from_numpy(np.ascontiguousarray(normals)).to(self.dtype)


def random_bits(index: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """64 bits per index: the SplitMix64 generator (Steele, Lea and Flood 2014) at position `index` from state `key`."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def normal_at(index: NDArray[np.uint64], key: int) -> Floats:
    """Standard normal numbers at the given indices, by Box and Muller's transform of 64 bits each.

    32 bits give the radius (so at most 6.66 standard deviations), 32 the angle.
    """
    bits = random_bits(index, key)
    radius = np.sqrt(-2.0 * _log(((bits >> np.uint64(32)) + np.uint64(1)).astype(np.float64) * 2.0**-32))
    turns = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
    return np.asarray(radius * _cos_turns(turns))


def _log(u: Floats) -> Floats:
    """Natural logarithm of numbers in (0, 1]. Written out because libraries round it differently from each other and,
    by vector width, from one position of an array to the next."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(low, 2 * mantissa, mantissa), np.where(low, exponent - 1, exponent)
    s = (mantissa - 1) / (mantissa + 1)
    return np.asarray(exponent * 0.6931471805599453 + 2 * s * _polynomial(s * s, [1 / n for n in range(1, 24, 2)]))


def _cos_turns(turns: Floats) -> Floats:
    """cos(2 pi turns) for turns in [0, 1); the reduction to an eighth of a turn is exact."""
    quarter = np.floor(4 * turns + 0.5)
    x = 6.283185307179586 * (turns - quarter / 4)
    cosines, sines = [1.0], [1.0]
    for n in range(1, 10):
        cosines.append(-cosines[-1] / ((2 * n - 1) * (2 * n)))
        sines.append(-sines[-1] / ((2 * n) * (2 * n + 1)))
    quadrant = quarter.astype(np.int64) % 4
    value = np.where(quadrant % 2 == 0, _polynomial(x * x, cosines), x * _polynomial(x * x, sines))
    return np.asarray(np.where((quadrant == 1) | (quadrant == 2), -value, value))


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    """Horner's rule, lowest coefficient first."""
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total
