"""ZeRO-1: where rows are cut, what each rank keeps of them, and how its state is saved and comes back."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_ranks import as_rank, numbered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from earthshine.errors import ConfigError
from earthshine.optim.ranges import length, merge
from earthshine.optim.sharding.layout import Layout, to_local
from earthshine.optim.sharding.zero1 import Zero1Shards, partition_rows


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


# ------------------------------------------------------------------------------------------------ what each rank keeps

SHAPES: list[tuple[int, ...]] = [(5, 4), (7,), (3, 2, 3), ()]


def shards_of(params: Sequence[Tensor], reduce: bool = False) -> Zero1Shards:
    specs = [("matrix",) if p.ndim == 2 else ("batch",) if p.ndim == 3 else () for p in params]
    return Zero1Shards(params, specs, [f"p{i}" for i in range(len(params))], dist.group.WORLD, reduce, 1 << 20)


def test_the_ranks_keep_every_row_once_and_a_scalar_each() -> None:
    params = [numbered(*shape) for shape in SHAPES]
    parts: list[list[Tensor]] = []
    for rank in range(3):
        with as_rank(rank, 3):
            shards = shards_of(params)
            assert shards.layout(0).ranks == (0, 1, 2)
            parts.append([shards.weight(i) for i in range(4)])
            for i in range(3):
                assert shards.new_state(i, torch.float32).shape == parts[-1][i].shape
                assert shards.weight(i).untyped_storage().data_ptr() == params[i].untyped_storage().data_ptr()
            rows = shards.new_state(2, torch.float32, per_row=True)
            assert rows.numel() * 3 == parts[-1][2].numel()
            assert shards.view2d(2, rows, per_row=True).shape == (rows.numel(), 1)
            assert shards.state_shape(2, per_row=True) == (3, 2, 1)
    for i, whole in enumerate(params[:3]):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole.flatten())
    assert all(torch.equal(part[3], params[3]) for part in parts)


def test_rows_that_do_not_lie_in_order_are_refused() -> None:
    with as_rank(0, 2), pytest.raises(ConfigError, match="p0 is not contiguous"):
        shards_of([torch.zeros(4, 6).T])


def by_all_to_all(world: int, work: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `work` returns as each rank: once to see what all of them send, and once more to receive it."""
    sent: dict[int, tuple[Tensor, ...]] = {}

    def all_to_all(arrived: Tensor, buffer: Tensor, receives: list[int], sends: list[int], group: Any) -> None:
        sent[dist.get_rank()] = buffer.split(sends)
        if len(sent) == world:
            parts = [sent[k][dist.get_rank()] for k in range(world)]
            assert [len(part) for part in parts] == receives
            arrived.copy_(torch.cat(parts))

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    results: list[Any] = []
    for rank in (*range(world), *range(world)):
        with as_rank(rank, world):
            results.append(work(rank))
    return results[world:]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("per_row", [False, True])
def test_state_is_saved_by_rows_of_dimension_0_and_comes_back(
    world: int, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [shape for shape in SHAPES if len(shape) > 1 or not per_row]
    params = [numbered(*shape) for shape in shapes]

    def make() -> tuple[Zero1Shards, dict[int, Tensor], dict[int, Tensor]]:
        """Numbered state, whole, and this rank's shards of it."""
        shards = shards_of(params)
        whole = {i: numbered(*shards.state_shape(i, per_row)) + 100 * i for i in range(len(shapes))}
        local = {}
        for i, state in whole.items():
            layout = shards.layout(i)
            rows = [r for start, stop in layout.rows[layout.position] for r in range(start, stop)]
            local[i] = state.reshape(layout.view[0], -1)[rows].flatten() if state.ndim else state
        return shards, whole, local

    def save(rank: int) -> dict[int, Tensor]:
        shards, whole, local = make()
        saved = shards.to_dtensor(local, per_row)
        for i, t in saved.items():
            assert t.shape == whole[i].shape
            assert shards.state_fits(i, local[i], t)
        return {i: to_local(t) for i, t in saved.items()}

    def load(rank: int) -> None:
        shards, whole, local = make()
        for i, t in whole.items():
            if t.ndim:
                assert torch.equal(torch.cat([part[i] for part in saved]), t)
                assert len(saved[rank][i]) == max(0, min(len(t) - rank * -(-len(t) // world), -(-len(t) // world)))
        mesh = init_device_mesh("cpu", (world,))
        placed: dict[int, Tensor] = {
            i: DTensor.from_local(saved[rank][i], mesh, [Shard(0)], run_check=False, shape=t.shape, stride=t.stride())
            if t.ndim
            else t
            for i, t in whole.items()
        }
        loaded.append((shards.from_dtensor(placed, per_row), local))
        # A checkpoint of one process has whole tensors.
        assert all(torch.equal(t, local[i]) for i, t in shards.from_dtensor(whole, per_row).items())

    saved = by_all_to_all(world, save, monkeypatch)
    loaded: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []
    by_all_to_all(world, load, monkeypatch)
    for got, local in loaded[world:]:
        assert all(torch.equal(got[i], local[i]) for i in local)
