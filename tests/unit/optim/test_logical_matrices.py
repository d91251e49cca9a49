"""Logical matrices: each specification's meaning, that they cover a parameter exactly once, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import LogicalMatrix, Spec, logical_matrices, view_shape


def extract(whole: Tensor, spec: Spec) -> list[Tensor]:
    """The matrices of a parameter, by the rows and columns that the plan says."""
    view = whole.reshape(view_shape(whole.shape, spec))
    return [
        torch.cat([view[a:b, slice(*matrix.cols, matrix.step)] for a, b in matrix.rows])
        for matrix in logical_matrices(whole.shape, spec)
    ]


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((4, 6), ("matrix",), lambda w: [w]),
        ((2, 4, 6), ("batch",), lambda w: list(w)),
        ((2, 3, 4, 6), ("batch",), lambda w: list(w.flatten(0, 1))),
        ((6, 4), ("rows", (4, 2)), lambda w: list(w.split((4, 2)))),
        ((2, 6, 4), ("rows", (4, 2)), lambda w: [part for m in w for part in m.split((4, 2))]),
        ((2, 4, 6), ("cols", [1, 5]), lambda w: [part for m in w for part in m.split((1, 5), 1)]),
        ((6, 4), ("heads", 3), lambda w: list(w.view(3, 2, 4))),
        # DeepSeek's kv_b_proj: head by head, its keys and its values
        ((10, 4), ("heads", 2, (2, 3)), lambda w: [w[0:2], w[2:5], w[5:7], w[7:10]]),
        # Megatron's linear_qkv: per key-value head its two queries, its key and its value, heads of 1
        (
            (8, 4),
            ("interleaved", 2, (2, 1, 1)),
            lambda w: [part.flatten(0, 1) for part in w.view(2, 4, 4).split((2, 1, 1), 1)],
        ),
        ((6, 4), ("interleaved", 3, (1, 1)), lambda w: [w[0::2], w[1::2]]),
        ((6, 4), ("interleaved", 1, (4, 2)), lambda w: list(w.split((4, 2)))),
        ((6, 4), ("interleaved", 3, (2,)), lambda w: [w]),
        ((2, 6, 4), ("interleaved", 3, (1, 1)), lambda w: [m[i::2] for m in w for i in (0, 1)]),
        # PEFT's second factor of a stack of experts, [out, rank x experts]
        ((4, 6), ("interleaved_cols", 3), lambda w: list(w.reshape(4, 2, 3).permute(2, 0, 1))),
        ((2, 4, 6), ("interleaved_cols", 2), lambda w: [m[:, i::2] for m in w for i in (0, 1)]),
        ((4, 6), ("interleaved_cols", 6), lambda w: list(w.T[:, :, None])),
        ((6, 2, 3, 3), ("flatten", 2), lambda w: [w[:3].reshape(3, 18), w[3:].reshape(3, 18)]),
        ((6, 4), ("flatten", 1), lambda w: [w]),
        ((0, 4), ("matrix",), lambda w: []),
        ((0, 4, 4), ("rows", (1, 3)), lambda w: []),
    ],
)
def test_what_each_specification_means(shape: tuple[int, ...], spec: Spec, expected: Any) -> None:
    whole = numbered(*shape)
    want = expected(whole)
    got = extract(whole, spec)
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    assert [(m.M, m.N) for m in logical_matrices(shape, spec)] == [tuple(w.shape) for w in want]


@pytest.mark.parametrize(
    ("shape", "spec", "view"),
    [
        ((4, 6), ("matrix",), (4, 6)),
        ((2, 3, 6), ("batch",), (6, 6)),
        ((8, 2, 3, 3), ("flatten", 2), (8, 18)),
        ((5,), (), (1, 5)),
        ((), (), (1, 1)),
    ],
)
def test_views(shape: tuple[int, ...], spec: Spec, view: tuple[int, int]) -> None:
    assert view_shape(shape, spec) == view


def test_runs_that_touch_are_one() -> None:
    assert logical_matrices((6, 4), ("interleaved", 3, (2,))) == (LogicalMatrix(((0, 6),), (0, 4)),)
    assert logical_matrices((6, 4), ("interleaved", 3, (1, 1)))[1].rows == ((1, 2), (3, 4), (5, 6))


@st.composite
def divisions(draw: st.DrawFn) -> tuple[tuple[int, ...], Spec]:
    stack = draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    n, other = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(
        st.sampled_from(["rows", "cols", "heads", "parts of heads", "interleaved", "flatten", "batch", "in turns"])
    )
    rows, spec = {
        "rows": (sum(sizes), ("rows", sizes)),
        "cols": (other, ("cols", sizes)),
        "heads": (n * other, ("heads", n)),
        "parts of heads": (n * sum(sizes), ("heads", n, sizes)),
        "interleaved": (n * sum(sizes), ("interleaved", n, sizes)),
        "flatten": (n * other, ("flatten", n)),
        "in turns": (other, ("interleaved_cols", n)),
        "batch": (other, ("batch",)),
    }[kind]
    cols = {"cols": sum(sizes), "in turns": n * other}.get(kind, other)
    if kind == "flatten":
        return (rows, cols, *stack), spec
    return (*([2] if kind == "batch" and not stack else stack), rows, cols), spec


@given(divisions())
@settings(max_examples=100, deadline=None)
def test_matrices_cover_their_parameter_exactly_once(division: tuple[tuple[int, ...], Spec]) -> None:
    whole = numbered(*division[0])
    found = torch.cat([m.flatten() for m in extract(whole, division[1])])
    assert torch.equal(found.sort().values, whole.flatten())


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 4, 6), ("matrix",)),
        ((4,), ("matrix",)),
        ((4, 6), ("batch",)),
        ((4, 6), ("batch", 2)),
        ((6, 4), ("rows", (4, 3))),
        ((6, 4), ("rows", (6, 0))),
        ((6, 4), ("rows", (8, -2))),
        ((77, 4), ("rows", (75.0, 2.0))),
        ((77, 4), ("rows", (76, True))),
        ((6, 4), ("rows",)),
        ((6, 4), ("rows", 6)),
        ((6, 4), ("rows", ())),
        ((6,), ("rows", (6,))),
        ((6, 4), ("cols", (3, 3))),
        ((6, 4), ("heads", 4)),
        ((6, 4), ("heads", 0)),
        ((6, 4), ("heads", 2, (1, 1))),
        ((6, 4), ("heads", (2,))),
        ((6, 4), ("heads", 2, (3,), 1)),
        ((6, 4), ("interleaved", 2)),
        ((6, 4), ("interleaved", 2, (1, 1))),
        ((6, 4), ("interleaved", 4, (1, 1))),
        ((6, 4), ("interleaved_cols", 3)),
        ((6, 4), ("interleaved_cols", 2, (1, 1))),
        ((6, 4), ("interleaved_cols", 0)),
        ((5, 2, 3), ("flatten", 2)),
        ((6,), ("flatten", 2)),
        ((4, 6), ("columns", (3, 3))),
        ((4, 6), ()),
        ((4, 6), None),
        ((4, 6), ("rows", {4})),
    ],
)
def test_a_split_that_does_not_fit_is_an_error(shape: tuple[int, ...], spec: Any) -> None:
    with pytest.raises(ConfigError, match="w of shape .* cannot be divided into logical matrices by"):
        logical_matrices(shape, spec, "w")


def test_a_refusal_is_not_remembered_for_what_equals_it() -> None:
    with pytest.raises(ConfigError):
        logical_matrices((78, 4), ("heads", 2.0))
    assert len(logical_matrices((78, 4), ("heads", 2))) == 2
