"""Where a parameter's elements are, against torch's own division, of every rank, without processes.

torch's "fake" backend runs one rank of a world whose others do not exist: its layers divide parameters as they do in
earnest, and nothing is communicated.
"""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import as_rank, numbered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec
from earthshine.optim.ranges import Ranges, length
from earthshine.optim.sharding.layout import _spread, read_layout

MATRIX: Spec = ("matrix",)


def indices(ranges: Ranges) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


def held(whole: Tensor, view: tuple[int, int], rows: Ranges, cols: Ranges) -> Tensor:
    return whole.reshape(view)[indices(rows)][:, indices(cols)]


def assert_well_formed(ranges: Ranges) -> None:
    assert all(start < stop for start, stop in ranges)
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))


@st.composite
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, Any], ...]]:
    """A shape, and per mesh dimension its size and the placement."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dims = st.integers(0, len(shape) - 1)
    placements = st.one_of(
        st.builds(Shard, dims), st.builds(lambda d, n: _StridedShard(d, split_factor=n), dims, st.integers(1, 4))
    )
    return shape, tuple(draw(st.lists(st.tuples(st.integers(1, 4), placements), max_size=3)))


@given(divided(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_indices_are_torchs_for_any_shape_mesh_and_placements(
    division: tuple[tuple[int, ...], tuple[tuple[int, Any], ...]], flatten: bool
) -> None:
    shape, mesh = division
    whole = numbered(*shape)
    view = (shape[0], whole.numel() // shape[0]) if flatten else (whole.numel() // shape[-1], shape[-1])
    cuts = tuple((degree, p.dim, getattr(p, "split_factor", 1)) for degree, p in mesh)
    rows, cols, local_shapes = _spread(shape, flatten, cuts)
    seen = []
    for position, coordinate in enumerate(product(*(range(degree) for degree, _ in mesh))):
        local = whole
        for (degree, placement), i in zip(mesh, coordinate, strict=True):
            local = placement._split_tensor(local, degree, with_padding=False)[0][i]
        assert local_shapes[position] == tuple(local.shape)
        torchs = _compute_local_shape_and_global_offset(
            shape, tuple(degree for degree, _ in mesh), list(coordinate), [p for _, p in mesh]
        )
        assert local_shapes[position] == torchs[0]
        assert_well_formed(rows[position])
        assert_well_formed(cols[position])
        if local.numel():
            got = held(whole, view, rows[position], cols[position])
            assert torch.equal(got.flatten(), local.flatten())
        else:
            assert length(rows[position]) * length(cols[position]) == 0
        seen.append(local.flatten())
    assert torch.equal(torch.cat(seen).sort().values, whole.flatten())


def linear(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def fsdp(weight: Tensor, mesh: DeviceMesh, dim: int = 0) -> DTensor:
    module = linear(weight)
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda _: Shard(dim))
    return module.weight  # type: ignore[return-value]


def spread(weight: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    return distribute_tensor(weight, mesh, placements, src_data_rank=None)


def line(name: str = "dp") -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=(name,))


def square(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def fsdp_of_tp(shape: tuple[int, ...], tp_dim: int, dp_dim: int = 0) -> DTensor:
    mesh = square("dp", "tp")
    return fsdp(spread(numbered(*shape), mesh["tp"], Shard(tp_dim)), mesh["dp"], dp_dim)


FOUR = (0, 1, 2, 3)
# What torch's layers make of a parameter on 4 ranks, the specification, and rank 3's shard group.
LAYERS: dict[str, tuple[Callable[[], Tensor], Spec, tuple[int, ...]]] = {
    "plain": (lambda: numbered(6, 4), MATRIX, (3,)),
    "replicated": (lambda: spread(numbered(6, 4), line(), Replicate()), MATRIX, (3,)),
    "fsdp": (lambda: fsdp(numbered(8, 4), line()), MATRIX, FOUR),
    "fsdp, uneven": (lambda: fsdp(numbered(10, 4), line()), MATRIX, FOUR),
    "fsdp, empty shard": (lambda: fsdp(numbered(5, 4), line()), MATRIX, FOUR),
    "fsdp, columns": (lambda: fsdp(numbered(5, 4), line(), 1), MATRIX, FOUR),
    "fsdp of a stack": (lambda: fsdp(numbered(5, 3, 4), line()), ("batch",), FOUR),
    "fsdp of a stack's rows": (lambda: fsdp(numbered(3, 8, 3), line(), 1), ("batch",), FOUR),
    "fsdp of a stack's columns": (lambda: fsdp(numbered(3, 2, 8), line(), 2), ("batch",), FOUR),
    "fsdp of a kernel": (lambda: fsdp(numbered(6, 2, 3, 3), line()), ("flatten", 2), FOUR),
    "fsdp of a kernel's inputs": (lambda: fsdp(numbered(6, 4, 3, 3), line(), 1), ("flatten", 2), FOUR),
    "hsdp": (lambda: fsdp(numbered(5, 4), square("replicate", "shard")), MATRIX, (2, 3)),
    "tp rows": (lambda: spread(numbered(8, 3), line("tp"), Shard(0)), MATRIX, FOUR),
    "tp columns": (lambda: spread(numbered(3, 8), line("tp"), Shard(-1)), MATRIX, FOUR),
    "tp beside replicas": (
        lambda: spread(numbered(4, 4), square("dp", "tp"), Replicate(), Shard(1)),
        MATRIX,
        (2, 3),
    ),
    "replicas inside": (lambda: spread(numbered(4, 4), square("tp", "dp"), Shard(1), Replicate()), MATRIX, (1, 3)),
    "fsdp of tp rows": (lambda: fsdp_of_tp((10, 4), 0), MATRIX, FOUR),  # 5 rows a rank: 3 and 2
    "fsdp of tp rows, empty": (lambda: fsdp_of_tp((2, 4), 0), MATRIX, FOUR),
    "fsdp of tp columns": (lambda: fsdp_of_tp((5, 4), 1), MATRIX, FOUR),
    "fsdp columns of tp columns": (lambda: fsdp_of_tp((3, 8), 1, 1), MATRIX, FOUR),
    "experts": (lambda: spread(numbered(6, 3, 4), line("ep"), Shard(0)), ("batch",), FOUR),
    "fsdp of experts": (lambda: fsdp_of_tp((6, 3, 4), 0), ("batch",), FOUR),
    "fsdp of experts' rows": (lambda: fsdp_of_tp((2, 4, 3), 0, 1), ("rows", (3, 1)), FOUR),
    "fsdp of tp of experts": (lambda: fsdp_of_tp((3, 4, 2), 1), ("batch",), FOUR),
    "two axes, from the left": (lambda: spread(numbered(7, 3), square("a", "b"), Shard(0), Shard(0)), MATRIX, FOUR),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layouts_of_torchs_layers(case: str) -> None:
    make, spec, group = LAYERS[case]
    layouts, pieces = [], []
    for rank in range(4):
        with as_rank(rank, 4):
            p = make()
            layout = read_layout(p, spec, "w")
            local = p.detach().to_local() if isinstance(p, DTensor) else p
            whole = numbered(*p.shape)
            assert layout.ranks[layout.position] == rank
            got = held(whole, layout.view, layout.rows[layout.position], layout.cols[layout.position])
            assert torch.equal(got.flatten(), local.flatten())
            layouts.append(layout)
            pieces.append(got)
    assert layouts[3].ranks == group
    # All processes of a shard group see the same rows and columns, and hold the parameter once together.
    members = [layouts[rank] for rank in group]
    assert len({(m.ranks, m.rows, m.cols) for m in members}) == 1
    together = torch.cat([pieces[rank].flatten() for rank in group]).sort().values
    assert torch.equal(together, whole.flatten())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: spread(numbered(3, 6), line(), Shard(1)),
            r"w of shape \[3, 6\]: a mesh dimension of size 4 does not divide the 6 of dimension 1, and only "
            r"dimension 0 may be uneven; degrees that work: 1, 2, 3, 6\.",
        ),
        (
            lambda: spread(numbered(3, 6), square("a", "b"), Shard(1), Shard(1)),
            r"a mesh dimension of size 2 does not divide the 3 of dimension 1, .* degrees that work: 1, 3\.",
        ),
        (
            lambda: fsdp_of_tp((9, 4), 0),
            r"w of shape \[9, 4\]: tensor and expert parallelism of degree 2 do not divide the 9 of dimension 0, which "
            r"FSDP2 divides too; degrees that work: 1, 3, 9\.",
        ),
        (
            lambda: DTensor.from_local(numbered(3, 4), line(), [Partial()]),
            r"w has placement P\(sum\): a parameter must be replicated or sharded",
        ),
        (
            lambda: DTensor.from_local(numbered(3, 4), line(), [Shard(0)], shape=torch.Size([8, 4]), stride=(4, 1)),
            r"w of shape \[8, 4\] .* has a local tensor of \[3, 4\] where \[2, 4\] was expected",
        ),
    ],
)
def test_divisions_that_torchs_layers_do_not_make_are_refused(make: Callable[[], Tensor], message: str) -> None:
    with as_rank(0, 4):
        p = make()
        with pytest.raises(ConfigError, match=message):
            read_layout(p, MATRIX, "w")


def test_a_parameter_of_other_ranks_is_refused() -> None:
    with as_rank(3, 4):
        mesh = DeviceMesh("cpu", [0, 1])
        p = DTensor.from_local(torch.empty(0, 4), mesh, [Shard(0)], shape=torch.Size([8, 4]), stride=(4, 1))
        with pytest.raises(ConfigError, match=r"w lives on the mesh of ranks \[0, 1\], which this process \(rank 3\)"):
            read_layout(p, MATRIX, "w")


def test_another_order_of_sharding_is_refused() -> None:
    with as_rank(0, 4):
        p = spread(numbered(8, 4), square("a", "b"), Shard(0), Shard(0))
        p._spec.shard_order = (SimpleNamespace(tensor_dim=0, mesh_dims=(1, 0)),)
        with pytest.raises(ConfigError, match="distribute it without shard_order"):
            read_layout(p, MATRIX, "w")


def test_equal_parameters_share_their_layout() -> None:
    assert read_layout(numbered(6, 4), MATRIX, "a").rows is read_layout(numbered(6, 4), MATRIX, "b").rows
