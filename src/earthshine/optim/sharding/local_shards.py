"""The local shard of each parameter: a plain tensor, a DTensor's local tensor, or this rank's ZeRO-1 rows, flat.

The optimizer's arithmetic sees local shards only; so it is the same in every layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec, view_shape
from earthshine.optim.ranges import length
from earthshine.optim.sharding.exchange import check_agreement, create_group, register_group
from earthshine.optim.sharding.layout import Layout, is_dtensor, local, read_layout
from earthshine.optim.sharding.zero1 import Partition, ShardedState


class LocalShards:
    """The local shards of one group.

    specs: how each parameter divides into matrices; () where that does not matter (it is then seen as rows of
    dimension 0). process_group: ZeRO-1 over it for the plain parameters; None for none.
    Raises ConfigError for what cannot be sharded so.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        specs: Sequence[Spec],
        names: Sequence[str],
        process_group: Any,
        piece_bytes: int,
    ) -> None:
        self.params, self.names, self._specs = list(params), list(names), list(specs)
        self.views = [_view(p, spec) for p, spec in zip(params, specs, strict=True)]
        self._partitions: list[tuple[Partition, list[int]]] = []
        self._place: dict[int, tuple[Partition, int]] = {}
        self._process_group = process_group
        # With a process group: what every rank keeps whole.
        self._scalars = [i for i, p in enumerate(params) if process_group is not None and not p.ndim]
        if process_group is not None:
            self._partition(process_group, piece_bytes)
        self.layouts: list[Layout] = []
        for i, (p, spec, name) in enumerate(zip(params, specs, names, strict=True)):
            if i in self._place:
                partition, index = self._place[i]
                self.layouts.append(partition.layouts[index])
            else:
                self.layouts.append(read_layout(p, spec, name) if spec else _whole(self.views[i]))
                ensure_group(p, self.layouts[i])

        # Rows and columns of each local shard.
        self._sizes = [(length(x.rows[x.position]), length(x.cols[x.position])) for x in self.layouts]

    def _partition(self, process_group: Any, piece_bytes: int) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, p in enumerate(self.params):
            if not is_dtensor(p) and p.ndim:  # a scalar is kept by every rank
                if not p.is_contiguous():
                    raise ConfigError(
                        f"{self.names[i]} is not contiguous in memory (strides {list(p.stride())}): with a "
                        f"process_group its rows are cut as they lie; make it contiguous before Muon sees it."
                    )
                kinds.setdefault((p.dtype, p.device), []).append(i)
        for members in kinds.values():
            part = Partition(
                [self.params[i] for i in members], [self.views[i] for i in members], process_group, piece_bytes
            )
            register_group(part.ranks, process_group)
            first = self.params[members[0]]
            what = [(self.names[i], tuple(self.params[i].shape), self.views[i]) for i in members]
            check_agreement(part.ranks, repr((first.dtype, piece_bytes, what)), first.device)
            self._partitions.append((part, members))
            self._place |= {i: (part, index) for index, i in enumerate(members)}

    def local_shard(self, i: int, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor that is like parameter i: its weight, gradient or unsharded state."""
        if i in self._place:
            partition, index = self._place[i]
            return partition.local_shard(index, tensor)
        return local(tensor)

    def local_state(self, tensor: Tensor) -> Tensor:
        """This process's shard of state made by `new_state`."""
        return local(tensor)

    def weight(self, i: int) -> Tensor:
        return self.local_shard(i, self.params[i].detach())

    def gradients(self, reduce: bool) -> tuple[dict[int, Tensor], int]:
        """The local shards of the gradients of the parameters that have one, and the bytes sent for them.

        reduce: average those of ZeRO-1 parameters over their process group.
        """
        found: dict[int, Tensor] = {}
        sent = 0
        placed = {i: self._placed(i, p.grad) for i, p in enumerate(self.params) if p.grad is not None}
        if reduce:
            for partition, members in self._partitions:
                parts, n = partition.reduce([placed.get(i) for i in members])
                sent += n
                found |= {i: part for i, part in zip(members, parts, strict=True) if part is not None}
            for i in self._scalars:
                sent += self._reduce_scalar(i, placed)
        for i, grad in placed.items():
            if not (reduce and i in self._place):
                found[i] = self.local_shard(i, grad)
        return found, sent

    def _reduce_scalar(self, i: int, placed: dict[int, Tensor]) -> int:
        """A scalar is not divided: every rank takes the mean of its gradients. Returns the bytes sent."""
        p, group = self.params[i], self._process_group
        wide = at_least_float32_dtype(p.dtype)
        both = torch.zeros(2, dtype=wide, device=p.device)  # the sum, and how many ranks have a gradient
        if i in placed:
            both[0], both[1] = placed[i], 1
        dist.all_reduce(both, group=group)
        if both[1] > 0:
            placed[i] = both[0] / dist.get_world_size(group)
        return _scalar_bytes(both, dist.get_world_size(group))

    def check_gradients(self) -> None:
        """ConfigError for a gradient that no step could take, so that none is taken by half."""
        for name, p in zip(self.names, self.params, strict=True):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise ConfigError(
                    f"{name} has a sparse gradient ({grad.layout}): Muon takes dense ones. Build the embedding with "
                    f"sparse=False."
                )
            if is_dtensor(p) and not is_dtensor(grad):
                raise ConfigError(
                    f"{name} is a DTensor but its gradient is a plain tensor of shape {list(grad.shape)}: assign "
                    f"gradients as DTensors (DTensor.from_local or distribute_tensor)."
                )
            if grad.shape != p.shape or grad.device != p.device or not grad.is_floating_point():
                raise ConfigError(
                    f"{name} of shape {list(p.shape)} on {p.device} has a gradient of shape {list(grad.shape)} and "
                    f"type {grad.dtype} on {grad.device}: it was exchanged, moved or cast after the backward pass."
                )

    def _placed(self, i: int, grad: Tensor) -> Tensor:
        """The gradient in its parameter's placements: autograd may leave it partial, or otherwise divided."""
        p: Any = self.params[i]
        placed: Any = grad
        if not is_dtensor(p) or placed.placements == p.placements:
            return grad
        moved: Tensor = placed.redistribute(placements=p.placements)
        return moved

    def layout(self, i: int) -> Layout:
        """Which elements of parameter i this process holds, also where its algorithm does not ask for its layout."""
        known = self._specs[i] or i in self._place
        return self.layouts[i] if known else read_layout(self.params[i], (), self.names[i])

    def gather(self) -> int:
        """ZeRO-1: every rank's updated weights to all. Returns the bytes sent."""
        return sum(part.gather([self.params[i].detach() for i in members]) for part, members in self._partitions)

    def predicted_bytes(self, reduce: bool) -> dict[str, int]:
        total: dict[str, int] = {}
        for partition, _ in self._partitions:
            for key, n in partition.predicted_bytes(reduce).items():
                total[key] = total.get(key, 0) + n
        for i in self._scalars if reduce else ():
            both = torch.empty(2, dtype=at_least_float32_dtype(self.params[i].dtype), device="meta")
            n = _scalar_bytes(both, dist.get_world_size(self._process_group))
            total["reduce_gradients"] = total.get("reduce_gradients", 0) + n
        return total

    def view2d(self, i: int, shard: Tensor, per_row: bool = False) -> Tensor:
        """A local shard as rows and columns of the parameter's 2-D view: the same memory where strides allow."""
        rows, cols = self._sizes[i]
        return shard.reshape(rows, 1 if per_row else cols)

    def new_state(self, i: int, dtype: torch.dtype, per_row: bool = False) -> Tensor:
        """Zeros in the parameter's own placement; per_row: one value per row, [..., 1] (conv: [rows, 1, ...])."""
        p: Any = self.params[i]
        if i in self._place:
            weight = self.weight(i)
            size = weight.numel() // max(1, self.views[i][1]) if per_row else weight.numel()
            return weight.new_zeros(size, dtype=dtype)
        if not is_dtensor(p):
            return torch.zeros(self._state_shape(i, p.shape, per_row), dtype=dtype, device=p.device)
        from torch.distributed.tensor import DTensor, Replicate

        mine = torch.zeros(self._state_shape(i, p.to_local().shape, per_row), dtype=dtype, device=p.device)
        shape = self._state_shape(i, p.shape, per_row)
        gone = [d for d, n in enumerate(shape) if n != p.shape[d]]
        placements = [Replicate() if getattr(q, "dim", None) in gone else q for q in p.placements]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            mine, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def state_shape(self, i: int, per_row: bool) -> tuple[int, ...]:
        """The shape of parameter i's state, whole."""
        return self._state_shape(i, self.params[i].shape, per_row)

    def state_fits(self, i: int, live: Tensor, saved: Tensor) -> bool:
        """Whether saved state, whole or placed, can be copied into this process's."""
        if i in self._place:
            return self._place[i][0].accepts(saved)
        if is_dtensor(live) != is_dtensor(saved):
            return False
        a: Any = live
        b: Any = saved
        return not is_dtensor(live) or (a.placements == b.placements and a.device_mesh == b.device_mesh)

    def _state_shape(self, i: int, shape: Sequence[int], per_row: bool) -> tuple[int, ...]:
        if not per_row:
            return tuple(shape)
        kept = 1 if self.views[i][0] == self.params[i].shape[0] else len(shape) - 1
        return (*shape[:kept], *(1,) * (len(shape) - kept))

    def zero1_ranks(self, i: int) -> tuple[int, ...]:
        """The ranks that divide parameter i by ZeRO-1; () where that does not concern it."""
        return self._place[i][0].ranks if i in self._place else ()

    @property
    def zero1(self) -> list[tuple[Partition, list[int]]]:
        """The partitions of ZeRO-1 and the parameters in each."""
        return self._partitions

    def to_dtensor(self, states: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        """State of ZeRO-1 parameters as DTensors, for a checkpoint. Collective."""
        found: dict[int, Tensor] = {}
        for partition, members in self._partitions:
            shapes = [self.state_shape(i, per_row) for i in members]
            out = ShardedState(partition).to_dtensor([states[i] for i in members], shapes)
            found |= dict(zip(members, out, strict=True))
        return found

    def from_dtensor(self, saved: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        """The reverse of `to_dtensor`: this rank's shards. Collective."""
        found: dict[int, Tensor] = {}
        for partition, members in self._partitions:
            shapes = [self.state_shape(i, per_row) for i in members]
            out = ShardedState(partition).from_dtensor([saved[i] for i in members], shapes)
            found |= dict(zip(members, out, strict=True))
        return found


def ensure_group(p: Any, layout: Layout) -> None:
    """Make the process group known over which a spread parameter travels: a mesh dimension's own, if one divides it."""
    if len(layout.ranks) > 1 and is_dtensor(p):
        dims = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
        parts = [p.device_mesh.get_group(d) for d in dims]
        if len(parts) == 1 and dist.get_process_group_ranks(parts[0]) == sorted(layout.ranks):
            register_group(layout.ranks, parts[0])
        else:
            create_group(layout.ranks, parts, p.device)


def _scalar_bytes(both: Tensor, ranks: int) -> int:
    """What a ring all-reduce of it sends from each rank."""
    return 2 * (ranks - 1) * both.numel() * both.element_size() // ranks


def _view(p: Tensor, spec: Spec) -> tuple[int, int]:
    if spec:
        return view_shape(p.shape, spec)
    rows = p.shape[0] if p.ndim else 1
    return rows, p.numel() // max(1, rows)


def _whole(view: tuple[int, int]) -> Layout:
    """The layout of a parameter of which only its own local shard matters: nothing of it ever travels by layout."""
    rows = ((0, view[0]),) if view[0] else ()
    cols = ((0, view[1]),) if view[1] else ()
    return Layout(view, (0,), 0, (rows,), (cols,))
