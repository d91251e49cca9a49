"""The static plan of one Muon group: which matrices lie in which batch, and what every message holds.

Made at construction from shapes and layouts alone, never from values: every rank of a shard group sends and receives
the same messages whatever gradients it has. A matrix that this rank holds whole is local: it goes into a batch with
others of its shape. Of a matrix that is spread over ranks every holder sends its pieces to the owner (`ownership`),
and gets the same pieces of the update back: messages are mirror images of each other.

Legend: B matrices of a batch, S = min(rows, cols), L = max(rows, cols); tall matrices lie in a batch transposed.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from earthshine.device import resolve_ns_dtype
from earthshine.ops.orthogonalize import matrices_per_batch, resolve_method
from earthshine.optim.logical_matrices import logical_matrices
from earthshine.optim.sharding.exchange import check_agreement, send_order
from earthshine.optim.sharding.local_shards import LocalShards
from earthshine.optim.sharding.ownership import Bucket, ShardGroupPlan, Task, plan_ownership
from earthshine.optim.sharding.pieces import Piece

# Entries of a group that processes may hold differently, or that say nothing about the plan.
_NOT_COMPARED = ("params", "param_names", "lr", "initial_lr")


@dataclass(frozen=True)
class Batch:
    """Matrices that are orthogonalized together: (rows, cols) per slot, all with the same S and L.

    sources: the pieces that fill it, each from its slot on.
    """

    shapes: tuple[tuple[int, int], ...]
    sources: tuple[tuple[Piece, int], ...]

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


@dataclass(frozen=True)
class Transfer:
    """One bucket as this rank sees it. Messages are mirror images: what went out comes back in the same order.

    outgoing, incoming: pieces in the order in which they lie in a message, nothing between them.
    sends, receives: elements per position of the shard group; with `stats_`, the fp32 statistics beside the pieces.
    owned: the batches of what arrives, each with the indices of its pieces in `incoming`.
    """

    shard_group: ShardGroupPlan
    outgoing: tuple[Piece, ...]
    incoming: tuple[Piece, ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    stats_sends: tuple[int, ...]
    stats_receives: tuple[int, ...]
    owned: tuple[tuple[Batch, tuple[int, ...]], ...]


class MatrixPlan:
    """The plan of one "muon" group. Raises ConfigError for layouts and options that it cannot serve."""

    def __init__(self, group: Mapping[str, Any], shards: LocalShards, max_bucket_bytes: int) -> None:
        self.shards = shards
        self.device = shards.params[0].device if shards.params else torch.device("cpu")
        self.ns_dtype = resolve_ns_dtype(group["ns_dtype"], self.device)
        self.acc_dtype = functools.reduce(torch.promote_types, (p.dtype for p in shards.params), torch.float32)
        self.comm_dtype = self._comm_dtype(group["comm_dtype"])
        self.skip_idle, self.normuon = bool(group["skip_idle"]), group["normuon_beta2"] > 0
        self._form, self._table, self._steps = group["ns_form"], group["ns_coefficients"], group["ns_steps"]
        self._costs: dict[tuple[int, int], int] = {}
        matrices = [
            logical_matrices(tuple(p.shape), spec, name)
            for p, spec, name in zip(shards.params, group["matrices"], shards.names, strict=True)
        ]
        layouts = [shards.layout(i) for i in range(len(matrices))]
        self.shard_groups = plan_ownership(layouts, matrices, self.cost, max_bucket_bytes, self.acc_dtype.itemsize)
        dtypes = (self.ns_dtype, self.acc_dtype, self.comm_dtype)  # ns_dtype="auto" is a measurement on a CPU
        options = repr([dtypes, *((key, group[key]) for key in sorted(group) if key not in _NOT_COMPARED)])
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
        """Whole matrices in batches; neighbors in one local shard become one piece."""
        for tasks in self._in_batches([task for task in plan.local if task.M and task.N]):
            sources: list[tuple[Piece, int]] = []
            for slot, task in enumerate(tasks):
                for piece in plan.pieces(task, plan.position):
                    if not sources or not _extend(sources, piece, slot):
                        sources.append((piece, slot))
            yield Batch(tuple((task.M, task.N) for task in tasks), tuple(sources))

    def _transfer(self, plan: ShardGroupPlan, bucket: Bucket) -> Transfer:
        position, order = plan.position, send_order(plan.ranks)
        by_owner: dict[int, list[Task]] = {k: [] for k in order}
        for task in bucket.tasks:
            by_owner[task.owner].append(task)
        owned = by_owner[position]
        outgoing: list[Piece] = []
        incoming: list[Piece] = []
        indices: dict[Task, list[int]] = {task: [] for task in owned}  # of a task's pieces in `incoming`
        sends, receives, stats_sends, stats_receives = ([0] * len(order) for _ in range(4))
        for k in order:
            leaving = [piece for task in by_owner[k] for piece in plan.pieces(task, position)]
            outgoing += leaving
            sends[k], stats_sends[k] = sum(p.numel for p in leaving), sum(map(self.num_stats, leaving))
            start = len(incoming)
            for task in owned:
                for piece in plan.pieces(task, k):
                    indices[task].append(len(incoming))
                    incoming.append(piece)
            arriving = incoming[start:]
            receives[k], stats_receives[k] = sum(p.numel for p in arriving), sum(map(self.num_stats, arriving))
        batches = []
        for tasks in self._in_batches(owned):
            members = [(slot, n) for slot, task in enumerate(tasks) for n in indices[task]]
            sources = tuple((incoming[n], slot) for slot, n in members)
            shapes = tuple((task.M, task.N) for task in tasks)
            batches.append((Batch(shapes, sources), tuple(n for _, n in members)))
        return Transfer(
            plan,
            tuple(outgoing),
            tuple(incoming),
            tuple(sends),
            tuple(receives),
            tuple(stats_sends),
            tuple(stats_receives),
            tuple(batches),
        )

    def _in_batches(self, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
        """Tasks of one (S, L) together, cut to fit the cache."""
        by_size: dict[tuple[int, int], list[Task]] = {}
        for task in tasks:
            by_size.setdefault((min(task.M, task.N), max(task.M, task.N)), []).append(task)
        for (S, L), members in by_size.items():
            capacity = matrices_per_batch(S, L, self.ns_dtype, self.device)
            for start in range(0, len(members), capacity):
                yield members[start : start + capacity]

    def num_stats(self, piece: Piece) -> int:
        """fp32 numbers beside a piece: whether its gradient is anything but zero; NorMuon's moment per row."""
        return int(self.skip_idle) + piece.size[0] * int(self.normuon)


def _extend(sources: list[tuple[Piece, int]], piece: Piece, slot: int) -> bool:
    """Whether a whole matrix follows the last one in the same local shard and batch: then it is made a part of it."""
    last, first_slot = sources[-1]
    row = last.local[0] + last.count * last.size[0]
    follows = replace(last, local=(row, last.local[1]), count=1) == piece and first_slot + last.count == slot
    if not follows or piece.size != piece.matrix:
        return False
    sources[-1] = replace(last, count=last.count + 1), first_slot
    return True
