"""Gradients that `Muon` cannot take: a ConfigError that names the parameter, before anything is changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*(shape or (4, 6))))


def muon(params: Any = None, **options: Any) -> Muon:
    return Muon([matrix()] if params is None else params, **{"lr": 0.1, "ns_dtype": "float32"} | options)


class Rows(nn.Module):
    """Matrices beside an embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(10, 8, sparse=True), nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)

    def forward(self, rows: Tensor) -> Tensor:
        return self.up(self.users(rows) + self.items(rows)).square().mean()


@pytest.mark.parametrize("non_matrix", ["adamw", "scion"])
def test_a_sparse_gradient_is_refused_by_name_before_any_update(non_matrix: str) -> None:
    model = Rows()
    optimizer = muon(param_groups(model, non_matrix=non_matrix, matrices={"up.weight": ("matrix",)}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.tensor([1, 2])).backward()
    with pytest.raises(ConfigError, match=r"users\.weight has a sparse gradient .*sparse=False"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_gradient_of_another_shape_is_refused_before_any_update(algorithm: str) -> None:
    """torch sees to it at assignment, not where `.data` is exchanged after the backward pass."""
    p, q = matrix(), matrix()
    optimizer = muon([{"params": [("p", p)]}, {"params": [("q", q)], "algorithm": algorithm}])
    p.grad, q.grad = torch.ones(4, 6), torch.ones(4, 6)
    q.data = torch.ones(6, 4)
    with pytest.raises(ConfigError, match=r"q of shape \[6, 4\] .* has a gradient of shape \[4, 6\]"):
        optimizer.step()
    assert torch.equal(p, matrix())


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_of_another_precision_is_a_gradient(algorithm: str, dtype: torch.dtype) -> None:
    p, q = matrix(), matrix()
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    p.grad_dtype = dtype
    p.grad, q.grad = g, g.float()
    for each in (p, q):
        muon([{"params": [each], "algorithm": algorithm}]).step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float64's last bits


def test_a_closure_that_fails_changes_nothing() -> None:
    p = matrix()
    optimizer = muon([p])
    p.grad = torch.ones(4, 6)

    def closure() -> float:
        raise ArithmeticError("overflow")

    with pytest.raises(ArithmeticError, match="overflow"):
        optimizer.step(closure)
    assert torch.equal(p, matrix())
    assert not optimizer.state[p]["momentum_sum"].any()
