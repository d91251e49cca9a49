"""The logical matrices inside a parameter: what Newton-Schulz is applied to. Standard library only.

A *logical matrix* has its own norm and its own sqrt(max(rows, cols)). A parameter is looked at as one two-dimensional
view, and a specification says where in it the matrices are:
    ("matrix",)                  the parameter [rows, cols] is one matrix
    ("batch",)                   a stack [..., rows, cols], each [rows, cols] its own matrix (experts)
    ("rows", sizes)              consecutive blocks of rows, each its own matrix (fused projections, stored one after
                                 the other)
    ("cols", sizes)              consecutive blocks of columns (what enters an output projection from each head)
    ("heads", n)                 n equal blocks of rows (a projection to n heads)
    ("heads", n, sizes)          n equal blocks of rows, each cut into `sizes` (kv_b_proj: a head's keys, its values)
    ("interleaved", n, sizes)    n groups of rows, each of blocks of `sizes`: matrix j is block j of all groups, one
                                 under the other (Megatron's and NeoX's fused qkv)
    ("interleaved_cols", n)      n matrices whose columns come in turns: matrix j is columns j, n + j, 2n + j, ...
                                 (what PEFT's low-rank factors of n experts are stored as)
    ("flatten", groups)          a convolution kernel [out, in/groups, ...]: per group one matrix
                                 [out/groups, in/groups * ...]
All but "matrix" and "flatten" take stacks [..., rows, cols] too: each matrix of the stack is divided so.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from earthshine.errors import ConfigError
from earthshine.optim.ranges import Ranges, length, merge

Spec = tuple[Any, ...]


@dataclass(frozen=True)
class LogicalMatrix:
    """Where a matrix is in its parameter's two-dimensional view: these rows in this order, these columns.

    step: from each column to the next, of range(*cols, step).
    """

    rows: Ranges
    cols: tuple[int, int]
    step: int = 1

    @property
    def M(self) -> int:
        """Number of rows."""
        return length(self.rows)

    @property
    def N(self) -> int:
        """Number of columns."""
        return len(range(*self.cols, self.step))


def view_shape(shape: Sequence[int], spec: Spec) -> tuple[int, int]:
    """The two-dimensional view, [first, all others] of a convolution kernel, [all but the last, last] of the rest.

    A vector is one row.
    """
    if spec and spec[0] == "flatten":
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def logical_matrices(shape: Sequence[int], spec: Spec, name: str = "parameter") -> tuple[LogicalMatrix, ...]:
    """The matrices of a parameter of this shape; together they cover its view exactly once. None where it is empty.

    Raises ConfigError where the specification does not fit the shape: a wrong split would be a silent wrong scale.
    """
    try:
        return _divide(tuple(shape), normalize(spec))
    except (TypeError, ValueError):  # TypeError: not even a tuple of numbers
        raise ConfigError(
            f"{name} of shape {list(shape)} cannot be divided into logical matrices by {spec!r}: use ('matrix',) for "
            f"[rows, cols]; ('batch',) for a stack of three or more dimensions; ('rows', sizes) or ('cols', sizes) "
            f"with sizes that add up to the last but one or the last dimension; ('heads', n) or ('heads', n, sizes) "
            f"with n blocks of rows, of `sizes` each; ('interleaved', n, sizes) with n * sum(sizes) rows; "
            f"('interleaved_cols', n) with a multiple of n columns; or ('flatten', groups) for a convolution kernel."
        ) from None


def normalize(spec: Iterable[Any]) -> Spec:
    """Sequences as tuples: a file format may have made lists of them."""
    return tuple(tuple(part) if isinstance(part, Sequence) and not isinstance(part, str) else part for part in spec)


@cache
def _divide(shape: tuple[int, ...], spec: Spec) -> tuple[LogicalMatrix, ...]:
    """The matrices; ValueError, which is not remembered (2.0 equals 2), where shape and specification disagree."""
    matrices = _find(shape, spec)
    if matrices is None:
        raise ValueError
    return matrices


def _find(shape: tuple[int, ...], spec: Spec) -> tuple[LogicalMatrix, ...] | None:
    kind, args = (spec[0], spec[1:]) if spec else ("", ())
    if kind == "flatten":
        return _flatten(shape, *args) if len(args) == 1 else None
    if len(shape) < 2 or (kind == "matrix" and len(shape) != 2) or (kind == "batch" and len(shape) < 3):
        return None
    *_, rows, cols = shape
    if kind == "cols" and len(args) == 1:
        sizes = _sizes(args[0], cols)
        starts = range(0, math.prod(shape[:-1]), rows) if rows and sizes else ()
        matrices = [LogicalMatrix(((top, top + rows),), span) for top in starts for span in _spans(sizes)]
        return tuple(matrices) if sizes else None
    if kind == "interleaved_cols" and len(args) == 1:
        if not _positive(args[0]) or cols % args[0]:
            return None
        starts = range(0, math.prod(shape[:-1]), rows) if rows and cols else ()
        return tuple(LogicalMatrix(((top, top + rows),), (j, cols), args[0]) for top in starts for j in range(args[0]))
    blocks = _row_blocks(rows, kind, args)
    if blocks is None:
        return None
    if not math.prod(shape):
        return ()
    tops = range(0, math.prod(shape[:-1]), rows)
    return tuple(LogicalMatrix(_shift(block, top), (0, cols)) for top in tops for block in blocks)


def _row_blocks(rows: int, kind: str, args: tuple[Any, ...]) -> list[Ranges] | None:
    """The rows of each matrix within one matrix of the stack."""
    if kind in ("matrix", "batch") and not args:
        return [((0, rows),)]
    if kind == "rows" and len(args) == 1:
        return [(span,) for span in _spans(_sizes(args[0], rows))] or None
    if kind not in ("heads", "interleaved") or not 1 <= len(args) <= 2 or not _positive(args[0]) or rows % args[0]:
        return None
    count, width = args[0], rows // args[0]
    if kind == "heads":
        sizes = _sizes(args[1] if len(args) == 2 else (width,), width)
        return [(span,) for span in _spans(sizes * count)] or None
    sizes = _sizes(args[1], width) if len(args) == 2 else ()
    blocks = [tuple((g * width + a, g * width + b) for g in range(count)) for a, b in _spans(sizes)]
    return [merge(block) for block in blocks] or None


def _flatten(shape: tuple[int, ...], groups: Any) -> tuple[LogicalMatrix, ...] | None:
    if len(shape) < 2 or not _positive(groups) or shape[0] % groups:
        return None
    rows, cols = shape[0] // groups, math.prod(shape[1:])
    if not rows * cols:
        return ()
    return tuple(LogicalMatrix(((g * rows, (g + 1) * rows),), (0, cols)) for g in range(groups))


def _sizes(sizes: Any, total: int) -> tuple[int, ...]:
    """The sizes if they are positive whole numbers that add up to the total, else ()."""
    fits = isinstance(sizes, tuple) and sizes and all(map(_positive, sizes)) and sum(sizes) == total
    return sizes if fits else ()


def _positive(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0


def _spans(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for n in sizes:
        yield start, start + n
        start += n


def _shift(ranges: Ranges, by: int) -> Ranges:
    return tuple((start + by, stop + by) for start, stop in ranges) if by else ranges
