"""What `Muon` takes over from a checkpoint, and what becomes of its state when parameters are exchanged or removed."""

import collections
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.muon import Muon

# Another value than the default for each option that a loop may set.
SET_BY_A_LOOP: dict[str, Any] = {
    "weight_decay": 0.02,
    "momentum": 0.85,
    "nesterov": False,
    "betas": (0.8, 0.9),
    "eps": 1e-6,
    "update_rms": 0.3,
    "scale": "original",
    "cautious_weight_decay": True,
}


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 6), (6, 4), (5, 5), (7,))]


def muon(params: list[nn.Parameter], **options: Any) -> Muon:
    names = [(f"w{i}", p) for i, p in enumerate(params[:-1])]
    groups = [{"params": names}, {"params": [("v", params[-1])], "algorithm": "adamw"}]
    return Muon(groups, **{"lr": 0.01, "ns_dtype": "float32"} | options)


def step(optimizer: Muon, seed: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def state_of(optimizer: Muon, p: Tensor) -> Tensor:
    found: Tensor = optimizer.state[p]["momentum_sum"]
    return found


# ------------------------------------------------------------------------------------------------ what a loop has set


@pytest.mark.parametrize("when", ["fresh", "as the loop starts", "as the loop was"])
@pytest.mark.parametrize("key", list(SET_BY_A_LOOP))
def test_a_scheduled_option_is_taken_over(key: str, when: str) -> None:
    """Loops set it at each step; the optimizer that resumes is loaded before, or after they set its first value."""
    a = parameters()
    optimizer = muon(a)
    for seed in range(3):
        for group in optimizer.param_groups:
            group[key] = SET_BY_A_LOOP[key] if seed else group[key]
        step(optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    b = [nn.Parameter(p.detach().clone()) for p in a]
    resumed = muon(b)
    if when != "fresh":
        resumed.param_groups[0][key] = SET_BY_A_LOOP[key] if when == "as the loop was" else resumed.defaults[key]
    resumed.load_state_dict(saved)
    for group in resumed.param_groups:
        assert group[key] == SET_BY_A_LOOP[key]
    for each in (optimizer, resumed):
        step(each, 3)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    muon(parameters()).load_state_dict(resumed.state_dict())  # and again


@pytest.mark.parametrize("key", list(SET_BY_A_LOOP))
def test_an_option_of_another_construction_is_refused(key: str) -> None:
    """Also where the saved run had moved it since: the message shows both values at construction."""
    saved = muon(parameters(), **{key: SET_BY_A_LOOP[key]})
    if key == "momentum":
        saved.param_groups[0][key] = 0.9
    with pytest.raises(CheckpointError, match=rf"group 0 {key}(\[0\])?: (0\.85|[^9]*) \(saved\) -> "):
        muon(parameters()).load_state_dict(saved.state_dict())


def test_a_scheduled_option_by_another_file_format() -> None:
    """Tuples become lists in JSON and the like."""
    optimizer = muon(parameters())
    optimizer.param_groups[0]["momentum"] = 0.9
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["initial_options"] = [[key, value] for key, value in group["initial_options"]]
        group["betas"] = list(group["betas"])
    fresh = muon(parameters())
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["momentum"] == 0.9
    step(fresh, 0)


# ---------------------------------------------------------------------------------------------------- older checkpoints


@pytest.mark.parametrize("key", ["skip_idle", "comm_dtype", "rounding", "ns_steps", "normuon_beta2", "eps"])
def test_an_option_that_a_checkpoint_does_not_know_had_its_default(key: str) -> None:
    optimizer = muon(parameters())
    step(optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[key], group["initial_options"]
    fresh = muon(parameters())
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0][key] == optimizer.param_groups[0][key]
    other = {"skip_idle": True, "comm_dtype": "bfloat16", "rounding": "stochastic", "ns_steps": 3, "eps": 1e-4}
    with pytest.raises(CheckpointError, match=rf"group 0 {key}: "):
        muon(parameters(), **{key: other.get(key, 0.9)}).load_state_dict(saved)


@pytest.mark.parametrize("key", ["rounding", "ns_steps", "normuon_beta2", "eps", "initial_options"])
def test_a_pickle_that_does_not_know_an_option_had_its_default(key: str) -> None:
    optimizer = muon(parameters())
    step(optimizer, 0)
    expected = pickle.loads(pickle.dumps(optimizer))
    optimizer.defaults.pop(key, None)
    for group in optimizer.param_groups:
        del group[key]
    older = pickle.loads(pickle.dumps(optimizer))
    assert older.param_groups[0][key] == expected.param_groups[0][key]
    for one in (older, expected):
        one.add_param_group({"params": [("late", nn.Parameter(torch.ones(3, 3)))]})
        step(one, 1)
    for ours, theirs in zip(older.param_groups, expected.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours["params"], theirs["params"], strict=True))


@pytest.mark.parametrize("named", [True, False])
def test_names_that_only_one_side_has_are_no_difference(named: bool) -> None:
    params = parameters()
    unnamed = [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]
    pair = [Muon(unnamed, lr=0.01, ns_dtype="float32"), muon(parameters())]
    old, new = pair if named else pair[::-1]
    step(old, 0)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert ("param_names" in new.param_groups[0]) is named
    for a, b in zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
        assert torch.equal(state_of(old, a), state_of(new, b))


@pytest.mark.parametrize("wrong", [{}, {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}])
def test_what_is_not_an_optimizers_state(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="it needs 'state' and 'param_groups'"):
        muon(parameters()).load_state_dict(wrong)


@pytest.mark.parametrize(("key", "value"), [("lr", "0.1"), ("momentum", 2.0), ("betas", 0.9), ("nesterov", None)])
def test_a_saved_value_that_no_option_can_have_is_refused_before_anything_changes(key: str, value: Any) -> None:
    trained, optimizer = muon(parameters()), muon(parameters())
    step(trained, 0)
    saved = copy.deepcopy(trained.state_dict())
    saved["param_groups"][1][key] = value
    with pytest.raises(CheckpointError, match="beta" if key == "betas" else key):
        optimizer.load_state_dict(saved)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("nothing", [None, {}, 3])
def test_a_parameter_without_saved_state(nothing: Any) -> None:
    saved = copy.deepcopy(muon(parameters()).state_dict())
    saved["state"][2] = nothing
    with pytest.raises(CheckpointError, match="momentum_sum of parameter w2 is missing"):
        muon(parameters()).load_state_dict(saved)


def test_a_saved_group_without_parameters() -> None:
    with pytest.raises(CheckpointError, match="lists no 'params'"):
        muon(parameters()).load_state_dict({"state": {}, "param_groups": [{}, {}]})


# --------------------------------------------------------------------------------------------------- state that is gone


def clear(optimizer: Muon) -> None:
    optimizer.state.clear()


def assign(optimizer: Muon) -> None:
    optimizer.state = collections.defaultdict(dict)


def assign_dict(optimizer: Muon) -> None:
    optimizer.state = {}  # type: ignore[assignment]


def empty(optimizer: Muon) -> None:
    for state in optimizer.state.values():
        state.clear()


@pytest.mark.parametrize("how", [clear, assign, assign_dict, empty])
def test_a_state_that_was_cleared_starts_from_zero(how: Callable[[Muon], None]) -> None:
    """As torch's AdamW: the next step is a fresh optimizer's."""
    a = parameters()
    optimizer = muon(a)
    step(optimizer, 0)
    how(optimizer)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    fresh = muon(b)
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
    for each in (optimizer, fresh):
        step(each, 1)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_state_of_one_parameter_starts_from_zero() -> None:
    params = parameters()
    optimizer = muon(params)
    step(optimizer, 0)
    kept = state_of(optimizer, params[1]).clone()
    del optimizer.state[params[0]]
    optimizer.state[params[3]].pop("exp_avg")
    step(optimizer, 1)
    assert params[0].grad is not None and params[1].grad is not None
    assert torch.equal(state_of(optimizer, params[0]), params[0].grad)
    torch.testing.assert_close(state_of(optimizer, params[1]), 0.95 * kept + params[1].grad)
    assert optimizer.state[params[3]]["step"] == 2


# -------------------------------------------------------------------------------------------------- lists of parameters


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_parameter_that_was_taken_out_of_a_group(which: int) -> None:
    """The others go on with their names, matrices and momentum; nothing of it is saved any more."""
    a, b = parameters(), parameters()
    optimizer, alone = muon(a), muon(b)
    for each in (optimizer, alone):
        step(each, 0)
    gone = optimizer.param_groups[0]["params"].pop(which)
    before = gone.detach().clone()
    for each in (optimizer, alone):
        step(each, 1)
    assert torch.equal(gone, before)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(p, q) == (i != which)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == [f"w{i}" for i in range(3) if i != which]
    rest = [p for i, p in enumerate(parameters()) if i != which]
    names = saved["param_groups"][0]["param_names"]
    groups = [{"params": list(zip(names, rest, strict=False))}, {"params": [("v", rest[-1])], "algorithm": "adamw"}]
    Muon(groups, lr=0.01, ns_dtype="float32").load_state_dict(saved)


def test_parameters_in_another_order_keep_their_names_and_matrices() -> None:
    stack, matrix = nn.Parameter(torch.ones(2, 4, 6)), nn.Parameter(torch.ones(4, 6))
    group = {"params": [("stack", stack), ("matrix", matrix)], "matrices": [("batch",), ("matrix",)]}
    optimizer = Muon([group], lr=0.01, ns_dtype="float32")
    step(optimizer, 0)
    optimizer.param_groups[0]["params"].reverse()
    step(optimizer, 1)
    assert optimizer.param_groups[0]["param_names"] == ["matrix", "stack"]
    assert optimizer.param_groups[0]["matrices"] == (("matrix",), ("batch",))


def test_a_parameter_that_was_put_into_a_list_is_told_where_to_go() -> None:
    params = parameters()
    optimizer = muon(params)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3, 3)))
    with pytest.raises(ConfigError, match=r"new parameter of shape \[3, 3\].*param_names.*add_param_group"):
        optimizer.step()


def test_a_parameter_moves_to_another_group_with_its_momentum() -> None:
    params = parameters()
    optimizer = muon(params)
    step(optimizer, 0)
    kept = state_of(optimizer, params[2])
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [("w2", moved)], "lr": 0.5})
    assert state_of(optimizer, params[2]) is kept
    step(optimizer, 1)


# ---------------------------------------------------------------------------- state that nothing has been put into yet


def exchange(optimizer: Muon, params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Other parameters in all groups, as accelerate does when it shards a model."""
    new = [nn.Parameter(p.detach().clone()) for p in params]
    at = iter(new)
    for group in optimizer.param_groups:
        group["params"] = [next(at) for _ in group["params"]]
    return new


def untouched(optimizer: Muon) -> None:
    """Nothing but construction."""


def loaded(optimizer: Muon) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def stepped_without_gradients(optimizer: Muon) -> None:
    optimizer.step()


def stepped_then_cleared(optimizer: Muon) -> None:
    step(optimizer, 0)
    optimizer.state.clear()


def stepped_then_reset(optimizer: Muon) -> None:
    zeros = copy.deepcopy(optimizer.state_dict())
    step(optimizer, 0)
    optimizer.load_state_dict(zeros)


EMPTY = [untouched, loaded, stepped_without_gradients, stepped_then_cleared, stepped_then_reset]


@pytest.mark.parametrize("before", EMPTY)
def test_parameters_are_exchanged_where_no_momentum_is_lost(before: Callable[[Muon], None]) -> None:
    """Accelerate loads `state_dict()` right after construction and then exchanges the parameters for sharded ones."""
    params = parameters()
    optimizer = muon(params)
    before(optimizer)
    new = exchange(optimizer, params)
    expected = [nn.Parameter(p.detach().clone()) for p in new]
    reference = muon(expected)
    for each in (optimizer, reference):
        step(each, 7)
    assert all(torch.equal(p, q) for p, q in zip(new, expected, strict=True))
    assert set(optimizer.state) == set(new)  # the old ones could not be freed otherwise


@pytest.mark.parametrize("before", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
def test_parameters_are_cast_where_no_momentum_is_lost(before: Callable[[Muon], None], dtype: torch.dtype) -> None:
    params = parameters()
    optimizer = muon(params)
    before(optimizer)
    for p in params:
        p.grad = None
        p.data = p.data.to(dtype)
    optimizer.load_state_dict(optimizer.state_dict())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {s["momentum_sum"].dtype for s in optimizer.state.values() if "momentum_sum" in s} == {
        torch.promote_types(dtype, torch.float32)
    }


def test_parameters_that_are_made_on_the_meta_device() -> None:
    params = [nn.Parameter(torch.empty(p.shape, device="meta")) for p in parameters()]
    optimizer = muon(params)
    loaded(optimizer)
    new = parameters()
    at = iter(new)
    for group in optimizer.param_groups:
        group["params"] = [next(at) for _ in group["params"]]
    step(optimizer, 0)
    assert state_of(optimizer, new[0]).device.type == "cpu"


def test_a_checkpoint_right_after_the_exchange() -> None:
    """Saved and loaded before any step: its state is that of the new parameters."""
    params = parameters()
    trained, optimizer = muon(parameters()), muon(params)
    step(trained, 0)
    loaded(optimizer)
    new = exchange(optimizer, params)
    assert len(optimizer.state_dict()["state"]) == 4
    optimizer.load_state_dict(trained.state_dict())
    assert torch.equal(state_of(optimizer, new[0]), state_of(trained, trained.param_groups[0]["params"][0]))
    exchange(optimizer, new)
    with pytest.raises(ConfigError, match="w0 was exchanged, moved or cast after a step or a load"):
        optimizer.step()


def test_one_parameter_that_was_exchanged_after_a_step_is_named() -> None:
    params = parameters()
    optimizer = muon(params)
    step(optimizer, 0)
    optimizer.param_groups[0]["params"][1] = nn.Parameter(params[1].detach().clone())
    with pytest.raises(ConfigError, match="w1 was exchanged"):
        optimizer.step()
