"""`Muon` in the lives that optimizers lead: types, compilers, schedulers, gradients, closures, hooks, groups."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import LR, Small, assert_same, backward, muon, train
from torch import Tensor, nn
from torch.optim import lr_scheduler

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon


def assert_learns(model: nn.Module, optimizer: Muon) -> None:
    """One batch by heart: from 2.7 to below half of that in fifteen steps."""
    losses = [train(model, optimizer, range(1))[0] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def one_matrix(**options: Any) -> tuple[nn.Parameter, Muon]:
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 6, generator=g))
    p.grad = torch.randn(4, 6, generator=g)
    return p, Muon([p], **{"lr": LR, "ns_dtype": "float32"} | options)


# ------------------------------------------------------------------------------------------------- types and compilers


@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
def test_bf16_weights_learn_without_a_scaler() -> None:
    model = Small().bfloat16()
    assert_learns(model, muon(model, lr=0.02))


def test_autocast_learns_without_a_scaler() -> None:
    model = Small()
    forward = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)  # type: ignore[method-assign]
    assert_learns(model, muon(model, lr=0.02))


def test_a_step_under_autocast_is_not_cast() -> None:
    plain, cast = Small(), Small()
    for m, enabled in ((plain, False), (cast, True)):
        backward(m, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            muon(m).step()
    assert_same(plain, cast)


def test_a_compiled_models_groups_hold_the_models_parameters() -> None:
    model = Small()
    wrapped = param_groups(torch.compile(model, backend="eager"))
    plain = param_groups(model)
    assert [g["algorithm"] for g in wrapped] == [g["algorithm"] for g in plain] == ["muon", "adamw"]
    for a, b in zip(wrapped, plain, strict=True):
        assert [id(p) for _, p in a["params"]] == [id(p) for _, p in b["params"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "ns_compile"])
def test_what_is_compiled_takes_the_same_steps(how: str) -> None:
    """Within 1e-5: the compiler adds up in another order, and fuses what eager rounds in between."""
    eager, model = Small(), Small()
    train(eager, muon(eager), range(3))
    trained: nn.Module = torch.compile(model) if how == "torch.compile" else model
    if how == "Module.compile":
        model.compile()
    train(trained, muon(trained, ns_compile=how == "ns_compile"), range(3))
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------- schedulers


def sequential(optimizer: Muon) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def one_cycle(optimizer: Muon, cycle_momentum: bool = False) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9, cycle_momentum=cycle_momentum)


SCHEDULERS: dict[str, Callable[[Muon], lr_scheduler.LRScheduler]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
    "sequential": sequential,
    "one cycle": one_cycle,
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("as_tensor", [False, True])
def test_torchs_schedulers_drive_both_algorithms(name: str, as_tensor: bool) -> None:
    """Each step is that of an optimizer whose rates are set by hand. As a tensor, a rate is one of fp32's."""
    model, by_hand = Small(), Small()
    optimizer, other = muon(model, lr=torch.tensor(LR) if as_tensor else LR), muon(by_hand)
    scheduler = SCHEDULERS[name](optimizer)
    rates = set()
    for seed in range(4):
        for group, driven in zip(other.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = float(driven["lr"])
        rates.add(float(optimizer.param_groups[0]["lr"]))
        for m, o in ((model, optimizer), (by_hand, other)):
            train(m, o, range(seed, seed + 1))
        scheduler.step()
    assert_same(model, by_hand)
    assert len(rates) > 1


def test_each_group_has_its_own_rate() -> None:
    model = Small()
    optimizer = muon(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda k: 0.25**k])
    train(model, optimizer, range(1))
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [LR / 2, LR / 4]


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduled_run_resumes_bit_for_bit(name: str) -> None:
    a, b = Small(), Small()
    opt_a, opt_b = muon(a), muon(b)
    sched_a, sched_b = SCHEDULERS[name](opt_a), SCHEDULERS[name](opt_b)

    def go_on(model: nn.Module, optimizer: Muon, scheduler: lr_scheduler.LRScheduler, seeds: range) -> None:
        for seed in seeds:
            train(model, optimizer, range(seed, seed + 1))
            scheduler.step()

    go_on(a, opt_a, sched_a, range(3))
    b.load_state_dict(a.state_dict())
    opt_b.load_state_dict(copy.deepcopy(opt_a.state_dict()))
    sched_b.load_state_dict(sched_a.state_dict())
    go_on(a, opt_a, sched_a, range(3, 6))
    go_on(b, opt_b, sched_b, range(3, 6))
    assert_same(a, b)


def test_what_a_scheduler_writes_into_groups_is_no_difference_of_the_optimizer() -> None:
    """OneCycleLR keeps max_lr and min_lr there; the optimizer that resumes may get its scheduler later."""
    optimizer = muon(Small())
    one_cycle(optimizer)
    fresh = muon(Small())
    fresh.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups] != [LR, LR]
    fresh.step()
    one_cycle(fresh)
    assert {"max_lr", "min_lr"} <= set(fresh.param_groups[0])


def test_a_cycled_momentum_is_taken_over() -> None:
    optimizer = muon(Small())
    one_cycle(optimizer, cycle_momentum=True)
    betas = optimizer.param_groups[1]["betas"]
    fresh = muon(Small())
    assert fresh.param_groups[1]["betas"] != betas
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[1]["betas"] == betas


def test_a_cycled_momentum_is_adamws_beta1() -> None:
    """As for torch's AdamW. Muon's momentum is its own and stays: its step has the same size at any."""
    model = Small()
    optimizer = muon(model)
    scheduler = one_cycle(optimizer, cycle_momentum=True)
    betas = set()
    for seed in range(3):
        train(model, optimizer, range(seed, seed + 1))
        scheduler.step()
        betas.add(optimizer.param_groups[1]["betas"])
    assert len(betas) == 3
    assert {b[1] for b in betas} == {0.95}
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_rates_as_tensors_are_not_shared_by_what_loads_them() -> None:
    _, a = one_matrix(lr=torch.tensor(1e-3))
    _, b = one_matrix(lr=torch.tensor(2e-3))
    b.load_state_dict(a.state_dict())
    assert float(b.param_groups[0]["lr"]) == pytest.approx(1e-3)
    a.param_groups[0]["lr"].fill_(5.0)  # as torch's schedulers do
    assert float(b.param_groups[0]["lr"]) == pytest.approx(1e-3)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_zero_grad_sets_to_none_or_to_zeros() -> None:
    """None is skipped; zeros are gradients: the momentum shrinks, and its direction is followed."""
    p, optimizer = one_matrix(weight_decay=0.0)
    optimizer.step()
    before, momentum = p.detach().clone(), optimizer.state[p]["momentum_sum"].clone()
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert p.grad is None
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["momentum_sum"], momentum)
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not torch.equal(p, before)
    torch.testing.assert_close(optimizer.state[p]["momentum_sum"], 0.95 * momentum)


def test_accumulated_and_clipped_gradients_are_gradients() -> None:
    model, by_hand = Small(), Small()
    optimizer, other = muon(model), muon(by_hand)
    for step in range(2):
        for m in (model, by_hand):
            m.zero_grad()
        for micro in range(3):
            backward(model, 10 * step + micro)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        grads: dict[str, Tensor] = {}
        for micro in range(3):
            part = Small()
            part.load_state_dict(by_hand.state_dict())
            backward(part, 10 * step + micro)
            grads |= {n: grads[n] + p.grad if n in grads else p.grad for n, p in part.named_parameters()}  # type: ignore[misc]
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        for n, p in by_hand.named_parameters():
            p.grad = grads[n] * min(1.0, float(0.5 / (norm + 1e-6)))
        optimizer.step()
        other.step()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # the norm is summed in another order


def test_tied_weights_are_one_parameter() -> None:
    model = Small(tied=True)
    groups = param_groups(model)
    assert sum(p is model.embed.weight for g in groups for _, p in g["params"]) == 1
    optimizer = Muon(groups, lr=LR, ns_dtype="float32")
    train(model, optimizer, range(2))
    assert model.head.weight is model.embed.weight
    assert float(optimizer.state[model.embed.weight]["step"]) == 2
    other = muon(Small(tied=True))
    other.load_state_dict(optimizer.state_dict())


def test_frozen_after_construction_means_left_alone() -> None:
    model = Small()
    optimizer = muon(model)
    train(model, optimizer, range(1))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.up.requires_grad_(False)
    model.embed.requires_grad_(False)
    optimizer.zero_grad()
    train(model, optimizer, range(1, 3))
    for n, p in model.named_parameters():
        assert torch.equal(p, kept[n]) == n.startswith(("up.", "embed.")), n
    model.up.requires_grad_(True)
    train(model, optimizer, range(3, 4))
    assert not torch.equal(model.up.weight, kept["up.weight"])


def test_two_optimizers_share_a_model() -> None:
    model, together = Small(), Small()
    groups = param_groups(model)
    parts = [Muon([group], lr=LR, ns_dtype="float32") for group in groups]
    one = muon(together)
    for seed in range(3):
        for optimizer in parts:
            optimizer.zero_grad()
        backward(model, seed)
        for optimizer in parts:
            optimizer.step()
        train(together, one, range(seed, seed + 1))
    assert_same(model, together)


def test_a_rate_of_zero_changes_only_the_momentum() -> None:
    p, optimizer = one_matrix(lr=0.0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert p.grad is not None
    assert torch.equal(optimizer.state[p]["momentum_sum"], p.grad)


def test_one_matrix_that_is_not_finite_poisons_no_other() -> None:
    params = [nn.Parameter(torch.ones(4, 6)) for _ in range(3)]
    optimizer = Muon(params, lr=LR, ns_dtype="float32")
    for n, p in enumerate(params):
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(n))
    assert params[1].grad is not None
    params[1].grad[0, 0] = torch.nan
    optimizer.step()
    assert [bool(p.isfinite().all()) for p in params] == [True, False, True]
    alone = nn.Parameter(torch.ones(4, 6))
    alone.grad = params[2].grad
    Muon([alone], lr=LR, ns_dtype="float32").step()
    assert torch.equal(alone, params[2])


# ---------------------------------------------------------------------------------------- closures, hooks, later groups


def test_a_closure_has_gradients_whatever_is_around_it() -> None:
    model = Small()
    optimizer = muon(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        first = optimizer.step(closure)  # type: ignore[arg-type]
        assert not torch.is_grad_enabled()
    assert isinstance(first, Tensor)
    assert float(optimizer.step(closure)) < float(first)  # type: ignore[arg-type]
    assert optimizer.step() is None


def test_hooks_of_a_step() -> None:
    p, optimizer = one_matrix()
    start = p.detach().clone()
    seen: list[str] = []

    def halve(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert p.grad is not None
        assert torch.equal(p, start)
        p.grad.mul_(0.5)
        seen.append("before")

    def look(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert owner is optimizer
        assert not torch.equal(p, start)
        seen.append(f"after {optimizer.last_stats['update_rms'].keys()}")

    handles = [optimizer.register_step_pre_hook(halve), optimizer.register_step_post_hook(look)]
    optimizer.step()
    assert p.grad is not None
    assert torch.equal(optimizer.state[p]["momentum_sum"], p.grad)
    assert seen == ["before", "after dict_keys(['muon'])"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 2


def test_hooks_of_saving_and_loading() -> None:
    p, optimizer = one_matrix()
    optimizer.step()
    optimizer.register_state_dict_post_hook(lambda owner, saved: {"theirs": saved})
    saved = optimizer.state_dict()
    assert set(saved) == {"theirs"}
    q, other = one_matrix()
    loaded: list[bool] = []
    other.register_load_state_dict_pre_hook(lambda owner, given: given["theirs"])
    other.register_load_state_dict_post_hook(lambda owner: loaded.append(bool(owner.state[q]["momentum_sum"].any())))
    given = dict(saved)
    other.load_state_dict(saved)
    assert loaded == [True]
    assert saved == given  # what was handed over is as it was
    assert torch.equal(other.state[q]["momentum_sum"], optimizer.state[p]["momentum_sum"])


def test_a_later_group_is_as_one_from_the_start() -> None:
    first, later = ([nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6, 4))] for _ in range(2))
    optimizers = [Muon([{"params": ps[:1]}], lr=LR, ns_dtype="float32") for ps in (first, later)]
    optimizers[0].add_param_group({"params": first[1:], "momentum": 0.5})
    for step in range(4):
        if step == 2:
            optimizers[1].add_param_group({"params": later[1:], "momentum": 0.5})
        for ps, optimizer in zip((first, later), optimizers, strict=True):
            for p in ps[: 1 + (step >= 2)]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    for p, q in zip(first, later, strict=True):
        assert torch.equal(p, q)
    optimizers[0].load_state_dict(optimizers[1].state_dict())


def test_a_group_that_is_not_a_group_leaves_nothing_behind() -> None:
    p, optimizer = one_matrix()
    for wrong in ({"betas": 0.9}, {"ns_coefficients": 3}, {"matrices": 7}, {"weight_decay": -1.0}):
        with pytest.raises((ConfigError, TypeError)):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3))]} | wrong)
        assert len(optimizer.param_groups) == 1, wrong
    optimizer.step()
    assert set(optimizer.state) == {p}


def test_what_torch_offers_elsewhere_is_refused_and_not_ignored() -> None:
    for name in ("maximize", "foreach", "capturable", "fused", "adjust_lr_fn"):
        with pytest.raises(TypeError, match=name):
            one_matrix(**{name: True})
        with pytest.raises(ConfigError, match=name):
            Muon([{"params": [nn.Parameter(torch.zeros(2, 3))], name: True}], lr=LR)


def test_parameters_that_were_exchanged_are_updated_or_refused() -> None:
    """accelerate puts FSDP2's parameters into the groups of an optimizer that was made before."""
    old, optimizer = one_matrix()
    new = nn.Parameter(old.detach().clone())
    new.grad, old.grad = old.grad, None
    optimizer.param_groups[0]["params"] = [new]
    try:
        optimizer.step()
    except ConfigError as refusal:
        assert "params" in str(refusal) or "parameters" in str(refusal)
    else:
        expected, reference = one_matrix()
        reference.step()
        assert torch.equal(new, expected)


@pytest.mark.parametrize("holds", ["a step", "a load"])
def test_parameters_are_not_exchanged_where_momentum_would_be_lost(holds: str) -> None:
    old, optimizer = one_matrix()
    optimizer.step()
    if holds == "a load":
        _, fresh = one_matrix()
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    optimizer.param_groups[0]["params"] = [nn.Parameter(old.detach().clone())]
    with pytest.raises(ConfigError, match="was exchanged, moved or cast after a step or a load"):
        optimizer.step()


def test_a_group_that_was_removed_does_not_lend_its_plan_to_the_next() -> None:
    p, q = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([{"params": [p]}, {"params": [q]}], lr=LR, ns_dtype="float32")
    del optimizer.param_groups[0]
    q.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert not torch.equal(q, torch.ones(4, 6))
    assert torch.equal(p, torch.ones(4, 6))
