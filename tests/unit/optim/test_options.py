"""optim/options.py and optim/config.py: every option is declared once, in GroupOptions."""

import inspect
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.config import GroupOptions, OptimizerConfig
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon
from earthshine.optim.options import DEFAULTS


def test_the_keywords_of_muon_are_the_group_options_with_their_defaults() -> None:
    """Written out in Muon.__init__, for editors and type checkers; this holds the two together."""
    keywords = dict(inspect.signature(Muon).parameters)
    shared = {"params", "lr", "process_group", "reduce_gradients", "max_bucket_bytes"}  # lr has no default there
    assert {name: p.default for name, p in keywords.items() if name not in shared} == {
        name: default for name, default in DEFAULTS.items() if name != "lr"
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in keywords.items() if name not in ("params", "lr"))


def test_options_of_a_group_and_of_a_config_are_one_another() -> None:
    values = {"betas": (0.8, 0.9), "ns_coefficients": ((2.0, -1.5, 0.5),), "lr": 0.5, "rounding_seed": 7}
    options = GroupOptions.of_group(DEFAULTS | values)
    assert options == GroupOptions(
        lr=0.5, beta1=0.8, beta2=0.9, ns_coefficients="table", ns_table=((2.0, -1.5, 0.5),), rounding_seed=7
    )
    assert options.as_group() == DEFAULTS | values
    assert OptimizerConfig(momentum=0.5, non_matrix="scion").as_group() == DEFAULTS | {"momentum": 0.5}


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*(shape or (4, 6))))


def muon(params: Any = None, **options: Any) -> Muon:
    return Muon([matrix()] if params is None else params, **{"lr": 0.1, "ns_dtype": "float32"} | options)


# ------------------------------------------------------------------------------------------------------------- options

KINDS = get_type_hints(GroupOptions)
NUMBERS = [name for name, kind in KINDS.items() if kind is float and name != "beta2"]  # as beta1
NO_NUMBERS = ["1e-3", "", True, 1j, [0.1], float("nan"), -0.1, torch.ones(2), torch.tensor(True), np.array([0.1, 0.2])]
WORDS = [name for name, kind in KINDS.items() if kind is str or get_origin(kind) is Literal]
FLAGS = [*(name for name, kind in KINDS.items() if kind is bool), "reduce_gradients"]
WHOLE = [*(name for name, kind in KINDS.items() if kind is int), "max_bucket_bytes"]
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


def test_what_is_not_a_list_of_parameters() -> None:
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


@pytest.mark.parametrize(("option", "value"), [("skip_idle", True), ("ns_steps", 3), ("normuon_beta2", 0.9)])
def test_what_plan_and_state_were_made_for_cannot_change_afterwards(option: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([p], lr=0.1, ns_dtype="float32")
    optimizer.param_groups[0][option] = value
    p.grad = torch.ones(4, 6)
    with pytest.raises(ConfigError, match=f"{option} of a parameter group was changed .* after construction"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 6))


# ------------------------------------------------------------------------------- options by the names they had before


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def test_keywords_and_groups_are_read_by_their_old_names() -> None:
    """A FutureWarning each, at the line that has to change; nothing is read under both names."""
    said = "payload_dtype is called comm_dtype now"
    with pytest.warns(FutureWarning, match=said) as given:
        optimizer = Muon([linear().weight], lr=0.1, payload_dtype="bfloat16")  # type: ignore[call-arg]
    assert [warning.filename for warning in given] == [__file__]
    assert optimizer.param_groups[0]["comm_dtype"] == "bfloat16"
    assert "payload_dtype" not in optimizer.param_groups[0] | optimizer.defaults
    with pytest.warns(FutureWarning, match=said) as given:
        optimizer.add_param_group({"params": [linear().weight], "payload_dtype": "float32"})
    assert [warning.filename for warning in given] == [__file__]
    assert optimizer.param_groups[1]["comm_dtype"] == "float32"
    with pytest.warns(FutureWarning, match="rest is called non_matrix now") as given:
        groups = param_groups(linear(), rest="scion")  # type: ignore[call-arg]
    assert [warning.filename for warning in given] == [__file__]
    assert [group["algorithm"] for group in groups] == ["muon", "scion"]
    with pytest.warns(FutureWarning, match="rest is called non_matrix now"):
        assert OptimizerConfig(rest="scion") == OptimizerConfig(non_matrix="scion")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="payload_dtype is the old name of comm_dtype: give one of them"):
        Muon([linear().weight], lr=0.1, payload_dtype="auto", comm_dtype="auto")  # type: ignore[call-arg]


def test_what_was_saved_under_old_names_is_loaded_without_a_word() -> None:
    """Its owner cannot change it. A value that differs is still refused."""

    def older(comm_dtype: str) -> Muon:
        optimizer = Muon([("w", linear().weight)], lr=0.1, momentum=0.5, comm_dtype=comm_dtype)
        for options in (*optimizer.param_groups, optimizer.defaults):
            options["payload_dtype"] = options.pop("comm_dtype")
        return optimizer

    saved = torch.optim.Optimizer.state_dict(older("bfloat16"))
    assert "payload_dtype" in saved["param_groups"][0]
    Muon([("w", linear().weight)], lr=0.1, momentum=0.5, comm_dtype="bfloat16").load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"group 0 comm_dtype: bfloat16 \(saved\) -> auto"):
        Muon([("w", linear().weight)], lr=0.1, momentum=0.5).load_state_dict(saved)
    loaded: Muon = pickle.loads(pickle.dumps(older("bfloat16")))
    assert loaded.param_groups[0]["comm_dtype"] == loaded.defaults["comm_dtype"] == "bfloat16"
    loaded.add_param_group({"params": [("v", linear().weight)]})
    assert [group.get("payload_dtype") for group in loaded.param_groups] == [None, None]
