"""ZeRO-1: where rows are cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.optim.ranges import length, merge
from earthshine.optim.sharding.layout import Layout
from earthshine.optim.sharding.zero1 import partition_rows


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=5),
    st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_a_partition_is_as_even_as_whole_rows_allow(views: list[tuple[int, int]], parts: int) -> None:
    ranks = tuple(range(10, 10 + parts))
    layouts = partition_rows(views, ranks, 1 % parts)
    assert [(m.view, m.ranks, m.position) for m in layouts] == [(v, ranks, 1 % parts) for v in views]
    element = 0
    total = sum(rows * cols for rows, cols in views)
    widest = max((cols for _, cols in views), default=0)
    ends = [0] * parts  # where the last element of each part is
    order = []
    for (rows, cols), layout in zip(views, layouts, strict=True):
        assert layout.cols == (((0, cols),),) * parts
        assert merge(span for ranges in layout.rows for span in ranges) == merge([(0, rows)])  # once, in order
        for part, ranges in enumerate(layout.rows):
            order += [part] * length(ranges)
            element += length(ranges) * cols
            if ranges:
                ends[part] = element
    assert order == sorted(order)  # a part is one piece of the list
    for part, end in enumerate(ends):
        if end:  # half a row from an even part's end
            assert abs(end - total * (part + 1) / parts) <= widest / 2


def test_a_partition_by_hand() -> None:
    # 30 elements in 3: boundaries at 10, row 2.5 of the first view, so 2, and at 20, row 2.7 of the second, so 3.
    a, b = partition_rows([(3, 4), (6, 3)], (0, 1, 2), 0)
    assert a == Layout((3, 4), (0, 1, 2), 0, (((0, 2),), ((2, 3),), ()), (((0, 4),),) * 3)
    assert b.rows == ((), ((0, 3),), ((3, 6),))
