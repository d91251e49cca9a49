"""Ranges of indices against sets of them."""

from hypothesis import given
from hypothesis import strategies as st

from earthshine.optim.ranges import Ranges, cut, length, merge, overlap, overlaps

INDICES = st.sets(st.integers(0, 20))


def ranges_of(indices: set[int]) -> Ranges:
    return merge((i, i + 1) for i in sorted(indices))


@given(INDICES)
def test_merged_ranges_hold_the_indices_and_do_not_touch(indices: set[int]) -> None:
    ranges = ranges_of(indices)
    assert [i for start, stop in ranges for i in range(start, stop)] == sorted(indices)
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert length(ranges) == len(indices)
    assert merge([(3, 3), (4, 6), (6, 7)]) == ((4, 7),)


def test_cut() -> None:
    ranges = ((0, 3), (5, 6), (8, 12))
    assert [cut(ranges, 1, 5), cut(ranges, 3, 3), cut(ranges, 0, 8), cut(ranges, 4, 99)] == [
        ((1, 3), (5, 6), (8, 9)),
        (),
        ranges,
        ((8, 12),),
    ]


@given(INDICES, INDICES)
def test_overlaps_are_what_both_hold(held: set[int], wanted: set[int]) -> None:
    listed, asked = sorted(held), sorted(wanted)
    both = list(overlaps(ranges_of(held), ranges_of(wanted)))
    assert [listed[a + k] for a, _, n in both for k in range(n)] == sorted(held & wanted)
    assert [asked[b + k] for _, b, n in both for k in range(n)] == sorted(held & wanted)
    assert overlap(ranges_of(held), ranges_of(wanted)) == len(held & wanted)
