"""Local shards of plain tensors and DTensors; those of ZeRO-1 are in test_zero1.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import as_rank, numbered
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec
from earthshine.optim.sharding.local_shards import LocalShards


def shards_of(*params: Tensor, spec: Spec = ("matrix",)) -> LocalShards:
    return LocalShards(params, [spec] * len(params), [f"p{i}" for i in range(len(params))])


def by_rows(whole: Tensor, world: int) -> Any:
    return nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)], src_data_rank=None))


def test_of_a_plain_tensor_all_is_here() -> None:
    p = nn.Parameter(numbered(3, 4))
    shards = shards_of(p)
    assert shards.weight(0).data_ptr() == p.data_ptr()
    assert not shards.weight(0).requires_grad
    assert (shards.layout(0).ranks, shards.view2d(0, p).shape) == ((0,), (3, 4))
    p.grad = torch.ones(3, 4)
    grads, sent = shards.gradients()
    assert (grads[0] is p.grad, sent, shards.gather_weights()) == (True, 0, 0)


@pytest.mark.parametrize(
    ("shape", "spec", "per_row"),
    [((3, 4), ("matrix",), (3, 1)), ((2, 3, 4), ("batch",), (2, 3, 1)), ((6, 2, 5), ("flatten", 2), (6, 1, 1))],
)
def test_state_has_the_parameters_shape_or_one_value_per_row(
    shape: tuple[int, ...], spec: Spec, per_row: tuple[int, ...]
) -> None:
    shards = shards_of(nn.Parameter(numbered(*shape)), spec=spec)
    for is_per_row, expected in ((False, shape), (True, per_row)):
        state = shards.new_state(0, torch.bfloat16, is_per_row)
        assert (tuple(state.shape), state.dtype) == (expected, torch.bfloat16)
        assert shards.state_shape(0, is_per_row) == expected


def test_of_a_dtensor_its_local_tensor_is_here() -> None:
    whole = numbered(5, 4)
    with as_rank(1, 2):
        p = by_rows(whole, 2)
        shards = shards_of(p)
        assert torch.equal(shards.weight(0), whole[3:])
        assert shards.layout(0).ranks == (0, 1)
        assert shards.view2d(0, shards.weight(0)).shape == (2, 4)
        state = shards.new_state(0, torch.float32)
        assert isinstance(state, DTensor)
        assert (state.placements, tuple(state.shape)) == (p.placements, (5, 4))
        assert shards.to_dtensor({0: state}, per_row=False)[0] is state
        assert shards.from_dtensor({0: state}, per_row=False)[0].shape == (2, 4)


def test_one_value_per_row_is_on_every_rank_that_has_some_of_its_columns() -> None:
    with as_rank(1, 2):
        p = nn.Parameter(distribute_tensor(numbered(5, 4), init_device_mesh("cpu", (2,)), [Shard(1)]))
        state: Any = shards_of(p).new_state(0, torch.float32, per_row=True)
        assert (tuple(state.shape), state.placements) == ((5, 1), (Replicate(),))


def test_saved_state_has_to_be_placed_alike() -> None:
    with as_rank(0, 2):
        shards = shards_of(by_rows(numbered(4, 4), 2))
        state: Any = shards.new_state(0, torch.float32)
        assert shards.state_fits(0, state, state.clone())
        assert not shards.state_fits(0, state, torch.zeros(4, 4))
        assert not shards.state_fits(0, state, state.redistribute(placements=[Replicate()]))
        zeros: Any = shards.saved_zeros(0, state, per_row=False)
        assert shards.state_fits(0, state, zeros)
    plain = shards_of(nn.Parameter(numbered(4, 4)))
    assert plain.state_fits(0, torch.zeros(4, 4), torch.zeros(4, 4))


def test_a_partial_gradient_is_reduced_to_where_its_parameter_is() -> None:
    with as_rank(1, 2):
        p = by_rows(numbered(4, 4), 2)
        p.grad = DTensor.from_local(torch.ones(4, 4), p.device_mesh, [Partial()], run_check=False)
        assert shards_of(p).gradients()[0][0].shape == (2, 4)


def test_gradients_that_no_step_could_take() -> None:
    p = nn.Parameter(numbered(3, 4))
    shards = shards_of(p)
    shards.check_gradients()
    p.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(ConfigError, match="p0 has a sparse gradient"):
        shards.check_gradients()
    p.grad = torch.ones(3, 4)
    p.data = p.data[:2]
    with pytest.raises(ConfigError, match=r"p0 of shape \[2, 4\] .* gradient of shape \[3, 4\]"):
        shards.check_gradients()
    with as_rank(0, 2):
        shards = shards_of(by_rows(numbered(4, 4), 2))
        shard: Any = shards._shards[0]
        # torch refuses this gradient where it is assigned to the parameter, but not where a subclass has its own.
        shard.param = SimpleNamespace(shape=shard.param.shape, device=shard.param.device, grad=torch.ones(4, 4))
        with pytest.raises(ConfigError, match="p0 is a DTensor but its gradient is a plain tensor"):
            shards.check_gradients()
