"""Layouts that cannot be served, and processes that disagree: an error on every rank, which says what would work."""

import pytest
import torch
import torch.distributed as dist
from harness import Worlds
from layouts import build
from models import EVEN, D, optimizer
from tasks import muon
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from earthshine import Muon
from earthshine.errors import ConfigError


def message(*args: object, **options: object) -> str:
    """The ConfigError of building Muon, or a failure."""
    with pytest.raises(ConfigError) as caught:
        Muon(*args, lr=0.1, **options)  # type: ignore[arg-type]
    return str(caught.value)


def uneven_columns() -> str:
    """RowwiseParallel of 10 input features over 4 ranks."""
    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(distribute_tensor(torch.randn(8, 10), mesh, [Shard(1)]))
    return message([("down.weight", p)])


def uneven_strided() -> str:
    """Column-wise TP of 7 rows over 2 ranks, which FSDP2 then divides."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = nn.Linear(D, 7, bias=False)
    module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh["tp"], [Shard(0)]))
    fully_shard(module, mesh=mesh["dp"])
    return message([("up.weight", module.weight)])


def partial_sums() -> str:
    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(DTensor.from_local(torch.randn(8, 8), mesh, [Partial()], run_check=False))
    return message([("w", p)])


def test_uneven_degrees_are_named(worlds: Worlds) -> None:
    for text in worlds.run(4, uneven_columns):
        assert "down.weight" in text and "4" in text and "1, 2, 5, 10" in text, text
    for text in worlds.run(4, uneven_strided):
        assert "up.weight" in text and "1, 7" in text, text
    for text in worlds.run(4, partial_sums):
        assert "w has placement P(sum)" in text and "replicated or sharded" in text, text


def torch_refuses_uneven_dim_1() -> str:
    module = nn.Linear(10, 8, bias=False)
    with pytest.raises(NotImplementedError) as caught:
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)), shard_placement_fn=lambda p: Shard(1))
    return str(caught.value)


def test_fsdp_on_dim_1_is_refused_by_torch_itself(worlds: Worlds) -> None:
    assert "uneven" in worlds.run(4, torch_refuses_uneven_dim_1)[0]


def disagree(what: str) -> str:
    rank = dist.get_rank()
    model = build("fsdp-4")
    named = [("up.weight", model.up.weight), ("down.weight", model.down.weight)]
    if what == "order":
        return message(named[::-1] if rank == 2 else named)
    if what == "matrices":
        spec = ("rows", (10, 12)) if rank == 1 else ("matrix",)
        group = {"params": named, "matrices": (spec, ("matrix",))}
        return message([group])
    options = {"ns_steps": (5, 4), "max_bucket_bytes": (1 << 20, 64), "skip_idle": (False, True)}
    several = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    return message(several, **{what: options[what][rank == 3]})


@pytest.mark.parametrize("what", ["order", "matrices", "ns_steps", "max_bucket_bytes", "skip_idle"])
def test_processes_that_disagree_are_told_so_and_do_not_wait(worlds: Worlds, what: str) -> None:
    for text in worlds.run(4, disagree, what):
        assert "same" in text and "process" in text, text


def gradient_without_a_layout() -> str:
    model = build("fsdp-4")
    opt = muon(model, "fsdp-4")
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        model.up.weight.grad = torch.zeros(22, D)  # torch refuses the assignment, or Muon the gradient
        opt.step()
    return str(caught.value)


def test_a_plain_gradient_of_a_sharded_parameter(worlds: Worlds) -> None:
    assert all(worlds.run(4, gradient_without_a_layout))


def two_worlds_in_one() -> bool:
    """A plain model on every rank needs no agreement: each process is on its own."""
    from models import Model

    opt = optimizer(Model(EVEN), EVEN, ns_steps=5 - dist.get_rank() % 2)
    return all(v == 0 for v in opt.predicted_bytes().values())


def test_plain_parameters_need_no_agreement(worlds: Worlds) -> None:
    assert all(worlds.run(2, two_worlds_in_one))


def disagree_about_shares(algorithm: str) -> str:
    """ZeRO-1: parameters in another order on one rank would be gathered into each other."""
    a, b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 4))
    params = [a, b] if dist.get_rank() == 0 else [b, a]
    return message([{"params": params, "algorithm": algorithm}], process_group=dist.group.WORLD)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_zero1_over_processes_that_disagree(worlds: Worlds, algorithm: str) -> None:
    for text in worlds.run(2, disagree_about_shares, algorithm):
        assert "same" in text and "process" in text, text


def outside_of_the_group() -> str:
    """A group of ranks 0 and 1, in the hands of the others."""
    group = dist.new_group([0, 1])
    p = nn.Parameter(torch.ones(4, 4))
    if dist.get_rank() < 2:
        Muon([p], lr=0.1, process_group=group)
        return ""
    return message([p], process_group=group)


def test_a_process_outside_the_zero1_group_is_refused(worlds: Worlds) -> None:
    texts = worlds.run(4, outside_of_the_group)
    assert texts[:2] == ["", ""]
    assert all("process_group=" in text and "that this process (rank" in text for text in texts[2:])


def scalars() -> tuple[float, float]:
    """A scalar and its mean gradient, of which one rank has none."""
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = Muon(
        [{"params": [p], "algorithm": "adamw"}], lr=0.1, process_group=dist.group.WORLD, reduce_gradients=True
    )
    p.grad = torch.tensor(float(dist.get_rank())) if dist.get_rank() else None
    optimizer.step()
    assert optimizer.last_stats["bytes_sent"] == optimizer.predicted_bytes()
    return p.item(), float(optimizer.state[p]["exp_avg"])


def test_scalars_are_averaged_though_not_divided(worlds: Worlds) -> None:
    found = worlds.run(4, scalars)
    assert len(set(found)) == 1
    assert found[0][1] == pytest.approx((1 - 0.9) * (0 + 1 + 2 + 3) / 4, rel=1e-6)  # of fp32


def groups_of_another_number() -> bool:
    """Half of the world on a mesh of two dimensions, whose ranks have made unequally many groups before."""
    if dist.get_rank() in (0, 3):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "dp", "tp"))["dp", "tp"]
    p = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0), Shard(1)]))
    optimizer = Muon([p], lr=0.1, ns_dtype="float32")
    p.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0), Shard(1)])
    optimizer.step()
    return optimizer.last_stats["bytes_sent"] == optimizer.predicted_bytes()


def test_ranks_with_other_groups_besides_do_not_wait_for_each_other(worlds: Worlds) -> None:
    assert all(worlds.run(4, groups_of_another_number))
