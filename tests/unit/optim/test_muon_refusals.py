"""What `Muon` cannot take: a ConfigError that names the option or the parameter, before anything is changed."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*(shape or (4, 6))))


def muon(params: Any = None, **options: Any) -> Muon:
    return Muon([matrix()] if params is None else params, **{"lr": 0.1, "ns_dtype": "float32"} | options)


# ------------------------------------------------------------------------------------------------------------- options

NUMBERS = ["lr", "weight_decay", "momentum", "eps", "update_rms", "normuon_beta2", "beta1", "schatten_p"]
NO_NUMBERS = ["1e-3", "", True, 1j, [0.1], float("nan"), -0.1, torch.ones(2), torch.tensor(True), np.array([0.1, 0.2])]
WORDS = ["scale", "norm", "ns_coefficients", "ns_dtype", "ns_form", "momentum_dtype", "comm_dtype", "rounding"]
FLAGS = ["nesterov", "exact_rms", "ns_compile", "cautious_weight_decay", "skip_idle", "reduce_gradients"]
WHOLE = ["ns_steps", "rounding_seed", "max_bucket_bytes"]
NO_OPTIONS = (
    [(name, value) for name in NUMBERS for value in NO_NUMBERS]
    + [(name, None) for name in ("lr", "weight_decay", "momentum", "eps", "update_rms", "beta1")]
    + [(name, float("inf")) for name in NUMBERS if name != "schatten_p"]
    + [(name, value) for name in WORDS for value in ("", "fp32", None, 3, torch.float32, ["a"], np.array(["a", "b"]))]
    + [(name, value) for name in FLAGS for value in ("yes", None, 1, torch.tensor(1))]
    + [(name, value) for name in WHOLE for value in ("5", 0.5, True, torch.tensor(5))]
    + [("algorithm", value) for value in ("sgd", None, 3, ["muon"])]
    + [("matrices", value) for value in (7, "matrix", [None], ["matrix"], [("rows",)], [("rows", "ab")])]
    + [("ns_coefficients", value) for value in ({"a": 1}, [["a", "b", "c"]], [[1, 2]], [], 3.0)]
    + [("betas", value) for value in (0.9, "0.9", None, (0.9,), (0.9, "0.95"), (0.9, None), (0.9, 1.0), {"beta1": 0.9})]
)


@pytest.mark.parametrize(("name", "value"), NO_OPTIONS, ids=lambda value: str(value)[:12])
def test_an_option_of_another_type_or_range_is_named(name: str, value: Any) -> None:
    options = {"norm": "schatten", "schatten_p": value} if name == "schatten_p" else {name: value}
    message = {"beta1": "beta", "betas": "beta", "matrices": "matrices"}.get(name, name)
    options = {"betas": (value, 0.95)} if name == "beta1" else options
    make: Callable[[], Muon] = lambda: muon(**options)  # noqa: E731
    if name in ("algorithm", "matrices"):
        make = lambda: muon([{"params": [matrix()]} | options])  # noqa: E731
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "value", [0.25, np.float64(0.25), np.float32(0.25), Fraction(1, 4), torch.tensor(0.25), torch.tensor([0.25])]
)
def test_numbers_of_other_libraries_are_numbers(value: Any) -> None:
    names = [name for name in NUMBERS if name not in ("beta1", "lr", "schatten_p")]
    optimizer = muon(**dict.fromkeys(names, value), betas=(value, value), lr=value)
    (group,) = optimizer.param_groups
    assert [(group[name], type(group[name])) for name in names] == [(0.25, float)] * len(names)
    assert group["betas"] == (0.25, 0.25)
    assert float(group["lr"]) == 0.25 and isinstance(group["lr"], Tensor) == isinstance(value, Tensor)
    assert muon(ns_steps=np.int64(3)).param_groups[0]["ns_steps"] == 3


def test_text_is_told_how_yaml_reads_numbers() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr='1e-3' is of type str: it must be a number; YAML reads"):
        muon(lr="1e-3")
    with pytest.raises(ConfigError, match=r"optimizer\.eps='1e-8' is of type str"):
        OptimizerConfig(eps="1e-8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weight_decay=Decimal\('0.1'\)"):
        muon(weight_decay=Decimal("0.1"))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "betas"])
@pytest.mark.parametrize("value", ["0.1", None, float("nan"), -1.0])
def test_what_a_loop_sets_is_checked_before_the_step(name: str, value: Any) -> None:
    first, second = matrix(), matrix()
    optimizer = muon([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1][name] = (value, 0.95) if name == "betas" else value
    first.grad = second.grad = torch.ones(4, 6)
    with pytest.raises(ConfigError, match="beta1" if name == "betas" else name):
        optimizer.step()
    assert torch.equal(first, matrix())
    optimizer.param_groups[1][name] = (np.float32(0.5), 0.5) if name == "betas" else np.float32(0.5)
    optimizer.step()


@pytest.mark.parametrize(("name", "value"), [("nesterov", "no"), ("norm", "l2"), ("scale", "huge"), ("betas", 0.9)])
def test_other_options_that_a_loop_sets_are_checked_too(name: str, value: Any) -> None:
    first, second = matrix(), matrix()
    optimizer = muon([{"params": [first]}, {"params": [second]}])
    optimizer.param_groups[1][name] = value
    first.grad = second.grad = torch.ones(4, 6)
    with pytest.raises(ConfigError, match=name):
        optimizer.step()
    assert torch.equal(first, matrix())


# ---------------------------------------------------------------------------------------------------------- parameters


def test_what_is_no_list_of_parameters() -> None:
    with pytest.raises(ConfigError, match=r"params is a Linear: give Muon param_groups\(model\)"):
        muon(nn.Linear(2, 3))
    with pytest.raises(ConfigError, match=r"entries \['algorithm'.* has no 'params'"):
        muon([{"algorithm": "muon"}])


@pytest.mark.parametrize("apart", [False, True])
def test_a_parameter_that_is_given_twice_is_named(apart: bool) -> None:
    p = matrix()
    groups = [{"params": [("up", p)]}, {"params": [("head", p)], "algorithm": "adamw"}]
    with pytest.raises(ConfigError, match=r"head of shape \[4, 6\] is given twice"):
        muon(groups if apart else [("up", p), ("head", p)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_parameters_that_are_no_real_numbers(dtype: torch.dtype, algorithm: str) -> None:
    p = nn.Parameter(torch.ones(4, 6).to(dtype), requires_grad=dtype.is_complex)
    with pytest.raises(ConfigError, match=f"w has dtype {dtype}: Muon takes real floating-point parameters"):
        muon([{"params": [("w", p)], "algorithm": algorithm}])


def test_a_sparse_parameter() -> None:
    p = nn.Parameter(torch.ones(4, 6).to_sparse())
    with pytest.raises(ConfigError, match=r"w has the layout torch\.sparse_coo"):
        muon([{"params": [("w", p)], "algorithm": "adamw"}])


# ----------------------------------------------------------------------------------------------------------- gradients


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
