"""What a step sends, by hand; `tests/distributed` compares it with what is reported and with what really leaves."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_ranks import as_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from earthshine import Muon


def rows_of_two(rank: int, **options: Any) -> int:
    """Bytes for [4, 6] on two ranks by rows."""
    with as_rank(rank, 2):
        w = nn.Parameter(distribute_tensor(torch.zeros(4, 6), init_device_mesh("cpu", (2,)), [Shard(0)]))
        return Muon([w], lr=0.1, ns_dtype="float32", **options).predicted_bytes()["orthogonalize"]


def test_matrices() -> None:
    """12 elements go to the owner, and 12 come back; idle flags go out only, one per piece; moments both ways."""
    assert [rows_of_two(rank) for rank in (0, 1)] == [12 * 4] * 2
    assert [rows_of_two(rank, comm_dtype="bfloat16") for rank in (0, 1)] == [12 * 2] * 2
    assert sorted(rows_of_two(rank, skip_idle=True) for rank in (0, 1)) == [48, 48 + 4]
    assert [rows_of_two(rank, normuon_beta2=0.9) for rank in (0, 1)] == [48 + 2 * 4] * 2


def test_norms_of_vectors() -> None:
    """Two vectors over four ranks: an all-reduce of two fp32 numbers, by a ring."""
    with as_rank(1, 4):
        mesh = init_device_mesh("cpu", (4,))
        vectors = [nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)])) for _ in range(2)]
        opt = Muon([{"params": vectors, "algorithm": "scion", "lmo": ("rms", "rms")}], lr=0.1)
        assert opt.predicted_bytes() == {"norms": 2 * 3 * 8 // 4}


@pytest.mark.parametrize("reduce", [False, True])
def test_zero1(reduce: bool) -> None:
    """Five rows of 4 on two ranks, 2 and 3, are padded to 12 elements; a bf16 gradient is summed in fp32."""
    with as_rank(0, 2):
        params = [nn.Parameter(torch.zeros(5, 4, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(()))]
        group = {"params": params, "algorithm": "adamw", "rounding": "stochastic"}
        opt = Muon([group], lr=0.1, process_group=dist.group.WORLD, reduce_gradients=reduce)
        flag, scalar = 1, 2 * 4  # whether there is a gradient; a sum and a count
        expected = {"gather_parameters": 12 * 2} | ({"reduce_gradients": 12 * 4 + flag + scalar} if reduce else {})
        assert opt.predicted_bytes() == expected
