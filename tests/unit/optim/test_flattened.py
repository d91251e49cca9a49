"""Weights in which no matrix can be seen: refused by name, with what keeps matrices whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon

MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(4, 6), "weight"),
    "embedding": (lambda: nn.Embedding(4, 6), "weight"),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), "weight"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "recurrent": (lambda: nn.LSTM(4, 6), "weight_ih_l0"),
}


class Declared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.ones(24))

    def logical_matrices(self) -> dict[str, Any]:
        return {"stack": ("batch",)}


def flatten(module: nn.Module, name: str, elements: int) -> None:
    """A run of a weight's elements in its place, as FSDP1 (use_orig_params) and ZeRO-3 leave it."""
    setattr(module, name, nn.Parameter(getattr(module, name).detach().flatten()[:elements].clone()))


@pytest.mark.parametrize("elements", [0, 5])
@pytest.mark.parametrize("kind", list(MODULES))
def test_a_piece_of_a_weight_is_not_a_vector(kind: str, elements: int) -> None:
    make, name = MODULES[kind]
    model = nn.ModuleDict({"block": make()})
    flatten(model["block"], name, elements)
    for non_matrix in ("adamw", "scion"):
        with pytest.raises(ConfigError, match=rf"block\.{name} of .*\[{elements}\]: .*FSDP1.*fully_shard.*adamw="):
            param_groups(model, non_matrix=non_matrix)
    asked = param_groups(model, algorithm="adamw")  # element by element: whole or not is the same
    assert [g["algorithm"] for g in asked] == ["adamw"]


def test_a_flattened_stack_that_its_module_declares() -> None:
    with pytest.raises(ConfigError, match=r"stack of Declared has the shape \[24\].*fully_shard"):
        param_groups(Declared())


def test_marks_of_fsdp1_and_zero3_are_read() -> None:
    """A bare parameter says nothing by its module; FSDP1's flat parameter and ZeRO-3's note of the shape do."""
    for mark, value in (("_is_flat_param", True), ("ds_shape", torch.Size([4, 6]))):
        model = nn.Module()
        model.p = nn.Parameter(torch.ones(24))
        setattr(model.p, mark, value)
        with pytest.raises(ConfigError, match=r"p of Module has the shape \[24\].*ZeRO-3.*fully_shard"):
            param_groups(model)


def test_vectors_are_vectors() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.PReLU(6), nn.Linear(6, 4))
    assert [len(g["params"]) for g in param_groups(model)] == [1, 4]


def test_a_vector_in_a_muon_group_may_have_been_a_matrix() -> None:
    with pytest.raises(ConfigError, match=r"w of shape \[24\] is not one matrix: .*fully_shard"):
        Muon([("w", nn.Parameter(torch.ones(24)))], lr=0.1)


def test_a_weight_that_is_flattened_after_construction() -> None:
    """accelerate wraps by FSDP1 after the optimizer was made: the same parameters hold pieces then."""
    p, q = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([("q", q), ("w", p)], lr=0.1, ns_dtype="float32")
    p.data = torch.ones(12)
    p.grad, q.grad = torch.ones(12), torch.ones(4, 6)
    with pytest.raises(ConfigError, match=r"w of shape \[12\] is not one matrix: .*fully_shard"):
        optimizer.step()
    assert torch.equal(q, torch.ones(4, 6))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_lazy_weight_has_no_shape_yet(algorithm: str) -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ConfigError, match=r"0\.weight.* has no shape yet.*forward"):
        Muon(param_groups(model, algorithm=algorithm), lr=0.1)
    with pytest.raises(ConfigError, match=r"parameter 0 has no shape yet.*forward"):
        Muon([{"params": model.parameters(), "algorithm": algorithm}], lr=0.1)
    model(torch.ones(2, 3))
    param_groups(model)
