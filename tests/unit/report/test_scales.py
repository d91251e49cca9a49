"""Numbers as people read them, ticks that hold the values, thinning that loses no peak."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from earthshine.report.scales import (
    compact,
    fixed,
    flops,
    linear_axis,
    log_axis,
    optimizer_name,
    short,
    thin,
    with_error,
)


def test_numbers():
    assert fixed(-0.05, 3) == "\u22120.050"
    assert fixed(-0.00001, 3) == "0.000"  # no minus zero
    assert fixed(0.5, 2, sign=True) == "+0.50"
    assert fixed(math.nan) == "n/a"
    assert short(0) == "0"
    assert short(1.23456) == "1.23"
    assert short(123456) == "123,456"
    assert short(-2.4e-7) == "\u22122.4\u00d710\u207b\u2077"
    assert short(1e-5) == "10\u207b\u2075"
    assert short(math.inf) == "\u221e"
    assert compact(692_036_928) == "692M"
    assert compact(1_000) == "1k"
    assert flops(5.02e12) == "5.02 TFLOP"
    assert flops(12) == "12 FLOP"


def test_errors_decide_the_digits():
    assert with_error(-0.5, 0.0123, sign=True) == "\u22120.5000 \u00b1 0.0123"
    assert with_error(2.1e-4, 1.06e-4) == "0.00021 \u00b1 0.00011"
    assert with_error(0.0, 0.0) == "0.0000 \u00b1 0.0000"
    assert with_error(1.5, math.nan) == "1.5000"


finite = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-9)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_a_linear_axis_holds_its_values(values, tight, from_zero):
    axis = linear_axis(values, tight=tight, from_zero=from_zero)
    slack = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - slack <= v <= axis.high + slack for v in values)
    assert 1 <= len(axis.ticks) <= 14
    assert len(axis.labels) == len(axis.ticks)
    if not tight:
        assert len(set(axis.labels)) == len(axis.labels) or max(map(abs, values)) > 1e4  # rounded to 3 digits


@given(st.floats(1e-3, 9e3), st.floats(-14, -1), st.booleans())
@example(1.001, -3.0, False)  # an end of the axis that rounds to the value's neighbor
@example(0.1999773785, -9.7, False)  # the sizes of Scion's updates in one run
def test_values_that_hardly_differ_have_an_axis(value, magnitude, tight):
    axis = linear_axis([value, value * (1 + 10**magnitude)], tight=tight)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= value <= axis.high + slack
    assert len(set(axis.labels)) == len(axis.ticks) <= 14


@pytest.mark.parametrize("integers", [False, True])
def test_counts_that_are_all_zero_have_no_negative_axis(integers):
    assert linear_axis([0, 0], integers=integers, from_zero=True).low == 0


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_a_log_axis_holds_its_values(values):
    axis = log_axis(values)
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v in values)
    assert axis.ticks


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 41])
def test_steps_have_whole_ticks(num_steps):
    axis = linear_axis(list(range(1, num_steps + 1)), 6, integers=True, tight=True)
    assert all(tick == round(tick) for tick in axis.ticks)
    assert len(set(axis.labels)) == len(axis.labels)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=200), st.integers(1, 50))
def test_thinning_keeps_mean_and_extremes(y, max_points):
    values = [v for v in y if not math.isnan(v)]
    shown = thin(range(len(y)), y, max_points)
    assert len(shown.y) <= max_points
    if values:
        assert max(shown.high) == max(values)
        assert min(shown.low) == min(values)
        sizes = [min(shown.group, len(values) - i) for i in range(0, len(values), shown.group)]
        mean = math.fsum(v * n for v, n in zip(shown.y, sizes, strict=True)) / len(values)
        assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-6)
    if len(values) <= max_points:
        assert shown.y == tuple(values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm": "adamw", "non_matrix": "adamw"}, "AdamW"),
        ({"algorithm": "muon"}, "Muon (AdamW for norms, embedding and head)"),
        ({"algorithm": "muon", "rest": "scion"}, "Muon (Scion for norms, embedding and head)"),  # of before
        ({"algorithm": "muon", "non_matrix": "scion"}, "Muon (Scion for norms, embedding and head)"),
        (
            {"algorithm": "muon", "non_matrix": "scion", "router": "adamw", "heads": "split"},
            "Muon, by attention heads (Scion for norms, embedding and head, AdamW for routers)",
        ),
        (
            {"algorithm": "muon", "norm": "schatten", "schatten_p": 4.0},
            "Muon under the Schatten-4.0 norm (AdamW for norms, embedding and head)",
        ),
    ],
)
def test_the_optimizer_is_named_as_it_was(options, words):
    assert optimizer_name(options) == words
