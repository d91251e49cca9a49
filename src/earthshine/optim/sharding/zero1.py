"""ZeRO-1 for parameters that every rank holds whole: each rank keeps the optimizer state of a range of rows.

Moonlight's Distributed Muon (arXiv:2502.16982, Algorithm 1): gradients are reduce-scattered, momentum is updated on
this rank's rows, matrices that a boundary cuts are completed, every rank updates its rows, and the parameters are
gathered. A rank's part is consecutive rows of the parameters' 2-D views, as even in elements as whole rows allow, so at
most ranks - 1 matrices are cut (`partition_rows`). The completed matrices travel by `exchange`, as those of any sharded
layout do; each is orthogonalized once, by one of its holders, instead of by all of them.

A local shard is a range of consecutive elements, because its rows are. Elements travel in pieces of bounded size,
padded to the longest part, which is at most a few rows more than the others.

State is saved as DTensors that are Shard(0) over the process group, as FSDP2 would hold it: so a checkpoint does not
depend on where these boundaries are, and resumes on any layout.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.logical_matrices import Spec
from earthshine.optim.ranges import merge, overlaps
from earthshine.optim.sharding.exchange import all_reduce_bytes, check_agreement, register_group, ring_bytes
from earthshine.optim.sharding.layout import Layout, is_dtensor
from earthshine.optim.sharding.local_shards import LocalShard, LocalShards

# [position][tensor]: the elements [start, stop) of it that are there.
_Division = list[list[tuple[int, int]]]


def partition_rows(views: Sequence[tuple[int, int]], ranks: Sequence[int], position: int) -> list[Layout]:
    """Layouts that divide replicated parameters, for ZeRO-1: the views' rows in order as one list, cut in len(ranks).

    Boundary k of N is the row that starts nearest to k/N of all elements (the earlier of two as near): parts are as
    even as whole rows allow. This is the partition of the flat buffer in Algorithm 1 of arXiv:2502.16982, at rows.
    """
    if not views:
        return []
    parts = len(ranks)
    before = list(accumulate((rows * cols for rows, cols in views), initial=0))
    bounds = []  # between the parts: (view, row of it)
    for k in range(1, parts):
        index = min(bisect_right(before, k * before[-1] // parts) - 1, len(views) - 1)
        cols = views[index][1] or 1  # without columns any row is as good
        # (k total / parts - before) / cols, rounded; in whole numbers, as every process must cut at the same row.
        twice = 2 * (k * before[-1] - before[index] * parts)
        bounds.append((index, max(0, -((cols * parts - twice) // (2 * cols * parts)))))
    return [_part(view, i, tuple(ranks), position, bounds) for i, view in enumerate(views)]


def _part(
    view: tuple[int, int], index: int, ranks: tuple[int, ...], position: int, bounds: list[tuple[int, int]]
) -> Layout:
    """The layout of view number `index`."""
    first, last = bisect_left(bounds, (index,)), bisect_left(bounds, (index + 1,))
    edges = [0, *(row for _, row in bounds[first:last]), view[0]]
    spans = tuple(merge([span]) for span in pairwise(edges))
    rows = ((),) * first + spans + ((),) * (len(ranks) - 1 - last)
    return Layout(view, ranks, position, rows, (((0, view[1]),),) * len(ranks))


class Zero1Shard(LocalShard):
    """This rank's rows of a plain parameter, as a flat tensor [elements]: the one numbered `index` of a partition."""

    def __init__(self, shard: LocalShard, partition: "Partition", index: int) -> None:
        self.param, self.name, self.view, self.is_dtensor = shard.param, shard.name, shard.view, False
        self.layout = partition.layouts[index]
        self._partition, self._elements = partition, slice(*partition.elements[partition.position][index])

    def local_shard(self, tensor: Tensor) -> Tensor:
        return (tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1))[self._elements]

    def new_state(self, dtype: torch.dtype, per_row: bool) -> Tensor:
        rows, cols = self.shape2d
        size = rows if per_row and cols else rows * cols
        return torch.zeros(size, dtype=dtype, device=self.param.device)

    def saved_zeros(self, state: Tensor, per_row: bool) -> Tensor:
        return torch.zeros(self.state_shape(per_row))

    def state_fits(self, state: Tensor, saved: Tensor) -> bool:
        return self._partition.can_take(saved)


class Zero1Shards(LocalShards):
    """The local shards of a group whose plain parameters are divided over `process_group`; DTensors are as they are.

    reduce_gradients: average them here. piece_bytes: the most that one piece on its way takes on a rank.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        specs: Sequence[Spec],
        names: Sequence[str],
        process_group: Any,
        reduce_gradients: bool,
        piece_bytes: int,
    ) -> None:
        super().__init__(params, specs, names)
        self.process_group, self.reduce_gradients = process_group, reduce_gradients
        # What every rank keeps whole.
        self.scalars = [i for i, p in enumerate(params) if not p.ndim]
        # Each with the parameters that it divides.
        self.partitions: list[tuple[Partition, list[int]]] = []
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, shard in enumerate(self._shards):
            if not shard.is_dtensor and shard.param.ndim:
                _check_contiguous(shard)
                kinds.setdefault((shard.param.dtype, shard.param.device), []).append(i)
        for (dtype, device), members in kinds.items():
            shards = [self._shards[i] for i in members]
            partition = Partition([s.param for s in shards], [s.view for s in shards], process_group, piece_bytes)
            register_group(partition.ranks, process_group)
            what = [(s.name, tuple(s.param.shape), s.view) for s in shards]
            check_agreement(partition.ranks, repr((dtype, piece_bytes, what)), device)
            self.partitions.append((partition, members))
            for index, i in enumerate(members):
                self._shards[i] = Zero1Shard(shards[index], partition, index)

    def gradients(self) -> tuple[dict[int, Tensor], int]:
        """The local shards of the gradients, and the bytes sent for them: their mean where it is taken here."""
        if not self.reduce_gradients:
            return super().gradients()
        placed = self._placed_gradients()
        reduced: dict[int, Tensor] = {}
        sent = 0
        for partition, members in self.partitions:
            parts, n = partition.reduce([placed.pop(i, None) for i in members])
            sent += n
            reduced |= {i: part for i, part in zip(members, parts, strict=True) if part is not None}
        for i in self.scalars:
            sent += self._reduce_scalar(i, placed)
        return reduced | {i: self.local_shard(i, grad) for i, grad in placed.items()}, sent

    def _reduce_scalar(self, i: int, placed: dict[int, Tensor]) -> int:
        """A scalar is not divided: every rank takes the mean of its gradients. Returns the bytes sent."""
        p, ranks = self.params[i], dist.get_world_size(self.process_group)
        # The sum, and how many ranks have a gradient.
        both = torch.zeros(2, dtype=at_least_float32_dtype(p.dtype), device=p.device)
        if i in placed:
            both[0], both[1] = placed[i], 1
        dist.all_reduce(both, group=self.process_group)
        if both[1] > 0:
            placed[i] = both[0] / ranks
        return all_reduce_bytes(ranks, 2 * both.element_size())

    def gather_weights(self) -> int:
        return sum(part.gather([self.params[i].detach() for i in members]) for part, members in self.partitions)

    def to_dtensor(self, states: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        """As a checkpoint holds them: Shard(0) over the process group. Collective."""
        moved = dict(states)
        for partition, members in self.partitions:
            shapes = [self.state_shape(i, per_row) for i in members]
            moved |= zip(members, partition.to_dtensor([states[i] for i in members], shapes), strict=True)
        return moved

    def from_dtensor(self, saved: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        shards = super().from_dtensor(saved, per_row)
        for partition, members in self.partitions:
            shapes = [self.state_shape(i, per_row) for i in members]
            shards |= zip(members, partition.from_dtensor([saved[i] for i in members], shapes), strict=True)
        return shards


def _check_contiguous(shard: LocalShard) -> None:
    if not shard.param.is_contiguous():
        raise ConfigError(
            f"{shard.name} is not contiguous in memory (strides {list(shard.param.stride())}): with a process_group "
            f"its rows are cut as they lie; make it contiguous before Muon sees it."
        )


class Partition:
    """Which elements of `params` (replicated, of one dtype and device) each rank of `group` keeps.

    views: the 2-D view of each parameter; its rows are never cut.
    piece_bytes: the most that one gathered piece takes on a rank.
    """

    def __init__(
        self, params: Sequence[Tensor], views: Sequence[tuple[int, int]], group: Any, piece_bytes: int
    ) -> None:
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise ConfigError(
                f"process_group={group!r} must be a torch.distributed process group that this process (rank "
                f"{dist.get_rank() if dist.is_initialized() else 0}) is in: dist.group.WORLD, or mesh.get_group('dp')."
            )
        self.group = group
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.position = dist.get_rank(group)
        self.layouts: list[Layout] = partition_rows(views, self.ranks, self.position)
        # [position][parameter]: the elements [start, stop) of it that the position keeps.
        self.elements = [[_elements(layout, k) for layout in self.layouts] for k in range(len(self.ranks))]
        self.longest = max(sum(stop - start for start, stop in part) for part in self.elements)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.acc_dtype = at_least_float32_dtype(self.dtype)  # of gradients that are summed
        self._step = max(1, piece_bytes // (len(self.ranks) * params[0].element_size()))
        # Per piece and position: (offset in the piece, parameter, first element of it, last + 1).
        self._spans: list[list[list[tuple[int, int, int, int]]]] = [
            [[] for _ in self.ranks] for _ in range(0, self.longest, self._step)
        ]
        for k, part in enumerate(self.elements):
            self._cut(k, part)

    def _cut(self, k: int, part: Sequence[tuple[int, int]]) -> None:
        done = 0
        for index, (low, high) in enumerate(part):
            while low < high:
                piece, offset = divmod(done, self._step)
                n = min(high - low, self._step - offset)
                self._spans[piece][k].append((offset, index, low, low + n))
                low, done = low + n, done + n

    def can_take(self, saved: Tensor) -> bool:
        """Whether saved state is whole, or divided as `to_dtensor` does it."""
        if not is_dtensor(saved):
            return True
        from torch.distributed.tensor import Shard

        ranks = tuple(saved.device_mesh.mesh.flatten().tolist())
        return tuple(saved.placements) == (Shard(0),) and ranks == self.ranks

    def _sizes(self) -> Iterator[tuple[int, int, list[list[tuple[int, int, int, int]]]]]:
        """Each piece: its first element, its last + 1, and its spans per position."""
        for piece, spans in enumerate(self._spans):
            yield piece * self._step, min((piece + 1) * self._step, self.longest), spans

    def reduce(self, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], int]:
        """The mean over the ranks of this rank's part of every gradient, in at least fp32, and the bytes.

        None for a parameter that has no gradient on any rank; one that some ranks lack counts as zero there. The flags
        that tell are read on the host, which an accelerator has to be waited for.
        """
        n, device = len(self.ranks), self.device
        present = torch.tensor([grad is not None for grad in grads], dtype=torch.uint8, device=device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=self.group)
        sent = all_reduce_bytes(n, len(grads))
        mean = torch.empty(self.longest, dtype=self.acc_dtype, device=device)
        flat_grads = [None if grad is None else grad.reshape(-1) for grad in grads]
        for start, stop, spans in self._sizes():
            whole = torch.zeros(n, stop - start, dtype=self.acc_dtype, device=device)
            for k in range(n):
                for offset, index, low, high in spans[k]:
                    grad = flat_grads[index]
                    if grad is not None:
                        whole[k, offset : offset + high - low] = grad[low:high]
            dist.reduce_scatter_single(mean[start:stop], whole.view(-1), op=dist.ReduceOp.SUM, group=self.group)
            sent += ring_bytes(n, (stop - start) * self.acc_dtype.itemsize)
        mean.div_(n)
        sizes = [stop - start for start, stop in self.elements[self.position]]
        parts = mean[: sum(sizes)].split(sizes)
        return [part if on else None for part, on in zip(parts, present.tolist(), strict=True)], sent

    def gather(self, params: Sequence[Tensor]) -> int:
        """Every rank's rows of the parameters into all of them, in place. Returns the bytes sent."""
        n, sent = len(self.ranks), 0
        for start, stop, spans in self._sizes():
            local = torch.zeros(stop - start, dtype=self.dtype, device=self.device)
            for offset, index, low, high in spans[self.position]:
                local[offset : offset + high - low] = flat(params[index])[low:high]
            whole = local.new_empty(n, stop - start)
            dist.all_gather_single(whole.view(-1), local, group=self.group)
            sent += ring_bytes(n, local.numel() * local.element_size())
            for k in range(n):
                for offset, index, low, high in spans[k] if k != self.position else ():
                    flat(params[index])[low:high] = whole[k, offset : offset + high - low]
        return sent

    def to_dtensor(self, shards: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """DTensors of `shapes`, Shard(0), from this rank's flat shards of them: one all-to-all. Collective."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, self.device.type)
        rows = self._redistribute(shards, self._state_elements(shapes), self._chunks(shapes))
        return [
            DTensor.from_local(
                flat_rows.view(flat_rows.numel() // max(1, prod(shape[1:])), *shape[1:]),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size(shape),
                stride=torch.empty(shape, device="meta").stride(),
            )
            for flat_rows, shape in zip(rows, shapes, strict=True)
        ]

    def from_dtensor(self, saved: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """This rank's flat shards of saved tensors: DTensors as `to_dtensor` makes them, or whole plain tensors."""
        elements = self._state_elements(shapes)
        if not any(map(is_dtensor, saved)):
            return [t.reshape(-1)[slice(*span)] for t, span in zip(saved, elements[self.position], strict=True)]
        rows = []
        for tensor in saved:
            if not is_dtensor(tensor) or not self.can_take(tensor):
                raise CheckpointError(
                    "saved state of ZeRO-1 parameters must be whole tensors, or DTensors with Shard(0) over the "
                    "process group as state_dict() gives them: load it through torch.distributed.checkpoint."
                )
            rows.append(tensor.to_local().reshape(-1))
        return self._redistribute(rows, self._chunks(shapes), elements)

    def _state_elements(self, shapes: Sequence[tuple[int, ...]]) -> _Division:
        """This partition of state tensors, which have as many rows as the views of their parameters and may have fewer
        columns (one value per row).
        """
        per_row = [
            (max(1, layout.view[1]), prod(shape) // max(1, layout.view[0]))
            for layout, shape in zip(self.layouts, shapes, strict=True)
        ]
        return [
            [(low // cols * n, high // cols * n) for (low, high), (cols, n) in zip(part, per_row, strict=True)]
            for part in self.elements
        ]

    def _chunks(self, shapes: Sequence[tuple[int, ...]]) -> _Division:
        """Dimension 0 as torch.chunk and Shard(0) divide it."""
        parts = len(self.ranks)
        return [
            [
                (min(k * -(-n // parts), n) * prod(rest), min((k + 1) * -(-n // parts), n) * prod(rest))
                for n, *rest in shapes
            ]
            for k in range(parts)
        ]

    def _redistribute(self, tensors: Sequence[Tensor], have: _Division, want: _Division) -> list[Tensor]:
        """This rank's flat parts of some tensors by one division of them to those by another: one all-to-all."""
        me, n, first = self.position, len(self.ranks), tensors[0]
        outgoing = [_common(have[me], want[k]) for k in range(n)]
        incoming = [_common(have[k], want[me]) for k in range(n)]
        sends, receives = ([sum(size for *_, size in parts) for parts in both] for both in (outgoing, incoming))
        parts = [tensors[i][start : start + size] for to_k in outgoing for i, start, _, size in to_k]
        arrived = first.new_empty(sum(receives))
        dist.all_to_all_single(arrived, torch.cat([first[:0], *parts]), receives, sends, group=self.group)
        moved = [first.new_empty(stop - start) for start, stop in want[me]]
        at = 0
        for i, _, start, size in (part for from_k in incoming for part in from_k):
            moved[i][start : start + size] = arrived[at : at + size]
            at += size
        return moved


def _common(held: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """(tensor, offset in the part held, offset in the part wanted, length) of what both have of each tensor."""
    return [
        (i, *both)
        for i, (have, want) in enumerate(zip(held, wanted, strict=True))
        for both in overlaps(merge([have]), merge([want]))
    ]


def _elements(layout: Layout, position: int) -> tuple[int, int]:
    """Rows as a range of elements of the flat view: a shard's rows are one run, over all columns."""
    runs = layout.rows[position]
    start, stop = (runs[0][0], runs[-1][1]) if runs else (0, 0)
    return start * layout.view[1], stop * layout.view[1]


def flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor as one dimension, the same memory."""
    return tensor.detach().view(-1)
