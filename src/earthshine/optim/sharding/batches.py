"""The static plan of one Muon group: which matrices lie in which batch, and what every message holds.

Made at construction from shapes and layouts alone, never from values: every rank of a shard group sends and receives
the same messages whatever gradients it has. A matrix that is whole here is local: it goes into a batch with others of
its shape. Of a matrix that is spread over ranks every holder sends its blocks to the owner (`ownership`), and
gets the same blocks of the update back: messages are mirror images of each other.

Legend: B matrices of a batch, S = min(rows, cols), L = max(rows, cols); tall matrices lie in a batch transposed.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from earthshine.device import resolve_ns_dtype
from earthshine.ops.orthogonalize import matrices_per_batch, resolve_method
from earthshine.optim.logical_matrices import logical_matrices
from earthshine.optim.rounding import Noise
from earthshine.optim.sharding.exchange import check_agreement, send_order
from earthshine.optim.sharding.local_shards import LocalShards
from earthshine.optim.sharding.ownership import Block, Bucket, ShardGroupPlan, Task, plan_ownership

# Entries of a group that processes may hold differently, or that say nothing about the plan.
_NOT_COMPARED = ("params", "param_names", "lr", "initial_lr")


@dataclass(frozen=True)
class Rect:
    """`count` rectangles, one below the other, of rows x cols in the 2-D view of a parameter's local shard.

    step: from each of their columns to the next.
    """

    param: int
    row: int
    col: int
    rows: int
    cols: int
    count: int = 1
    step: int = 1

    def of(self, views: Mapping[int, Tensor]) -> Tensor:
        """[count, rows, cols], the same memory."""
        view, height = views[self.param], self.count * self.rows
        if view.shape != (height, self.cols):
            stop = self.col + (self.cols - 1) * self.step + 1
            view = view[self.row : self.row + height, self.col : stop : self.step]
        return view.view(self.count, self.rows, self.cols)

    def noise(self, noises: Mapping[int, Noise]) -> Noise | None:
        """How these elements of a weight are rounded; None where that is to nearest."""
        noise = noises.get(self.param)
        return noise and noise.part(self.row, self.col, self.count * self.rows, self.cols)

    def rows_of(self, views: Mapping[int, Tensor]) -> Tensor:
        """[count, rows] of a view with one value per row."""
        return views[self.param].narrow(0, self.row, self.count * self.rows).view(self.count, self.rows)


@dataclass(frozen=True)
class Place:
    """Where rectangles belong in a batch: from matrix `slot` on, at this row and column of the matrix as it is."""

    slot: int
    row: int
    col: int


@dataclass(frozen=True)
class Batch:
    """Matrices that are orthogonalized together: (rows, cols) per slot, all with the same S and L.

    sources: what fills it, rectangles of local shards, or segments of a message.
    """

    shapes: tuple[tuple[int, int], ...]
    sources: tuple[tuple[Any, Place], ...]

    @property
    def size(self) -> tuple[int, int, int]:
        rows, cols = self.shapes[0]
        return len(self.shapes), min(rows, cols), max(rows, cols)

    def by_shape(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """The slots of each run of matrices of one (rows, cols): all of them tall, or all wide."""
        first = 0
        for shape, members in itertools.groupby(self.shapes):
            last = first + len(list(members))
            yield slice(first, last), shape
            first = last

    def part(self, X_BSL: Tensor, place: Place, count: int, rows: int, cols: int) -> Tensor:
        """The rectangles at a place as [count, rows, cols], the same memory."""
        M, N = self.shapes[place.slot]
        part = X_BSL.narrow(0, place.slot, count)
        part = part.mT if M > N else part
        if (rows, cols) == (M, N):
            return part
        return part.narrow(1, place.row, rows).narrow(2, place.col, cols)


@dataclass(frozen=True)
class Segment:
    """A rectangle of a matrix of this shape in a message, from element `offset` on; its statistics in theirs."""

    offset: int
    stats_offset: int
    rows: int
    cols: int
    shape: tuple[int, int]

    def of(self, message: Tensor) -> Tensor:
        """[1, rows, cols], the same memory."""
        return message.narrow(0, self.offset, self.rows * self.cols).view(1, self.rows, self.cols)


@dataclass(frozen=True)
class Transfer:
    """One bucket as this rank sees it. Messages are mirror images: what went out comes back in the same order."""

    shard_group: ShardGroupPlan
    outgoing: tuple[tuple[Rect, Segment], ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    stats_sends: tuple[int, ...]
    stats_receives: tuple[int, ...]
    owned: tuple[Batch, ...]


class MatrixPlan:
    """The plan of one "muon" group. Raises ConfigError for layouts and options that it cannot serve."""

    def __init__(self, group: Mapping[str, Any], shards: LocalShards, max_bucket_bytes: int) -> None:
        self.shards = shards
        self.device = shards.params[0].device if shards.params else torch.device("cpu")
        self.ns_dtype = resolve_ns_dtype(group["ns_dtype"], self.device)
        self.acc_dtype = functools.reduce(torch.promote_types, (p.dtype for p in shards.params), torch.float32)
        self.comm_dtype = self._comm_dtype(group["comm_dtype"])
        self.flags, self.moments = bool(group["skip_idle"]), group["normuon_beta2"] > 0
        self._form, self._table, self._steps = group["ns_form"], group["ns_coefficients"], group["ns_steps"]
        self._costs: dict[tuple[int, int], int] = {}
        matrices = [
            logical_matrices(tuple(p.shape), spec, name)
            for p, spec, name in zip(shards.params, group["matrices"], shards.names, strict=True)
        ]
        layouts = [shards.layout(i) for i in range(len(matrices))]
        self.shard_groups = plan_ownership(layouts, matrices, self.cost, max_bucket_bytes, self.acc_dtype.itemsize)
        types = (self.ns_dtype, self.acc_dtype, self.comm_dtype)  # ns_dtype="auto" is a measurement on a CPU
        options = repr([types, *((key, group[key]) for key in sorted(group) if key not in _NOT_COMPARED)])
        for plan in self.shard_groups:
            if len(plan.ranks) > 1:
                check_agreement(plan.ranks, plan.fingerprint() + options, self.device)
        self.local = tuple(batch for plan in self.shard_groups for batch in self._local_batches(plan))
        self.transfers = tuple(self._transfer(plan, bucket) for plan in self.shard_groups for bucket in plan.buckets)

    def _comm_dtype(self, requested: str) -> torch.dtype:
        """What travels: by default no less than Newton-Schulz itself works in."""
        if requested == "auto":
            return self.acc_dtype if self.ns_dtype.itemsize >= 4 else torch.bfloat16
        return torch.bfloat16 if requested == "bfloat16" else self.acc_dtype

    def cost(self, rows: int, cols: int) -> int:
        """Operations of Newton-Schulz on one matrix."""
        if (rows, cols) not in self._costs:
            self._costs[rows, cols] = self._count(rows, cols)
        return self._costs[rows, cols]

    def _count(self, rows: int, cols: int) -> int:
        method = resolve_method(self._form, rows, cols, self.ns_dtype, self.device, self._table, self._steps)
        return method.flops(rows, cols)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean, of the worst shard group."""
        return max((plan.imbalance for plan in self.shard_groups if len(plan.ranks) > 1), default=1.0)

    def _local_batches(self, plan: ShardGroupPlan) -> Iterator[Batch]:
        """Whole matrices by (S, L), cut to fit the cache; neighbors in one local shard become one rectangle."""
        by_shape: dict[tuple[int, int], list[tuple[Task, tuple[Any, ...]]]] = {}
        for task in plan.local:
            key = (min(task.M, task.N), max(task.M, task.N))
            if key[0]:
                by_shape.setdefault(key, []).append((task, plan.pieces(task, plan.position)))
        for (S, L), tasks in by_shape.items():
            capacity = matrices_per_batch(S, L, self.ns_dtype, self.device)
            for start in range(0, len(tasks), capacity):
                yield _batch(tasks[start : start + capacity])

    def _transfer(self, plan: ShardGroupPlan, bucket: Bucket) -> Transfer:
        me, order = plan.position, send_order(plan.ranks)
        outgoing: list[tuple[Rect, Segment]] = []
        sends, stats_sends = [0] * len(order), [0] * len(order)
        at = stats_at = 0
        by_owner: dict[int, list[Task]] = {}
        for task in bucket.tasks:
            by_owner.setdefault(task.owner, []).append(task)
        for k in order:
            for task in by_owner.get(k, ()):
                for b in plan.pieces(task, me):
                    rect = Rect(task.param, b.local_row, b.local_col, b.rows, b.cols, step=b.step)
                    outgoing.append((rect, Segment(at, stats_at, b.rows, b.cols, (task.M, task.N))))
                    at, stats_at = at + b.rows * b.cols, stats_at + self._num_stats(b.rows)
                    sends[k] += b.rows * b.cols
                    stats_sends[k] += self._num_stats(b.rows)
        mine = by_owner.get(me, [])
        receives, stats_receives = [0] * len(order), [0] * len(order)
        segments: dict[int, list[tuple[Segment, int, int]]] = {n: [] for n in range(len(mine))}
        at = stats_at = 0
        for k in order:
            for n, task in enumerate(mine):
                for b in plan.pieces(task, k):
                    segments[n].append((Segment(at, stats_at, b.rows, b.cols, (task.M, task.N)), b.row, b.col))
                    at, stats_at = at + b.rows * b.cols, stats_at + self._num_stats(b.rows)
                    receives[k] += b.rows * b.cols
                    stats_receives[k] += self._num_stats(b.rows)
        owned = tuple(self._owned_batches(mine, segments))
        return Transfer(
            plan, tuple(outgoing), tuple(sends), tuple(receives), tuple(stats_sends), tuple(stats_receives), owned
        )

    def _owned_batches(
        self, tasks: Sequence[Task], segments: Mapping[int, list[tuple[Segment, int, int]]]
    ) -> Iterator[Batch]:
        by_shape: dict[tuple[int, int], list[int]] = {}
        for n, task in enumerate(tasks):
            by_shape.setdefault((min(task.M, task.N), max(task.M, task.N)), []).append(n)
        for (S, L), members in by_shape.items():
            capacity = matrices_per_batch(S, L, self.ns_dtype, self.device)
            for start in range(0, len(members), capacity):
                part = members[start : start + capacity]
                shapes = tuple((tasks[n].M, tasks[n].N) for n in part)
                sources = tuple(
                    (segment, Place(slot, row, col)) for slot, n in enumerate(part) for segment, row, col in segments[n]
                )
                yield Batch(shapes, sources)

    def _num_stats(self, rows: int) -> int:
        """fp32 numbers that accompany a block: whether its gradient is anything but zero; NorMuon's moment per row."""
        return int(self.flags) + rows * int(self.moments)


def _batch(tasks: Sequence[tuple[Task, Sequence[Block]]]) -> Batch:
    """Whole matrices of one (S, L); those that lie below each other in one local shard are one rectangle."""
    shapes = tuple((task.M, task.N) for task, _ in tasks)
    sources: list[tuple[Rect, Place]] = []
    for slot, (task, found) in enumerate(tasks):
        for b in found:
            rect = Rect(task.param, b.local_row, b.local_col, b.rows, b.cols, step=b.step)
            last, place = sources[-1] if sources else (None, None)
            if last is not None and place is not None and (b.rows, b.cols) == (task.M, task.N):
                follows = last.row + last.count * last.rows == rect.row and place.slot + last.count == slot
                alike = replace(rect, row=last.row, count=last.count) == last and (place.row, place.col) == (0, 0)
                if follows and alike:
                    sources[-1] = (replace(last, count=last.count + 1), place)
                    continue
            sources.append((rect, Place(slot, b.row, b.col)))
    return Batch(shapes, tuple(sources))
