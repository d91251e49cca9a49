"""ZeRO-1 for parameters that every rank holds whole: each rank keeps the optimizer state of its rows.

Moonlight's Distributed Muon (arXiv:2502.16982, Algorithm 1): gradients are reduce-scattered, momentum is updated on
this rank's shard, matrices that a boundary cuts are completed, every rank updates its shard, and the parameters are
gathered. The shards are consecutive rows of the parameters' 2-D views, as even in elements as whole rows allow, so at
most ranks - 1 matrices are cut. (The completed matrices travel by `exchange`, as those of any sharded layout do;
each is orthogonalized once, by one of its holders, instead of by all of them.)

A shard of a parameter is a run of consecutive elements, because its rows are. Elements travel in pieces of bounded
size, padded to the longest shard, which is at most a few rows more than the others.

State leaves and enters as DTensors that are Shard(0) over the process group, as FSDP2 would hold it: so a checkpoint
does not depend on where these boundaries are, and resumes on any layout.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.sharding.layout import Layout, partition_rows


class Partition:
    """The shards of `params` (replicated, of one type and device) over the ranks of `group`.

    views: the 2-D view of each parameter, to whose rows the shards are rounded.
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
        # Elements [start, stop) of parameter i that position k owns.
        self.shards = [[_elements(layout, k) for layout in self.layouts] for k in range(len(self.ranks))]
        self.longest = max(sum(stop - start for start, stop in shard) for shard in self.shards)
        self._dtype, self.device = params[0].dtype, params[0].device
        self._acc_dtype = at_least_float32_dtype(self._dtype)  # of gradients that are summed
        self._step = max(1, piece_bytes // (len(self.ranks) * params[0].element_size()))
        # Per piece and position: (offset in the piece, parameter, first element of it, last + 1).
        self._spans: list[list[list[tuple[int, int, int, int]]]] = [
            [[] for _ in self.ranks] for _ in range(0, self.longest, self._step)
        ]
        for k, shard in enumerate(self.shards):
            self._cut(k, shard)

    def _cut(self, k: int, shard: Sequence[tuple[int, int]]) -> None:
        done = 0
        for index, (low, high) in enumerate(shard):
            while low < high:
                piece, offset = divmod(done, self._step)
                n = min(high - low, self._step - offset)
                self._spans[piece][k].append((offset, index, low, low + n))
                low, done = low + n, done + n

    def accepts(self, saved: Tensor) -> bool:
        """Whether saved state is whole, or divided as `ShardedState.to_dtensor` does it."""
        from torch.distributed.tensor import DTensor, Shard

        if not isinstance(saved, DTensor):
            return True
        ranks = tuple(saved.device_mesh.mesh.flatten().tolist())
        return tuple(saved.placements) == (Shard(0),) and ranks == self.ranks

    def local_shard(self, index: int, tensor: Tensor) -> Tensor:
        """The shard of parameter `index`, of a whole tensor like it: a view [elements]."""
        start, stop = self.shards[self.position][index]
        return tensor.view(-1)[start:stop] if tensor.is_contiguous() else tensor.reshape(-1)[start:stop]

    def predicted_bytes(self, reduce: bool) -> dict[str, int]:
        """Bytes that leave a rank per step, as an all-gather by ring sends them: (ranks - 1) times its shard."""
        others = len(self.ranks) - 1
        found = {"gather_parameters": others * self.longest * self._dtype.itemsize}
        if reduce:
            flags = 2 * others * len(self.layouts) // len(self.ranks)
            found["reduce_gradients"] = others * self.longest * self._acc_dtype.itemsize + flags
        return found

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
        sent = 2 * (n - 1) * len(grads) // n
        shard = torch.empty(self.longest, dtype=self._acc_dtype, device=device)
        flat_grads = [None if grad is None else grad.reshape(-1) for grad in grads]
        for start, stop, spans in self._sizes():
            whole = torch.zeros(n, stop - start, dtype=self._acc_dtype, device=device)
            for k in range(n):
                for offset, index, low, high in spans[k]:
                    grad = flat_grads[index]
                    if grad is not None:
                        whole[k, offset : offset + high - low] = grad[low:high]
            dist.reduce_scatter_single(shard[start:stop], whole.view(-1), op=dist.ReduceOp.SUM, group=self.group)
            sent += (n - 1) * (stop - start) * self._acc_dtype.itemsize
        shard.div_(n)
        sizes = [stop - start for start, stop in self.shards[self.position]]
        parts = shard[: sum(sizes)].split(sizes)
        return [part if on else None for part, on in zip(parts, present.tolist(), strict=True)], sent

    def gather(self, params: Sequence[Tensor]) -> int:
        """Every rank's shard of the parameters into all of them, in place. Returns the bytes sent."""
        n, sent = len(self.ranks), 0
        for start, stop, spans in self._sizes():
            own = torch.zeros(stop - start, dtype=self._dtype, device=self.device)
            for offset, index, low, high in spans[self.position]:
                own[offset : offset + high - low] = flat(params[index])[low:high]
            whole = own.new_empty(n, stop - start)
            dist.all_gather_single(whole.view(-1), own, group=self.group)
            sent += (n - 1) * own.numel() * own.element_size()
            for k in range(n):
                for offset, index, low, high in spans[k] if k != self.position else ():
                    flat(params[index])[low:high] = whole[k, offset : offset + high - low]
        return sent


def _elements(layout: Layout, position: int) -> tuple[int, int]:
    """Rows as a range of elements of the flat view: a shard's rows are one run, over all columns."""
    runs = layout.rows[position]
    start, stop = (runs[0][0], runs[-1][1]) if runs else (0, 0)
    return start * layout.view[1], stop * layout.view[1]


def flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor as one dimension, the same memory."""
    return tensor.detach().view(-1)


class ShardedState:
    """Moves state of a partition between this rank's shards and DTensors that are Shard(0) over the same ranks.

    Each call is one all-to-all of the whole state: it is for checkpoints, not for steps. Collective.
    """

    def __init__(self, partition: Partition) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self._partition = partition
        self._mesh = DeviceMesh.from_group(partition.group, partition.device.type)

    def to_dtensor(self, shards: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """DTensors of `shapes` from this rank's flat shards of them."""
        from torch.distributed.tensor import DTensor, Shard

        part = self._partition
        ours = [self._rows(i, shapes[i]) for i in range(len(shapes))]
        theirs = [[_chunk(shape, k, len(part.ranks)) for shape in shapes] for k in range(len(part.ranks))]
        locals_ = _redistribute(shards, ours, theirs, part)
        found: list[Tensor] = []
        for i, shape in enumerate(shapes):
            start, stop = theirs[part.position][i]
            inner = shape[1:]
            per_row = _size(inner)
            local = locals_[i].view((stop - start) // max(per_row, 1), *inner)
            stride = torch.empty(shape, device="meta").stride()
            found.append(
                DTensor.from_local(
                    local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
                )
            )
        return found

    def from_dtensor(self, saved: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """This rank's flat shards of saved tensors: DTensors as `to_dtensor` makes them, or whole plain tensors."""
        from torch.distributed.tensor import DTensor

        part = self._partition
        ours = [self._rows(i, shapes[i]) for i in range(len(shapes))]
        if not any(isinstance(t, DTensor) for t in saved):
            mine = [ours[i][part.position] for i in range(len(shapes))]
            return [t.reshape(-1)[start:stop] for t, (start, stop) in zip(saved, mine, strict=True)]
        locals_ = []
        for tensor in saved:
            if not isinstance(tensor, DTensor) or not part.accepts(tensor):
                raise CheckpointError(
                    "saved state of ZeRO-1 parameters must be whole tensors, or DTensors with Shard(0) over the "
                    "process group as state_dict() gives them: load it through torch.distributed.checkpoint."
                )
            locals_.append(tensor.to_local().reshape(-1))
        n = len(part.ranks)
        theirs = [[_chunk(shape, k, n) for k in range(n)] for shape in shapes]
        return _redistribute(locals_, theirs, [[ours[i][k] for i in range(len(shapes))] for k in range(n)], part)

    def _rows(self, index: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Per position, its shard of parameter `index` as elements of a state tensor of `shape`, which has as many
        rows as the parameter's view and may have fewer columns (one value per row)."""
        part = self._partition
        rows, cols = part.layouts[index].view
        scale = _size(shape) // max(1, rows)
        return [(lo // max(cols, 1) * scale, hi // max(cols, 1) * scale) for lo, hi in (s[index] for s in part.shards)]


def _redistribute(
    mine: Sequence[Tensor],
    have: Sequence[Sequence[tuple[int, int]]],
    want: Sequence[Sequence[tuple[int, int]]],
    part: Partition,
) -> list[Tensor]:
    """Flat pieces from one division of some tensors to another, by one all-to-all.

    mine: this rank's piece of each tensor. have: [tensor][position] -> elements. want: [position][tensor] -> elements.
    """
    me, n = part.position, len(part.ranks)
    dtype, device = mine[0].dtype, mine[0].device
    sends, outgoing = [], []
    for k in range(n):
        pieces = []
        for i, tensor in enumerate(mine):
            low, high = _common(have[i][me], want[k][i])
            pieces.append(tensor[low - have[i][me][0] : high - have[i][me][0]])
        sends.append(sum(p.numel() for p in pieces))
        outgoing += pieces
    receives = []
    for k in range(n):
        overlaps = [_common(have[i][k], want[me][i]) for i in range(len(mine))]
        receives.append(sum(high - low for low, high in overlaps))
    arrived = torch.empty(sum(receives), dtype=dtype, device=device)
    dist.all_to_all_single(arrived, torch.cat(outgoing), receives, sends, group=part.group)
    found = [torch.empty(want[me][i][1] - want[me][i][0], dtype=dtype, device=device) for i in range(len(mine))]
    at = 0
    for k in range(n):
        for i, tensor in enumerate(found):
            low, high = _common(have[i][k], want[me][i])
            start = want[me][i][0]
            tensor[low - start : high - start] = arrived[at : at + high - low]
            at += high - low
    return found


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The common part of two ranges; an empty range inside the first where there is none."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else (a[0], a[0])


def _chunk(shape: tuple[int, ...], position: int, n: int) -> tuple[int, int]:
    """Elements of dimension 0's chunk `position` of n, as torch.chunk and Shard(0) divide it."""
    per_row = _size(shape[1:])
    size = -(-shape[0] // n)
    return min(position * size, shape[0]) * per_row, min((position + 1) * size, shape[0]) * per_row


def _size(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
