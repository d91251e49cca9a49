"""Sets of indices as half-open ranges: ascending, none empty, none touching the next. Standard library only."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

Ranges = tuple[tuple[int, int], ...]


def merge(spans: Iterable[tuple[int, int]]) -> Ranges:
    """Ascending (start, stop) as ranges: empty ones left out, touching ones joined."""
    ranges: list[tuple[int, int]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return tuple(ranges)


def length(ranges: Ranges) -> int:
    """How many indices they hold."""
    return sum(stop - start for start, stop in ranges)


def cut(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The ranges of the indices number `start` to `stop` that `ranges` hold."""
    parts, before = [], 0
    for a, b in ranges:
        low, high = max(a, a + start - before), min(b, a + stop - before)
        if low < high:
            parts.append((low, high))
        before += b - a
    return tuple(parts)


def overlaps(held: Ranges, wanted: Ranges) -> Iterator[tuple[int, int, int]]:
    """(offset among the held indices, offset among the wanted ones, length) of each range that is in both."""
    if not held or not wanted:
        return
    # Ranges of a stack are many, and most of them are elsewhere.
    first, last = _near(held, wanted[0][0], wanted[-1][1])
    offsets = list(accumulate((b - a for a, b in held[:last]), initial=0))
    i, j, before = first, 0, 0
    while i < last and j < len(wanted):
        (a, b), (c, d) = held[i], wanted[j]
        start, stop = max(a, c), min(b, d)
        if start < stop:
            yield offsets[i] + start - a, before + start - c, stop - start
        if b <= d:
            i += 1
        if d <= b:
            before += d - c
            j += 1


def overlap(held: Ranges, wanted: Ranges) -> int:
    """How many indices are in both."""
    if not held or not wanted:
        return 0
    i, last = _near(held, wanted[0][0], wanted[-1][1])
    total, j = 0, 0
    while i < last and j < len(wanted):
        (a, b), (c, d) = held[i], wanted[j]
        total += max(0, min(b, d) - max(a, c))
        if b <= d:
            i += 1
        if d <= b:
            j += 1
    return total


def _near(ranges: Ranges, start: int, stop: int) -> tuple[int, int]:
    """The slice of the ranges that may have something in [start, stop)."""
    first = max(0, bisect_right(ranges, (start, start)) - 1)
    return first, bisect_right(ranges, (stop, stop), first)
