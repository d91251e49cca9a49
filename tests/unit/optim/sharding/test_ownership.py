"""Who orthogonalizes what, without processes: matrices arrive whole and go back to where they came from, exactly the
planned elements travel, and all ranks of a shard group plan the same."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec, logical_matrices, view_shape
from earthshine.optim.ranges import Ranges
from earthshine.optim.sharding.layout import Layout, _spread
from earthshine.optim.sharding.ownership import ShardGroupPlan, plan_ownership
from earthshine.optim.sharding.pieces import Piece
from earthshine.optim.sharding.zero1 import partition_rows

Cuts = tuple[tuple[int, int, int], ...]  # degree, dimension, split of each sharded mesh dimension
Parameter = tuple[tuple[int, ...], Spec, Cuts]


def cube(rows: int, cols: int) -> int:
    return rows * cols * min(rows, cols)


def layout_of(parameter: Parameter, ranks: tuple[int, ...], position: int) -> Layout:
    shape, spec, cuts = parameter
    rows, cols, _ = _spread(shape, spec[0] == "flatten", cuts)
    return Layout(view_shape(shape, spec), ranks, position, rows, cols)


def plans_of(
    parameters: Sequence[Parameter], ranks: tuple[int, ...], bucket_bytes: int = 1 << 20
) -> list[ShardGroupPlan]:
    """Every position's plan of parameters that are all spread over these ranks."""
    matrices = [logical_matrices(shape, spec) for shape, spec, _ in parameters]
    plans = []
    for position in range(len(ranks)):
        layouts = [layout_of(p, ranks, position) for p in parameters]
        (plan,) = plan_ownership(layouts, matrices, cube, bucket_bytes)
        plans.append(plan)
    return plans


def indices(ranges: Ranges) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


def local(whole: Tensor, layout: Layout, position: int) -> Tensor:
    """The two-dimensional local tensor of a position."""
    return whole.reshape(layout.view)[indices(layout.rows[position])][:, indices(layout.cols[position])]


def within(piece: Piece) -> tuple[slice, slice]:
    """Where a piece is in the local tensor."""
    (row, col), (rows, cols), step = piece.local, piece.size, piece.step
    return slice(row, row + rows), slice(col, col + cols * step, step)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Parameter], int]:
    """Parameters spread over one mesh of up to three dimensions, each in its own way, and the size of the mesh."""
    degrees = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    specs = {
        ("matrix",): (7, 5),
        ("rows", (2, 4)): (3, 6, 4),
        ("cols", (3, 1)): (2, 3, 4),
        ("heads", 2, (1, 2)): (6, 4),
        ("interleaved", 3, (2, 1)): (9, 4),
        ("batch",): (5, 3, 2),
        ("flatten", 2): (6, 2, 3),
        ("interleaved_cols", 3): (3, 4, 12),
    }
    parameters = []
    for spec in draw(st.lists(st.sampled_from(list(specs)), min_size=1, max_size=5)):
        shape = specs[spec]
        cuts = tuple(
            (degree, draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([1, 1, 2]))) for degree in degrees
        )
        parameters.append((shape, spec, cuts))
    size = 1
    for degree in degrees:
        size *= degree
    return parameters, size


@given(groups(), st.sampled_from([1, 150, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_matrices_travel_whole_and_return_and_the_counts_are_what_travels(
    group: tuple[list[Parameter], int], bucket_bytes: int
) -> None:
    parameters, size = group
    ranks = tuple(range(3, 3 + size))
    plans = plans_of(parameters, ranks, bucket_bytes)
    whole = [torch.arange(float(torch.Size(shape).numel())).view(shape) for shape, _, _ in parameters]
    layouts = [layout_of(p, ranks, 0) for p in parameters]
    matrices = [logical_matrices(shape, spec) for shape, spec, _ in parameters]
    back = [[torch.full_like(local(w, m, i), -1) for i in range(size)] for w, m in zip(whole, layouts, strict=True)]

    assert len({plan.fingerprint() for plan in plans}) == 1
    assert all(plan.buckets == plans[0].buckets and plan.loads == plans[0].loads for plan in plans)
    seen: list[tuple[int, int]] = []
    loads = [0] * size
    for task in (task for plan in plans for task in plan.local):
        assert task.holders == (task.owner,)
        seen.append((task.param, task.index))
        loads[task.owner] += task.cost
        for block in plans[0].pieces(task, task.owner):
            here = within(block)
            back[task.param][task.owner][here] = local(whole[task.param], layouts[task.param], task.owner)[here]
    for bucket in plans[0].buckets:
        held = [0] * size
        for task in bucket.tasks:
            seen.append((task.param, task.index))
            loads[task.owner] += task.cost
            held[task.owner] += task.M * task.N * 4
            assert len(task.holders) > 1
            full = torch.full((task.M, task.N), -1.0)
            for position in task.holders:
                mine = local(whole[task.param], layouts[task.param], position)
                pieces = plans[0].pieces(task, position)
                assert sum(b.numel for b in pieces) > 0
                assert [b.in_matrix for b in pieces] == sorted(b.in_matrix for b in pieces)
                for b in pieces:
                    here = within(b)
                    there = tuple(slice(at, at + n) for at, n in zip(b.in_matrix, b.size, strict=True))
                    assert (full[there] == -1).all()  # nobody else sent it
                    full[there] = mine[here]
                    back[task.param][position][here] = mine[here]
            matrix = matrices[task.param][task.index]
            view = whole[task.param].reshape(layouts[task.param].view)
            assert torch.equal(full, view[indices(matrix.rows)][:, slice(*matrix.cols, matrix.step)])
        for position in range(size):
            single = [t.M * t.N * 4 for t in bucket.tasks if t.owner == position]
            assert held[position] <= bucket_bytes or len(single) == 1
    assert sorted(seen) == [(p, i) for p, of in enumerate(matrices) for i in range(len(of))]
    assert plans[0].loads == tuple(loads)
    for param, layout in enumerate(layouts):
        assert all(torch.equal(back[param][i], local(whole[param], layout, i)) for i in range(size))


def elements_sent(plan: ShardGroupPlan, position: int) -> int:
    """Elements that leave a position in a step, out and back; what it keeps is not counted."""
    total = 0
    for task in (task for bucket in plan.buckets for task in bucket.tasks):
        held = sum(b.numel for b in plan.pieces(task, position))
        total += task.M * task.N - held if task.owner == position else held
    return total


@pytest.mark.parametrize("parts", [2, 4])
def test_fsdp_traffic_keeps_its_bound(parts: int) -> None:
    """Equal matrices over their rows: each rank sends P (N-1)/N^2 elements out and as many back."""
    parameters: list[Parameter] = [((8, 6), ("matrix",), ((parts, 0, 1),))] * 8
    plan = plans_of(parameters, tuple(range(parts)))[0]
    elements = 8 * 48
    assert {elements_sent(plan, i) for i in range(parts)} == {2 * elements * (parts - 1) // parts**2}
    assert plan.imbalance == 1


def test_what_one_position_holds_is_its_own_and_counts_as_its_load() -> None:
    """Five experts on two ranks, three and two: the matrix that is spread goes to the second."""
    parameters: list[Parameter] = [
        ((5, 4, 4), ("batch",), ((2, 0, 1),)),
        ((4, 4), ("matrix",), ((2, 0, 1),)),
    ]
    first, second = plans_of(parameters, (4, 6))
    assert [(t.param, t.index) for t in first.local] == [(0, 0), (0, 1), (0, 2)]
    assert [(t.param, t.index) for t in second.local] == [(0, 3), (0, 4)]
    (task,) = first.buckets[0].tasks
    assert (task.param, task.owner, task.holders, task.cost) == (1, 1, (0, 1), 64)
    assert first.loads == (192, 192)
    assert (elements_sent(first, 0), elements_sent(first, 1)) == (8, 8)


def test_the_costliest_first_to_the_least_loaded() -> None:
    shapes = [(2, 2), (6, 6), (4, 4), (2, 4), (4, 4), (4, 2)]
    plan = plans_of([(shape, ("matrix",), ((2, 0, 1),)) for shape in shapes], (0, 1))[0]
    tasks = [(t.param, t.owner) for t in plan.buckets[0].tasks]
    # costs 216 | 64 64 | 16 16 (one shape, both ways round) | 8: all the rest is less than the first
    assert tasks == [(1, 0), (2, 1), (4, 1), (3, 1), (5, 1), (0, 1)]
    assert plan.loads == (216, 168)
    assert plan.imbalance == 216 / 192


def test_among_equal_loads_the_one_that_owns_the_fewest_elements() -> None:
    """It sends the least back."""
    shapes = [(2, 8), (4, 3), (4, 4)]
    layouts = [layout_of((shape, ("matrix",), ((2, 0, 1),)), (0, 1), 0) for shape in shapes]
    matrices = [logical_matrices(shape, ("matrix",)) for shape in shapes]
    (plan,) = plan_ownership(layouts, matrices, lambda M, N: 1, 1 << 20)
    assert [(t.M * t.N, t.owner) for t in plan.buckets[0].tasks] == [(16, 0), (12, 1), (16, 1)]


def test_among_equals_the_one_that_holds_most() -> None:
    """A cut row of ZeRO-1 does not travel to a third rank."""
    views = [(4, 4), (4, 4)]
    layouts = partition_rows(views, (0, 1, 2), 0)  # 8 rows: 3, 2 (one and one), 3
    matrices = [logical_matrices(view, ("matrix",)) for view in views]
    (plan,) = plan_ownership(layouts, matrices, cube, 1 << 20)
    assert [(t.owner, t.holders) for t in plan.buckets[0].tasks] == [(0, (0, 1)), (2, (1, 2))]
    assert [elements_sent(plan, i) for i in range(3)] == [4, 8, 4]


def test_buckets_bound_what_an_owner_holds() -> None:
    parameters: list[Parameter] = [((4, 4), ("matrix",), ((2, 0, 1),))] * 6 + [((8, 8), ("matrix",), ((2, 0, 1),))]
    plan = plans_of(parameters, (0, 1), bucket_bytes=2 * 16 * 4)[0]
    held = [[t.param for t in b.tasks if t.owner == o] for b in plan.buckets for o in (0, 1)]
    assert held == [[6], [0, 1], [], [2, 3], [], [4, 5]]  # the large one alone: it is over the bound by itself


def test_one_plan_per_shard_group_in_the_order_of_its_ranks() -> None:
    """Experts over all ranks, dense matrices over half of them, norms' kind of parameter on this rank alone."""
    matrix: Parameter = ((4, 4), ("matrix",), ((2, 0, 1),))
    stack: Parameter = ((4, 4, 4), ("batch",), ((4, 0, 1),))
    layouts = [
        layout_of(matrix, (1, 3), 1),
        layout_of(stack, (0, 1, 2, 3), 3),
        layout_of(matrix, (1, 3), 1),
        layout_of(((4, 4), ("matrix",), ()), (3,), 0),
    ]
    matrices = [logical_matrices((4, 4), ("matrix",))] * 4
    matrices[1] = logical_matrices((4, 4, 4), ("batch",))
    plans = plan_ownership(layouts, matrices, cube, 1 << 20)
    assert [(p.ranks, p.position, len(p.local), len(p.buckets)) for p in plans] == [
        ((0, 1, 2, 3), 3, 1, 0),
        ((1, 3), 1, 0, 1),
        ((3,), 0, 1, 0),
    ]
    assert [t.owner for t in plans[1].buckets[0].tasks] == [0, 1]
    with pytest.raises(ConfigError, match="4 layouts for the matrices of 3 parameters"):
        plan_ownership(layouts, matrices[:3], cube, 1 << 20)
    assert plan_ownership([], [], cube, 1 << 20) == []


def test_the_fingerprint_sees_every_difference() -> None:
    parameters: list[Parameter] = [((4, 4), ("matrix",), ((2, 0, 1),))] * 4
    plan = plans_of(parameters, (0, 1))[0]
    task = plan.buckets[0].tasks[0]
    other = replace(plan.buckets[0], tasks=(replace(task, owner=1 - task.owner), *plan.buckets[0].tasks[1:]))
    prints = {
        p.fingerprint()
        for p in [
            plan,
            replace(plan, buckets=(other,)),
            replace(plan, loads=(1, 2)),
            *plans_of(parameters, (0, 2))[:1],
            *plans_of(parameters, (0, 1), bucket_bytes=1)[:1],
            *plans_of(parameters[:3], (0, 1))[:1],
        ]
    }
    assert len(prints) == 6


def test_a_thousand_ranks() -> None:
    """A plan takes a second or two here, and no rank works out what the others hold piece by piece."""
    ranks = tuple(range(1024))
    dense: Parameter = ((1024, 64), ("matrix",), ((16, 0, 64), (64, 0, 1)))
    experts: Parameter = ((64, 32, 64), ("batch",), ((16, 1, 1), (64, 0, 1)))
    parameters = [dense, experts] * 16
    matrices = [logical_matrices(shape, spec) for shape, spec, _ in parameters]
    layouts = [layout_of(p, ranks, 5) for p in parameters]
    (plan,) = plan_ownership(layouts, matrices, cube, 1 << 20)
    tasks = [t for b in plan.buckets for t in b.tasks]
    # 16 ranks hold a dense matrix each; the 16 * 64 experts go one each to the others, and the last 16 to whom is next.
    assert len(tasks) == 16 * 65
    owned = [sum(1 for _ in same) for _, same in itertools.groupby(sorted(t.owner for t in tasks))]
    assert len(owned) == 1024 and max(owned) == 2
    assert not plan._pieces
