"""Stochastic rounding of weights that are narrower than float32: what nearest rounding loses arrives on average.

A bfloat16 weight has 8 bits. A step that moves it by less than half of its last bit changes nothing, however often it
is repeated: of updates with an RMS of 1e-6 on weights of 0.03, four fifths are lost. Rounded stochastically, a number
x between the neighbors a < b becomes b with probability (x - a) / (b - a), so that its expectation is x.

    bits  = SplitMix64(key + counter), 16 of 64        key: of (seed, name of the parameter, step)
    x     = float32 with 16 (bfloat16) or 13 (float16) bits too many: add that many random bits, cut them off

The counter is the element's number in the whole parameter, so the bits depend on no layout and on no order of work; the
step is part of the state, so a resumed run samples what the uninterrupted one would have.

Legend: R rows and C columns of what this process holds of a parameter, as `optim.sharding.layout` sees it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from earthshine.optim.ranges import Ranges

NARROW = (torch.float16, torch.bfloat16)
# Elements rounded at once, whose random bits take 8 bytes a few times: on a CPU they stay in the cache, on an
# accelerator they are few launches, and small beside the weights.
_CPU_PIECE, _ACCELERATOR_PIECE = 1 << 15, 1 << 24
_SIGNED = 1 << 63


@dataclass(frozen=True)
class Noise:
    """The random bits of some elements at one step: element (r, c) is number `starts_R[r] + cols_C[c]` of its whole."""

    starts_R: Tensor
    cols_C: Tensor
    key: int = 0

    def part(self, row: int, col: int, rows: int, cols: int) -> "Noise":
        """Of a rectangle in it."""
        return Noise(self.starts_R.narrow(0, row, rows), self.cols_C.narrow(0, col, cols), self.key)

    def at(self, seed: int, name: str, step: int) -> "Noise":
        """The same elements at a step."""
        key = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
        return Noise(self.starts_R, self.cols_C, int.from_bytes(key[:8], "little"))

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and 16 bits for each of their elements, int32 [rows, C]."""
        piece = _CPU_PIECE if self.cols_C.is_cpu else _ACCELERATOR_PIECE
        rows = max(1, piece // max(1, len(self.cols_C)))
        for start in range(0, len(self.starts_R), rows):
            which = slice(start, start + rows)
            yield which, random_bits(self.starts_R[which, None] + self.cols_C, self.key).bitwise_and_(0xFFFF).int()


# No random bits for any parameter: all are rounded to nearest.
NEAREST: Mapping[int, Noise] = MappingProxyType({})


def elements(rows: Ranges, cols: Ranges, width: int, device: torch.device) -> Noise:
    """Which elements of a parameter a process holds: rows and columns of its 2-D view, `width` columns wide."""
    return Noise(_indices(rows, device) * width, _indices(cols, device))


def _indices(ranges: Ranges, device: torch.device) -> Tensor:
    parts = [torch.arange(start, stop, device=device) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def random_bits(index: Tensor, key: int) -> Tensor:
    """64 bits per int64 index: SplitMix64 at position `index` from state `key`, as in `upcycle.tensor_rules`."""
    z = (index + 1).mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by of unsigned numbers."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    """The int64 of these 64 bits."""
    return (bits + _SIGNED) % (1 << 64) - _SIGNED


def write_(weight: Tensor, exact: Tensor, noise: Noise | None) -> None:
    """`exact` into a weight of fewer bits: stochastically by `noise`, to nearest without."""
    if noise is None:
        weight.copy_(exact)
        return
    exact_RC = exact.reshape(len(noise.starts_R), len(noise.cols_C))
    rounded_RC = torch.empty_like(exact_RC, dtype=weight.dtype)
    for which, bits in noise.pieces():
        rounded_RC[which] = stochastic(exact_RC[which], bits, weight.dtype)
    weight.copy_(rounded_RC.view(weight.shape))


def stochastic(exact: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to float16 or bfloat16, by 16 random bits per element (int32). Beyond the range to infinity, as nearest.

    What is exact in `dtype`, and what is not finite, stays as it is.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    up = (exact.view(torch.int32) + (bits >> (16 - dropped))).bitwise_and_(-(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        # Below the normal numbers neighbors are 2^-24 apart.
        steps = exact.abs() * 2.0**24
        down = steps.floor()
        small = (down + (bits * 2.0**-16 < steps - down)) * 2.0**-24
        up = torch.where(steps < 2.0**10, small.copysign(exact), up)
    return torch.where(exact.isfinite(), up, exact).to(dtype)
