"""Parameters that are exchanged for sharded ones after the optimizer was made, and shardings that flatten them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from harness import Worlds
from layouts import LAYOUTS, differences, inject
from models import Model, optimizer
from tasks import OneProcess, Outcome, outcome, whole, whole_gradients
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from earthshine import Muon, param_groups
from earthshine.errors import CheckpointError, ConfigError


def put(opt: Muon, model: nn.Module) -> None:
    """The model's parameters of today into the groups, by name."""
    today = dict(model.named_parameters())
    for group in opt.param_groups:
        group["params"] = [today[name] for name in group["param_names"]]


def as_accelerate_does(layout: str, loads: str) -> Outcome:
    """Optimizer, load of its own state, sharding, other parameters. loads: when the state of zeros is loaded again."""
    model = Model(LAYOUTS[layout].sizes)
    opt = optimizer(model, LAYOUTS[layout].sizes)
    zeros = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    LAYOUTS[layout].spread(model)
    put(opt, model)
    if loads == "whole":
        opt.load_state_dict(zeros)
    if loads == "divided":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(3):
        inject(model, whole_gradients(layout, step))
        opt.step()
    return outcome(model, opt)


@pytest.mark.parametrize("loads", ["not", "whole", "divided"])
@pytest.mark.parametrize("layout", ["fsdp-4", "tp-2-fsdp-2"])
def test_parameters_that_were_sharded_later(worlds: Worlds, one_process: OneProcess, layout: str, loads: str) -> None:
    got = whole(worlds.run(4, as_accelerate_does, layout, loads))
    assert not differences(got, one_process(layout, {}, range(3)))


def zeros_of_another_layout() -> bool:
    """State of a model on the other mesh dimension: taken where it is all zeros, refused where it is not."""
    model, other = Model(LAYOUTS["fsdp-4"].sizes), Model(LAYOUTS["fsdp-4"].sizes)
    LAYOUTS["fsdp-4"].spread(model)
    LAYOUTS["hsdp-2x2"].spread(other)
    opt, theirs = (optimizer(m, LAYOUTS["fsdp-4"].sizes) for m in (model, other))
    opt.load_state_dict(theirs.state_dict())
    inject(other, whole_gradients("fsdp-4", 0))
    theirs.step()
    with pytest.raises(CheckpointError, match="is placed otherwise than the parameter"):
        opt.load_state_dict(theirs.state_dict())
    return True


def test_a_state_of_zeros_has_any_layout(worlds: Worlds) -> None:
    assert all(worlds.run(4, zeros_of_another_layout))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x + self.down(torch.relu(self.up(x))) * self.scale


def wrapped(**options: Any) -> FullyShardedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of FSDP1 and of CPUs
        return FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), **options)


def fsdp1(original: bool, sharded: bool) -> str:
    strategy = ShardingStrategy.FULL_SHARD if sharded else ShardingStrategy.NO_SHARD
    model = wrapped(use_orig_params=original, sharding_strategy=strategy)
    try:
        groups = param_groups(model)
    except ConfigError as refusal:
        assert [g["algorithm"] for g in param_groups(model, algorithm="adamw")] == ["adamw"]
        return str(refusal)
    return ", ".join(name for name, _ in groups[0]["params"])


@pytest.mark.parametrize(
    ("original", "sharded", "says"),
    [(True, True, "embed.weight of Embedding"), (False, True, "_flat_param of"), (False, False, "_flat_param of")],
)
def test_what_fsdp1_flattens_is_refused(worlds: Worlds, original: bool, sharded: bool, says: str) -> None:
    for text in worlds.run(2, fsdp1, original, sharded):
        assert text.startswith(says) and "fully_shard" in text and "adamw=" in text, text


def test_fsdp1_that_divides_nothing_leaves_matrices(worlds: Worlds) -> None:
    assert worlds.run(2, fsdp1, True, False) == ["up.weight, down.weight"] * 2


def wrapped_by_fsdp1_later() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net()
        opt = Muon(param_groups(model), lr=0.1, ns_dtype="float32")
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        model(torch.arange(4)).sum().backward()
    with pytest.raises(ConfigError) as caught:
        opt.step()
    return str(caught.value)


def test_a_model_that_fsdp1_wraps_later(worlds: Worlds) -> None:
    for text in worlds.run(2, wrapped_by_fsdp1_later):
        assert "up.weight of shape" in text and "fully_shard" in text, text
