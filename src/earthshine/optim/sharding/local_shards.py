"""The local shard of each parameter: a plain tensor, or a DTensor's local tensor.

The optimizer's arithmetic sees local shards only; so it is the same in every layout. `sharding.zero1` has another kind.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec, view_shape
from earthshine.optim.ranges import length
from earthshine.optim.sharding.exchange import create_group, register_group
from earthshine.optim.sharding.layout import Layout, is_dtensor, read_layout, to_local


class LocalShard:
    """What this process holds of one parameter.

    spec: how it divides into matrices; () where that does not matter (it is then seen as rows of dimension 0).
    view: the shape of its two-dimensional view.
    """

    def __init__(self, param: Tensor, spec: Spec, name: str) -> None:
        self.param, self.name, self._spec = param, name, spec
        self.view = _view(param, spec)
        self.is_dtensor = is_dtensor(param)

    @cached_property
    def layout(self) -> Layout:
        """Which elements of the parameter's view this process and the others of its shard group hold."""
        return read_layout(self.param, self._spec, self.name)

    @cached_property
    def shape2d(self) -> tuple[int, int]:
        """Rows and columns of the view that this process holds."""
        layout = self.layout
        return length(layout.rows[layout.position]), length(layout.cols[layout.position])

    def local_shard(self, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor that is like the parameter: its weight or its gradient."""
        placed: Any = tensor
        local: Tensor = placed.to_local() if self.is_dtensor else tensor
        return local

    def weight(self) -> Tensor:
        return self.local_shard(self.param.detach())

    def placed(self, grad: Tensor) -> Tensor:
        """The gradient in the parameter's placements: autograd may leave it partial, or otherwise divided."""
        p: Any = self.param
        placed: Any = grad
        if not self.is_dtensor or placed.placements == p.placements:
            return grad
        moved: Tensor = placed.redistribute(placements=p.placements)
        return moved

    def new_state(self, dtype: torch.dtype, per_row: bool) -> Tensor:
        """Zeros in the parameter's own placement; per_row: one value per row, [..., 1] (conv: [rows, 1, ...])."""
        p: Any = self.param
        shape = self.state_shape(per_row)
        if not self.is_dtensor:
            return torch.zeros(shape, dtype=dtype, device=p.device)
        from torch.distributed.tensor import DTensor, Replicate

        zeros = torch.zeros(self._shape_of(p.to_local().shape, per_row), dtype=dtype, device=p.device)
        reduced = [d for d, n in enumerate(shape) if n != p.shape[d]]
        placements = [Replicate() if getattr(q, "dim", None) in reduced else q for q in p.placements]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            zeros, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def state_shape(self, per_row: bool) -> tuple[int, ...]:
        """The shape of the parameter's state in a checkpoint."""
        return self._shape_of(self.param.shape, per_row)

    def saved_zeros(self, state: Tensor, per_row: bool) -> Tensor:
        """Zeros as a checkpoint would hold them."""
        return torch.zeros_like(state)

    def state_fits(self, state: Tensor, saved: Tensor) -> bool:
        """Whether saved state is placed so that it can be copied into this process's."""
        if is_dtensor(state) and is_dtensor(saved):
            return state.placements == saved.placements and state.device_mesh == saved.device_mesh
        return is_dtensor(state) == is_dtensor(saved)

    def _shape_of(self, shape: Sequence[int], per_row: bool) -> tuple[int, ...]:
        if not per_row:
            return tuple(shape)
        rows = 1 if self.view[0] == self.param.shape[0] else len(shape) - 1
        return (*shape[:rows], *(1,) * (len(shape) - rows))


class LocalShards:
    """The local shards of one group, by the parameter's index in it. Raises ConfigError for layouts without rows."""

    def __init__(self, params: Sequence[Tensor], specs: Sequence[Spec], names: Sequence[str]) -> None:
        self.params, self.names = list(params), list(names)
        self._shards = [LocalShard(p, spec, name) for p, spec, name in zip(params, specs, names, strict=True)]
        for shard, spec in zip(self._shards, specs, strict=True):
            if spec:
                ensure_group(shard.param, shard.layout)

    def layout(self, i: int) -> Layout:
        """Which elements of parameter i this process holds."""
        return self._shards[i].layout

    def local_shard(self, i: int, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor that is like parameter i: its weight or its gradient."""
        return self._shards[i].local_shard(tensor)

    def weight(self, i: int) -> Tensor:
        return self._shards[i].weight()

    def view2d(self, i: int, shard: Tensor, per_row: bool = False) -> Tensor:
        """A local shard as rows and columns of the parameter's 2-D view: the same memory where strides allow."""
        rows, cols = self._shards[i].shape2d
        return shard.reshape(rows, 1 if per_row else cols)

    def check_gradients(self) -> None:
        """ConfigError for a gradient that no step could take, so that none is taken by half."""
        for shard in self._shards:
            grad = shard.param.grad
            if grad is not None:
                _check_gradient(shard, grad)

    def gradients(self) -> tuple[dict[int, Tensor], int]:
        """The local shards of the gradients of the parameters that have one, and the bytes sent for them."""
        placed = self._placed_gradients()
        return {i: self.local_shard(i, grad) for i, grad in placed.items()}, 0

    def _placed_gradients(self) -> dict[int, Tensor]:
        return {i: s.placed(s.param.grad) for i, s in enumerate(self._shards) if s.param.grad is not None}

    def gather_weights(self) -> int:
        """After a step: every rank's updated weights to all that hold copies. Returns the bytes sent: none here."""
        return 0

    def new_state(self, i: int, dtype: torch.dtype, per_row: bool = False) -> Tensor:
        """Zeros where parameter i is; per_row: one value per row."""
        return self._shards[i].new_state(dtype, per_row)

    def state_shape(self, i: int, per_row: bool) -> tuple[int, ...]:
        """The shape of parameter i's state in a checkpoint."""
        return self._shards[i].state_shape(per_row)

    def state_fits(self, i: int, state: Tensor, saved: Tensor) -> bool:
        """Whether saved state, as `to_dtensor` gives it or whole, can be copied into this process's."""
        return self._shards[i].state_fits(state, saved)

    def saved_zeros(self, i: int, state: Tensor, per_row: bool) -> Tensor:
        """Zeros as a checkpoint would hold them, for the state of parameter i."""
        return self._shards[i].saved_zeros(state, per_row)

    def to_dtensor(self, states: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        """One kind of state of each parameter as a checkpoint holds it. May be collective."""
        return dict(states)

    def from_dtensor(self, saved: Mapping[int, Tensor], per_row: bool) -> dict[int, Tensor]:
        """The reverse of `to_dtensor`: this process's local shards. May be collective."""
        return {i: to_local(tensor) for i, tensor in saved.items()}


def _check_gradient(shard: LocalShard, grad: Tensor) -> None:
    p, name = shard.param, shard.name
    if grad.layout != torch.strided:
        raise ConfigError(
            f"{name} has a sparse gradient ({grad.layout}): Muon takes dense ones. Build the embedding with "
            f"sparse=False."
        )
    if shard.is_dtensor and not is_dtensor(grad):
        raise ConfigError(
            f"{name} is a DTensor but its gradient is a plain tensor of shape {list(grad.shape)}: assign "
            f"gradients as DTensors (DTensor.from_local or distribute_tensor)."
        )
    if grad.shape != p.shape or grad.device != p.device or not grad.is_floating_point():
        raise ConfigError(
            f"{name} of shape {list(p.shape)} on {p.device} has a gradient of shape {list(grad.shape)} and "
            f"dtype {grad.dtype} on {grad.device}: it was exchanged, moved or cast after the backward pass."
        )


def ensure_group(p: Any, layout: Layout) -> None:
    """Make the process group known over which a spread parameter travels: a mesh dimension's own, if one divides it."""
    if len(layout.ranks) > 1 and is_dtensor(p):
        dims = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
        parts = [p.device_mesh.get_group(d) for d in dims]
        if len(parts) == 1 and dist.get_process_group_ranks(parts[0]) == sorted(layout.ranks):
            register_group(layout.ranks, parts[0])
        else:
            create_group(layout.ranks, parts, p.device)


def _view(p: Tensor, spec: Spec) -> tuple[int, int]:
    if spec:
        return view_shape(p.shape, spec)
    rows = p.shape[0] if p.ndim else 1
    return rows, p.numel() // max(1, rows)
