"""Who orthogonalizes which logical matrix, and what travels for it. Pure: no tensors, no processes.

A matrix that one process holds whole is that process's own, without traffic. Every other matrix has one owner in its
shard group: in the outward exchange each holder sends the owner what it holds, the owner orthogonalizes, and on the
way back the same pieces travel the other way. Exchanges are cut into buckets that bound the owners' memory. Every
process computes the same plan from the same layouts; `ShardGroupPlan.fingerprint` is there to make sure.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import LogicalMatrix
from earthshine.optim.ranges import Ranges
from earthshine.optim.sharding.layout import Layout
from earthshine.optim.sharding.pieces import Piece, num_common, pieces_of


@dataclass(frozen=True)
class Task:
    """One logical matrix, [M, N]: number `index` of the group's parameter number `param`.

    cost: of its Newton-Schulz, in FLOPs. owner: the position in the shard group of who does it. holders: the positions
    that hold some of it, ascending.
    """

    param: int
    index: int
    M: int
    N: int
    cost: int
    owner: int
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """The tasks of all owners that travel in one exchange; the same on every process of the shard group."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class ShardGroupPlan:
    """What one shard group does in a step, seen from one of its processes.

    ranks, position: of the shard group (see `layout.Layout`). local: matrices that this process holds whole. buckets:
    the exchanges, in order. loads: cost per position, matrices held whole included.
    """

    ranks: tuple[int, ...]
    position: int
    local: tuple[Task, ...]
    buckets: tuple[Bucket, ...]
    loads: tuple[int, ...]
    _layouts: tuple[Layout, ...] = field(repr=False, compare=False)
    _matrices: tuple[tuple[LogicalMatrix, ...], ...] = field(repr=False, compare=False)
    _pieces: dict[tuple[int, int, int], tuple[Piece, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean one: 1 is perfect, the number of processes is one doing it all."""
        return max(self.loads) * len(self.loads) / (sum(self.loads) or 1) if any(self.loads) else 1.0

    def fingerprint(self) -> str:
        """sha256 of what all processes of the shard group must agree on: ranks, loads, buckets, tasks, owners."""
        tasks = [[(t.param, t.index, t.M, t.N, t.cost, t.owner) for t in bucket.tasks] for bucket in self.buckets]
        return hashlib.sha256(repr((self.ranks, self.loads, tasks)).encode()).hexdigest()

    def pieces(self, task: Task, position: int) -> tuple[Piece, ...]:
        """What `position` holds of the task's matrix, ordered by row and column of the matrix."""
        key = (task.param, task.index, position)
        if key not in self._pieces:
            matrix, layout = self._matrices[task.param][task.index], self._layouts[task.param]
            self._pieces[key] = pieces_of(task.param, matrix, layout.rows[position], layout.cols[position])
        return self._pieces[key]


def plan_ownership(
    layouts: Sequence[Layout],
    matrices: Sequence[tuple[LogicalMatrix, ...]],
    cost: Callable[[int, int], int],
    max_bucket_bytes: int,
    bytes_per_element: int = 4,
) -> list[ShardGroupPlan]:
    """The plans of this process, one per shard group, sorted by their ranks.

    layouts, matrices: of each parameter, in the order of the parameter group.
    cost: FLOPs of a matrix of M rows and N columns.
    max_bucket_bytes: what an owner holds of whole matrices in one bucket, unless a single one is larger.

    Owners: the costliest matrix first goes to the position with the least load; among equals to the one that owns the
    fewest elements, then to the one that holds most of the matrix, then to the first.
    """
    if len(layouts) != len(matrices):
        raise ConfigError(f"{len(layouts)} layouts for the matrices of {len(matrices)} parameters: one each is needed.")
    groups: dict[tuple[int, ...], list[int]] = {}
    for param, layout in enumerate(layouts):
        groups.setdefault(layout.ranks, []).append(param)
    held = _Held(layouts, matrices)
    bucket_elements = max_bucket_bytes // bytes_per_element
    plans = []
    for ranks, params in sorted(groups.items()):
        position = layouts[params[0]].position
        balance = _Balance(len(ranks))
        local: list[Task] = []
        spread: list[tuple[int, int, int, int, int]] = []  # cost, M, N, parameter, index
        for param in params:
            for index, matrix in enumerate(matrices[param]):
                M, N = matrix.M, matrix.N
                flops, holders = cost(M, N), held.holders(param, index).ascending
                if len(holders) > 1:
                    spread.append((flops, M, N, param, index))
                    continue
                balance.add(holders[0], flops, M * N)
                if holders[0] == position:
                    local.append(Task(param, index, M, N, flops, position, holders))
        # Shapes of one batch side by side, whatever their orientation.
        spread.sort(key=lambda t: (-t[0], min(t[1], t[2]), max(t[1], t[2]), t[3], t[4]))
        tasks = []
        for flops, M, N, param, index in spread:
            holders_of = held.holders(param, index)
            owner = balance.take(holders_of.most_first, flops, M * N)
            tasks.append(Task(param, index, M, N, flops, owner, holders_of.ascending))
        plans.append(
            ShardGroupPlan(
                ranks,
                position,
                tuple(local),
                _buckets(tasks, len(ranks), bucket_elements),
                tuple(balance.loads),
                tuple(layouts),
                tuple(matrices),
            )
        )
    return plans


def _buckets(tasks: Sequence[Task], positions: int, max_elements: int) -> tuple[Bucket, ...]:
    """Each owner's tasks, in order, as many to a bucket as fit; bucket k holds every owner's k-th portion."""
    current, room = [-1] * positions, [0] * positions
    buckets: list[list[Task]] = []
    for task in tasks:
        owner, size = task.owner, task.M * task.N
        if current[owner] < 0 or size > room[owner]:
            current[owner] += 1
            room[owner] = max(max_elements, size)
            if current[owner] == len(buckets):
                buckets.append([])
        room[owner] -= size
        buckets[current[owner]].append(task)
    return tuple(Bucket(tuple(b)) for b in buckets)


class _Holders(NamedTuple):
    ascending: tuple[int, ...]
    most_first: tuple[int, ...]  # most elements first, then ascending


class _Held:
    """Which positions hold some of a matrix; worked out once for parameters of the same matrices and layout."""

    def __init__(self, layouts: Sequence[Layout], matrices: Sequence[tuple[LogicalMatrix, ...]]) -> None:
        self.layouts, self.matrices = layouts, matrices
        self.known: dict[tuple[int, int, int], list[_Holders]] = {}

    def holders(self, param: int, index: int) -> _Holders:
        layout = self.layouts[param]
        # `read_layout` and `logical_matrices` give equal parameters the same objects, which live as long as this does.
        key = (id(layout.rows), id(layout.cols), id(self.matrices[param]))
        if key not in self.known:
            present = [(i, r, c) for i, (r, c) in enumerate(zip(layout.rows, layout.cols, strict=True)) if r and c]
            self.known[key] = [self._of(matrix, present) for matrix in self.matrices[param]]
        return self.known[key][index]

    def _of(self, matrix: LogicalMatrix, present: Sequence[tuple[int, Ranges, Ranges]]) -> _Holders:
        counts = {i: n for i, rows, cols in present if (n := num_common(matrix, rows, cols))}
        return _Holders(tuple(counts), tuple(sorted(counts, key=lambda i: (-counts[i], i))))


class _Balance:
    """Loads of the positions, and who is next."""

    def __init__(self, positions: int) -> None:
        self.loads, self.elements = [0] * positions, [0] * positions
        self.level: dict[tuple[int, int], set[int]] = {}  # (load, elements) -> positions there
        self.heap: list[tuple[int, int]] = []
        self.started = False

    def add(self, position: int, cost: int, elements: int) -> None:
        self.loads[position] += cost
        self.elements[position] += elements

    def take(self, preferred: Sequence[int], cost: int, elements: int) -> int:
        """The position that gets the next matrix."""
        if not self.started:
            self.started = True
            for position in range(len(self.loads)):
                self._enter(position)
        while not self.level[self.heap[0]]:
            del self.level[heapq.heappop(self.heap)]
        least = self.level[self.heap[0]]
        chosen = next((p for p in preferred if p in least), -1)
        if chosen < 0:
            chosen = min(least)
        least.remove(chosen)
        self.add(chosen, cost, elements)
        self._enter(chosen)
        return chosen

    def _enter(self, position: int) -> None:
        key = (self.loads[position], self.elements[position])
        if key not in self.level:
            self.level[key] = set()
            heapq.heappush(self.heap, key)
        self.level[key].add(position)
