"""Where the elements of a parameter are: read from the tensor itself, so that nobody passes a mesh.

A DTensor says how it is spread over processes by one placement per mesh dimension, applied from the left. On a
parameter's *shard group*, the processes among which one copy of it is divided, each process holds some rows and some
columns of the two-dimensional view of `optim.logical_matrices`; copies (HSDP's replicas) are other shard groups.

    Shard(d)                    torch.chunk of dimension d: pieces of ceil(n / degree), the last ones smaller or empty
    _StridedShard(d, split)     chunk in `split` pieces, each of them as above; a process holds its piece of each. This
                                is what FSDP2 makes of a dimension that tensor or expert parallelism has divided already
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from earthshine.errors import ConfigError, divisors
from earthshine.optim.logical_matrices import Spec, view_shape
from earthshine.optim.ranges import Ranges, cut, length, merge

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# One sharded mesh dimension: its degree, the tensor dimension, and the split of a strided shard (1: a plain one).
_Cut = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """A parameter's view, and the rows and columns of it that each process of its shard group holds.

    view: the two-dimensional view of the whole parameter.
    ranks: global ranks of the shard group, row-major over the sharded mesh dimensions; one where nothing is spread.
    position: of this process in `ranks`.
    rows, cols: per position, in the order of its local tensor, which is ascending. Where the process holds
        nothing, one of them is empty or both are.
    """

    view: tuple[int, int]
    ranks: tuple[int, ...]
    position: int
    rows: tuple[Ranges, ...]
    cols: tuple[Ranges, ...]


def read_layout(p: Tensor, spec: Spec, name: str) -> Layout:
    """The layout of a parameter; of a plain tensor, that this process holds all of it.

    Raises ConfigError for a placement that cannot hold a parameter (partial sums), for divisions that torch's own
    layers do not make (uneven along any dimension but the first, or where a strided shard is not whole), and where the
    local tensor has not the shape that the placements give it.
    """
    shape = tuple(p.shape)
    flatten = bool(spec) and spec[0] == "flatten"
    if not is_dtensor(p):
        return _layout(shape, flatten, (), (_own_rank(),), 0)
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConfigError(
            f"{name} lives on the mesh of ranks {mesh.mesh.flatten().tolist()}, which this process (rank "
            f"{_own_rank()}) is not part of: give the optimizer only parameters that this process holds a shard of."
        )
    if any(list(dims.mesh_dims) != sorted(dims.mesh_dims) for dims in getattr(p._spec, "shard_order", None) or ()):
        raise ConfigError(
            f"{name} is sharded in the order {p._spec.shard_order}, not over its mesh dimensions from the left: "
            f"distribute it without shard_order."
        )
    cuts: list[_Cut] = []
    index: list[Any] = []
    position = 0
    for dim, placement in enumerate(p.placements):
        cut = _cut_of(placement, len(shape), name)
        index.append(coordinate[dim] if cut is None else slice(None))
        if cut is not None:
            cuts.append((mesh.size(dim), *cut))
            position = position * mesh.size(dim) + coordinate[dim]
    _check_cuts(shape, tuple(cuts), name)
    ranks = tuple(mesh.mesh[tuple(index)].flatten().tolist())
    local_shape = _spread(shape, flatten, tuple(cuts))[2][position]
    with torch.no_grad():
        actual = tuple(p.to_local().shape)
    if actual != local_shape:
        raise ConfigError(
            f"{name} of shape {list(shape)} with placements {tuple(p.placements)} on a mesh of {tuple(mesh.shape)} "
            f"has a local tensor of {list(actual)} where {list(local_shape)} was expected: build it by torch's "
            f"distribute_tensor, fully_shard or parallelize_module, whose division this optimizer reads."
        )
    return _layout(shape, flatten, tuple(cuts), ranks, position)


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor, without importing what that takes: a DTensor cannot exist before its module does, which
    takes a second to import.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """A DTensor's local tensor, or the tensor itself. Call without gradients."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _own_rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _cut_of(placement: Any, dimensions: int, name: str) -> tuple[int, int] | None:
    """(tensor dimension, split) of a placement that divides, None of a replica."""
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):  # first: it has been a subclass of Shard
        return placement.dim % dimensions, int(placement.split_factor)
    if isinstance(placement, Shard):
        return placement.dim % dimensions, 1
    raise ConfigError(
        f"{name} has placement {placement}: a parameter must be replicated or sharded on every mesh dimension; "
        f"redistribute it to Replicate() or Shard(...) first."
    )


def _check_cuts(shape: tuple[int, ...], cuts: tuple[_Cut, ...], name: str) -> None:
    """Refuse divisions that leave a whole piece of a strided shard, or a dimension other than the first, uneven."""
    sizes = list(shape)
    for degree, dim, split in cuts:
        n = sizes[dim]
        if split > 1 and n % split:
            raise ConfigError(
                f"{name} of shape {list(shape)}: tensor and expert parallelism of degree {split} do not divide the {n} "
                f"of dimension {dim}, which FSDP2 divides too; degrees that work: {divisors(n)}."
            )
        if dim > 0 and n // split % degree:
            raise ConfigError(
                f"{name} of shape {list(shape)}: a mesh dimension of size {degree} does not divide the {n // split} of "
                f"dimension {dim}, and only dimension 0 may be uneven; degrees that work: {divisors(n // split)}."
            )
        sizes[dim] = split * -(-(n // split) // degree)


@cache
def _layout(
    shape: tuple[int, ...], flatten: bool, cuts: tuple[_Cut, ...], ranks: tuple[int, ...], position: int
) -> Layout:
    rows, cols, _ = _spread(shape, flatten, cuts)
    return Layout(view_shape(shape, ("flatten",) if flatten else ()), ranks, position, rows, cols)


@cache
def _spread(
    shape: tuple[int, ...], flatten: bool, cuts: tuple[_Cut, ...]
) -> tuple[tuple[Ranges, ...], tuple[Ranges, ...], tuple[tuple[int, ...], ...]]:
    """Rows, columns and local shape of every coordinate of the shard group, row-major."""
    first = 1 if flatten else max(0, len(shape) - 1)  # dimensions that make up the rows of the view
    rows, cols, local = [], [], []
    held = cache(_held)
    flat = cache(_flatten_ranges)
    for coordinate in product(*(range(degree) for degree, _, _ in cuts)):
        per_dim = tuple(
            held(n, tuple((c, i) for c, i in zip(cuts, coordinate, strict=True) if c[1] == dim))
            for dim, n in enumerate(shape)
        )
        rows.append(flat(shape[:first], per_dim[:first]))
        cols.append(flat(shape[first:], per_dim[first:]))
        local.append(tuple(map(length, per_dim)))
    return tuple(rows), tuple(cols), tuple(local)


def _held(n: int, cuts: tuple[tuple[_Cut, int], ...]) -> Ranges:
    """The indices of a dimension of size n that are left after its cuts, each with the process's coordinate in it."""
    ranges = merge([(0, n)])
    for (degree, _, split), index in cuts:
        size = length(ranges)
        whole = -(-size // split)  # torch.chunk's rule, for the pieces and for the piece of each
        pieces: list[tuple[int, int]] = []
        for start in range(0, size, whole or 1):
            part = min(whole, size - start)
            each = -(-part // degree)
            pieces.extend(cut(ranges, start + min(index * each, part), start + min((index + 1) * each, part)))
        ranges = merge(pieces)
    return ranges


def _flatten_ranges(shape: tuple[int, ...], per_dim: tuple[Ranges, ...]) -> Ranges:
    """The ranges of the flattened dimensions where each holds its own: their product, row-major."""
    ranges: Ranges = ((0, 1),)
    size = 1
    for n, held in zip(reversed(shape), reversed(per_dim), strict=True):
        if ranges == ((0, size),):
            ranges = tuple((a * size, b * size) for a, b in held)
        else:
            ranges = merge(
                (i * size + a, i * size + b) for start, stop in held for i in range(start, stop) for a, b in ranges
            )
        size *= n
    return merge(ranges) if math.prod(shape) else ()
