"""Ways to spread the model of `models.py` over processes, with torch's own APIs; and slices of whole tensors by them.

`local_slice` states on its own what torch does, independent of `sharding.layout`: FSDP2 cuts what tensor or expert
parallelism has left on the rank, although its mesh dimension stands first. `held` and `assemble` put the ranks'
pieces together without a collective and find replicas that disagree.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from models import EVEN, HALVES, UNEVEN, Model, Sizes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Replicate, _StridedShard

COLUMN_WISE = ("qkv", "interleaved", "heads", "gate", "up")
ROW_WISE = ("cols", "down")
_WHOLE_INPUT = ("interleaved", "heads", "gate", "up", "qkv")  # split along their input by the row-wise layout


@dataclass(frozen=True)
class Layout:
    """`spread(model)` shards it in place and may return the process group of ZeRO-1."""

    world: int
    sizes: Sizes
    spread: Callable[[Model], Any]


def build(layout: str, **options: Any) -> Model:
    """The seeded model, spread over the processes as LAYOUTS[layout] says; the optimizer's group is `model.zero1`."""
    model = Model(LAYOUTS[layout].sizes, **options)
    model.zero1 = LAYOUTS[layout].spread(model)
    return model


def plain(layout: str) -> str:
    """The layout of one process with the same sizes."""
    return next(n for n, way in LAYOUTS.items() if way.world == 1 and way.sizes == LAYOUTS[layout].sizes)


def _nothing(model: Model) -> None:
    """Replicas: what DistributedDataParallel leaves the parameters as."""


def _zero1(model: Model) -> Any:
    return dist.group.WORLD


def _fsdp(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    _shard_fully(model, mesh)


def _hsdp(model: Model) -> None:
    _shard_fully(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def _shard_fully(model: Model, mesh: DeviceMesh, skip: Iterable[nn.Module] = ()) -> None:
    for module in (model.experts, model.conv, model.qkv):
        if module not in skip:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tensor_parallel(model: Model, mesh: DeviceMesh, column_wise: Iterable[str], row_wise: Iterable[str]) -> None:
    plan: dict[str, Any] = {name: ColwiseParallel(output_layouts=Replicate()) for name in column_wise}
    plan |= {name: RowwiseParallel(input_layouts=Replicate()) for name in row_wise}
    parallelize_module(model, mesh, plan)


def _tp_column(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    _tensor_parallel(model, mesh, COLUMN_WISE, ())


def _tp_row(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    _tensor_parallel(model, mesh, (), (*ROW_WISE, *_WHOLE_INPUT))


def _tp_ddp(model: Model) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(model, mesh["tp"], COLUMN_WISE, ROW_WISE)


def _tp_zero1(model: Model) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(model, mesh["tp"], COLUMN_WISE, ROW_WISE)
    return mesh.get_group("dp")


def _tp_fsdp(model: Model) -> None:
    _tp_fsdp_on(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))


def _tp_fsdp_transposed(model: Model) -> None:
    """The ranks of a shard group do not ascend: 0, 2, 1, 3."""
    _tp_fsdp_on(model, DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("dp", "tp")))


def _tp_fsdp_on(model: Model, mesh: DeviceMesh) -> None:
    _tensor_parallel(model, mesh["tp"], COLUMN_WISE, ROW_WISE)
    _shard_fully(model, mesh["dp"])


def _experts_apart(model: Model, mesh: DeviceMesh) -> None:
    """Expert parallelism: whole experts on each rank of a one-dimensional mesh."""
    for name, p in list(model.experts.named_parameters()):
        model.experts.register_parameter(name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])))


def _ep(model: Model) -> None:
    _experts_apart(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",)))


def _ep_ddp(model: Model) -> None:
    _experts_apart(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"])


def _ep_fsdp(model: Model, dimension: int) -> None:
    """Experts apart over 2 ranks, each side's share sharded over 2 along `dimension`; the rest over all 4."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    _experts_apart(model, mesh["ep"])
    fully_shard(model.experts, mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(dimension))
    _shard_fully(model, mesh["dp", "ep"]._flatten("all"), skip=[model.experts])


# EP with 3 experts over 4 ranks has empty ranks, as has FSDP2; TP needs even shards, of which FSDP2 makes uneven ones.
LAYOUTS = {
    "plain": Layout(1, UNEVEN, _nothing),
    "plain-even": Layout(1, EVEN, _nothing),
    "plain-halves": Layout(1, HALVES, _nothing),
    "ddp-2": Layout(2, UNEVEN, _nothing),
    "ddp-4": Layout(4, UNEVEN, _nothing),
    "zero1-2": Layout(2, UNEVEN, _zero1),
    "zero1-4": Layout(4, UNEVEN, _zero1),
    "fsdp-2": Layout(2, UNEVEN, _fsdp),
    "fsdp-4": Layout(4, UNEVEN, _fsdp),
    "hsdp-2x2": Layout(4, UNEVEN, _hsdp),
    "tp-column-2": Layout(2, EVEN, _tp_column),
    "tp-column-4": Layout(4, EVEN, _tp_column),
    "tp-row-2": Layout(2, EVEN, _tp_row),
    "tp-row-4": Layout(4, EVEN, _tp_row),
    "ddp-2-tp-2": Layout(4, HALVES, _tp_ddp),
    "ep-2": Layout(2, UNEVEN, _ep),
    "ep-4": Layout(4, UNEVEN, _ep),
    "ddp-2-ep-2": Layout(4, UNEVEN, _ep_ddp),
    "ep-2-fsdp-2-dim1": Layout(4, HALVES, lambda model: _ep_fsdp(model, 1)),
    "ep-2-fsdp-2-dim0": Layout(4, EVEN, lambda model: _ep_fsdp(model, 0)),
    "tp-2-fsdp-2": Layout(4, HALVES, _tp_fsdp),
    "tp-2-fsdp-2-transposed": Layout(4, HALVES, _tp_fsdp_transposed),
    "tp-2-zero1-2": Layout(4, HALVES, _tp_zero1),
}


# ---------------------------------------------------------------------------------------------- slices of whole tensors


def local_slice(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of a tensor spread as `like` is (all of it for a plain tensor)."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    shards: list[tuple[int, Placement]] = [(i, p) for i, p in enumerate(like.placements) if not p.is_replicate()]
    # FSDP2 comes after TP and EP, which it marks by _StridedShard where both cut the same dimension.
    for i, placement in sorted(shards, key=lambda pair: isinstance(pair[1], _StridedShard)):
        assert isinstance(placement, Shard | _StridedShard), placement
        parts = whole.chunk(mesh.size(i), dim=placement.dim)
        empty = whole.narrow(placement.dim, 0, 0)
        whole = parts[coordinate[i]] if coordinate[i] < len(parts) else empty
    return whole


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` as a tensor of the same kind and placement as `like`."""
    piece = local_slice(whole, like).contiguous()
    if not isinstance(like, DTensor):
        return piece.clone()
    return DTensor.from_local(
        piece.clone(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def inject(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> None:
    """Give every parameter its part of the whole gradient; None for none."""
    for name, p in model.named_parameters():
        whole = gradients[name]
        p.grad = None if whole is None else spread_like(whole, p)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor of `shape`: `values`, at the flat positions `index` of the whole."""

    shape: tuple[int, ...]
    values: Tensor
    index: Tensor


def held(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """This rank's pieces of some tensors."""
    pieces = {}
    for name, t in tensors.items():
        local = t.to_local() if isinstance(t, DTensor) else t
        index = local_slice(torch.arange(t.numel()).view(t.shape), t)
        assert index.shape == local.shape, f"{name}: rank {dist.get_rank()} holds {local.shape}, not {index.shape}"
        pieces[name] = Piece(tuple(t.shape), local.detach().clone(), index.clone())
    return pieces


def assemble(ranks: list[dict[str, Piece]]) -> dict[str, Tensor]:
    """The whole tensors. AssertionError where elements are missing or replicas differ in any bit."""
    whole = {}
    for name, first in ranks[0].items():
        full = torch.zeros(first.shape, dtype=first.values.dtype).view(-1)
        seen = torch.zeros(full.shape, dtype=torch.bool)
        for rank, pieces in enumerate(ranks):
            piece = pieces[name]
            index, values = piece.index.view(-1), piece.values.reshape(-1)
            same = torch.eq(full[index], values) | ~seen[index]
            assert bool(same.all()), f"{name}: rank {rank} holds other values than the ranks before it"
            full[index], seen[index] = values, torch.ones_like(index, dtype=torch.bool)
        assert bool(seen.all()), f"{name}: {int((~seen).sum())} elements are on no rank"
        whole[name] = full.view(first.shape)
    return whole


def differences(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not bit-equal, each with its largest difference."""
    lines = [f"{name} only in one of them" for name in sorted(set(got) ^ set(want))]
    for name in sorted(set(got) & set(want)):
        if not torch.equal(got[name], want[name]):
            gap = (got[name].double() - want[name].double()).abs()
            lines.append(f"{name} {tuple(gap.shape)}: {int((gap > 0).sum())} elements, by up to {gap.max():.3g}")
    return lines
