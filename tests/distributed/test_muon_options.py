"""What may not depend on the layout either: options, missing gradients, idle experts, buckets, types."""

import pytest
import torch
from harness import Worlds
from layouts import LAYOUTS, Piece, assemble, build, differences, held, inject, plain
from models import Model, gradients, groups
from tasks import Idle, Missing, OneProcess, Options, Outcome, muon, outcome, train, whole, whole_gradients
from torch import Tensor

from earthshine import Muon

SHARDED = ["fsdp-4", "tp-2-fsdp-2"]
EXPERTS = ("experts.w_in", "experts.w_out")


# ------------------------------------------------------------------------------------------------------------- options

OPTIONS: dict[str, Options] = {
    "no nesterov": {"nesterov": False},
    "polar express": {"ns_coefficients": "polar_express"},
    "gram": {"ns_form": "gram"},
    "original scale": {"scale": "original"},
    "exact rms": {"exact_rms": True},
    "schatten": {"norm": "schatten", "schatten_p": 4.0},
    "normuon": {"normuon_beta2": 0.95},
    "cautious decay": {"cautious_weight_decay": True},
    "bf16 momentum": {"momentum_dtype": "bfloat16"},
    "normuon, skip idle": {"normuon_beta2": 0.95, "skip_idle": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_option_gives_the_bits_of_one_process(worlds: Worlds, one_process: OneProcess, name: str) -> None:
    """Each option on FSDP2 with uneven and empty shards, and on TP x FSDP2 where rows and columns are cut."""
    for layout in SHARDED:
        got = whole(worlds.run(4, train, layout, OPTIONS[name], range(3)))
        assert not differences(got, one_process(layout, OPTIONS[name], range(3))), layout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact rms", "normuon", "schatten", "cautious decay", "bf16 momentum"])
@pytest.mark.parametrize("layout", ["zero1-4", "hsdp-2x2", "tp-row-4", "ep-2-fsdp-2-dim1", "ep-2-fsdp-2-dim0"])
def test_an_option_on_the_other_layouts(worlds: Worlds, one_process: OneProcess, layout: str, name: str) -> None:
    got = whole(worlds.run(4, train, layout, OPTIONS[name], range(3)))
    assert not differences(got, one_process(layout, OPTIONS[name], range(3)))


@pytest.mark.parametrize("layout", ["fsdp-4", "tp-row-4", "zero1-4"])
def test_scion_for_the_rest(worlds: Worlds, one_process: OneProcess, layout: str) -> None:
    """Scion's norms of embeddings, head and vectors are sums over all ranks, in another order than on one process."""
    got = whole(worlds.run(4, train, layout, {"non_matrix": "scion"}, range(3)))
    want = one_process(layout, {"non_matrix": "scion"}, range(3))
    assert any("embed" in key and key.endswith("/momentum_sum") for key in want)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def two_groups(layout: str) -> dict[str, Piece]:
    """Muon groups that differ in every kind of option, among them one that needs more traffic than the other."""
    model = build(layout)
    made = groups(model, LAYOUTS[layout].sizes, by_rows=True)
    first, rest = made[0], made[1:]
    named = list(zip(first["params"], first["matrices"], strict=True))
    halves = [
        {"params": [p for p, _ in part], "matrices": tuple(m for _, m in part), "algorithm": "muon"} | extra
        for part, extra in (
            (named[::2], {"lr": 0.1, "momentum": 0.8, "ns_steps": 3, "normuon_beta2": 0.9}),
            (named[1::2], {"nesterov": False, "weight_decay": 0.0, "update_rms": 0.4}),
        )
    ]
    opt = Muon([*halves, *rest], lr=0.05, ns_dtype="float32")
    for step in range(3):
        inject(model, whole_gradients(layout, step))
        opt.step()
    assert len(opt.last_stats["update_rms_by_group"]) == 3
    return held(dict(model.named_parameters()))


@pytest.mark.parametrize("layout", SHARDED)
def test_groups_with_options_of_their_own(worlds: Worlds, layout: str) -> None:
    got = assemble(worlds.run(4, two_groups, layout))
    assert not differences(got, assemble(worlds.run(1, two_groups, plain(layout))))


# ------------------------------------------------------------------------------------------------------------- traffic


def test_many_buckets_are_one(worlds: Worlds, one_process: OneProcess) -> None:
    """A limit below the smallest matrix puts each matrix into a bucket of its own."""
    for layout in SHARDED:
        got = whole(worlds.run(4, train, layout, {"max_bucket_bytes": 1}, range(3)))
        assert not differences(got, one_process(layout, {}, range(3))), layout


def test_bf16_payload_is_close_to_fp32(worlds: Worlds, one_process: OneProcess) -> None:
    """One step: each matrix's update, relative to its norm."""
    sizes = LAYOUTS["fsdp-4"].sizes
    before = {name: p.detach() for name, p in Model(sizes).named_parameters()}
    got = whole(worlds.run(4, train, "fsdp-4", {"comm_dtype": "bfloat16"}, range(1)))
    want = one_process("fsdp-4", {}, range(1))
    worst = 0.0
    for name, p in before.items():
        assert torch.equal(got.get(f"{name}/momentum_sum", p), want.get(f"{name}/momentum_sum", p))  # stays exact
        step = want[name] - p
        worst = max(worst, float((got[name] - want[name]).norm() / step.norm()))
    # bf16 rounds each element by up to 2^-9 = 0.2 %, twice; measured 0.33 %, more where singular values are small.
    assert 0 < worst < 0.01, worst


# --------------------------------------------------------------------------------------------------- missing gradients

SOME = ("up.weight", "experts.w_in", "qkv.weight", "norm.weight", "conv.weight")


@pytest.mark.parametrize("layout", ["fsdp-4", "tp-2-fsdp-2", "zero1-4", "ep-2-fsdp-2-dim1"])
def test_no_gradient_on_any_rank(worlds: Worlds, one_process: OneProcess, layout: str) -> None:
    """Skipped, as on one process: no momentum, no decay, no update; and it takes part again afterwards."""
    events = (Missing(0, SOME), Missing(2, ("down.weight", "experts.w_out", "embed.weight")))
    got = whole(worlds.run(4, train, layout, {}, range(4), events))
    assert not differences(got, one_process(layout, {}, range(4), events))
    skipped = whole(worlds.run(4, train, layout, {}, range(1), (Missing(0, SOME),)))
    for name, p in Model(LAYOUTS[layout].sizes).named_parameters():
        assert torch.equal(skipped[name], p) == (name in SOME), name


def lone_gap(layout: str, name: str, index: Tensor) -> dict[str, Tensor]:
    """What one process must get for a shard, at the flat positions `index`, that has no gradient at step 1 of 3."""
    model = build(layout)
    opt = muon(model, layout)
    p = model.get_parameter(name)
    for step in range(3):
        inject(model, whole_gradients(layout, step))
        kept = p.detach().view(-1)[index].clone(), opt.state[p]["momentum_sum"].view(-1)[index].clone()
        if step == 1:
            assert p.grad is not None
            p.grad.view(-1)[index] = 0
            opt.state[p]["momentum_sum"].view(-1)[index] = 0
        opt.step()
        if step == 1:
            p.detach().view(-1)[index] = kept[0]
            opt.state[p]["momentum_sum"].view(-1)[index] = kept[1]
    return whole([outcome(model, opt)])


@pytest.mark.parametrize(
    "layout, name",
    [
        ("fsdp-4", "up.weight"),
        ("fsdp-4", "experts.w_in"),  # whole matrices of one rank
        ("fsdp-4", "qkv.weight"),  # fused
        ("tp-row-4", "down.weight"),
        ("tp-2-fsdp-2", "up.weight"),
    ],
)
def test_no_gradient_on_one_rank(worlds: Worlds, layout: str, name: str) -> None:
    """That rank's shard stays as it is, momentum too, and counts as zeros in the matrix; nobody waits for ever."""
    ranks = worlds.run(4, train, layout, {}, range(3), (Missing(1, (name,), rank=1),))
    index = ranks[1].params[name].index.reshape(-1)
    assert len(index)
    want = worlds.run(1, lone_gap, plain(layout), name, index)
    assert not differences(whole(ranks), want[0])


def test_no_gradient_of_vectors_and_embeddings_on_one_rank(worlds: Worlds) -> None:
    """AdamW knows no other rank: the shard without a gradient stays, the others move."""
    missing = Missing(1, ("embed.weight", "norm.weight", "up.bias"), rank=1)
    before = worlds.run(4, train, "fsdp-4", {}, range(1))
    after = worlds.run(4, train, "fsdp-4", {}, range(2), (missing,))
    for rank in range(4):
        for name in missing.names:
            stays = torch.equal(before[rank].params[name].values, after[rank].params[name].values)
            assert stays == (rank == 1), (rank, name)


def frozen_run(layout: str) -> dict[str, Piece]:
    """Some parameters frozen through param_groups, and one that the optimizer holds but autograd does not."""
    model = build(layout)
    made = groups(model, LAYOUTS[layout].sizes, freeze=("up.*", "experts.w_in", "embed.weight"))
    opt = Muon(made, lr=0.05, ns_dtype="float32")
    model.down.weight.requires_grad_(False)
    whole_grads = gradients(Model(LAYOUTS[layout].sizes), 0)
    inject(model, {n: g if model.get_parameter(n).requires_grad else None for n, g in whole_grads.items()})
    opt.step()
    return held(dict(model.named_parameters()))


@pytest.mark.parametrize("layout", SHARDED)
def test_frozen_parameters_stay(worlds: Worlds, layout: str) -> None:
    got = assemble(worlds.run(4, frozen_run, layout))
    want = assemble(worlds.run(1, frozen_run, plain(layout)))
    assert not differences(got, want)
    before = dict(Model(LAYOUTS[layout].sizes).named_parameters())
    for name in before:
        frozen = name in ("up.weight", "up.bias", "experts.w_in", "embed.weight", "down.weight")
        assert torch.equal(got[name], before[name]) == frozen, name


@pytest.mark.parametrize("layout", ["fsdp-4", "ep-4", "ep-2-fsdp-2-dim1", "ep-2-fsdp-2-dim0", "zero1-4"])
def test_an_expert_without_tokens(worlds: Worlds, one_process: OneProcess, layout: str) -> None:
    """skip_idle: it only decays. Without: stale momentum moves it at full size, as the published rule says."""
    events = (Idle(1, EXPERTS, (1,)), Idle(2, EXPERTS, (0, 1, 2)))
    for skip in (True, False):
        options = {"skip_idle": skip}
        got = whole(worlds.run(4, train, layout, options, range(4), events))
        assert not differences(got, one_process(layout, options, range(4), events)), options
        first, second = (one_process(layout, options, range(n), events) for n in (1, 2))
        for name in EXPERTS:
            decayed = first[name][1] * (1 - 0.05 * 0.1)
            assert torch.equal(second[name][1], decayed) == skip
            assert (second[name][0] - first[name][0]).abs().max() > 0.01  # lr 0.05 times an update of RMS 0.2


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("layout", ["fsdp-4", "ep-2-fsdp-2-dim1", "zero1-4"])
def test_parameters_of_two_types(worlds: Worlds, one_process: OneProcess, layout: str) -> None:
    """Experts in bf16 beside fp32: the same bits as on one process, with fp32 messages that hold bf16 exactly."""
    dtypes = {"experts": torch.bfloat16, "conv": torch.bfloat16}
    options = {"comm_dtype": "float32"}
    got = whole(worlds.run(4, train, layout, options, range(3), (), dtypes))
    want = one_process(layout, options, range(3), (), dtypes)
    assert want["experts.w_in"].dtype == torch.bfloat16
    assert not differences(got, want)


@pytest.mark.parametrize("non_matrix", ["adamw", "scion"])
@pytest.mark.parametrize("layout", ["fsdp-4", "tp-2-fsdp-2", "zero1-4", "hsdp-2x2", "ep-2-fsdp-2-dim1"])
def test_stochastic_rounding_draws_the_bits_of_one_process(
    worlds: Worlds, one_process: OneProcess, layout: str, non_matrix: str
) -> None:
    """bf16 throughout; every algorithm. Scion's norms are sums in another order, so its weights may flip: not compared.

    A learning rate at which most weights lie between two neighbors after each step.
    """
    options = {"comm_dtype": "float32", "rounding": "stochastic", "lr": 1e-4, "non_matrix": non_matrix}
    args = (options, range(3), (), {"": torch.bfloat16})
    got, want = whole(worlds.run(4, train, layout, *args)), one_process(layout, *args)
    assert {t.dtype for name, t in want.items() if "/" not in name} == {torch.bfloat16}
    own = {key for key in want if non_matrix == "adamw" or "up.weight" in key or "experts" in key}
    assert not differences({k: got[k] for k in own}, {k: want[k] for k in own})
    nearest = one_process(layout, options | {"rounding": "nearest"}, *args[1:])
    assert not torch.equal(want["up.weight"], nearest["up.weight"])


def reduced(kind: str) -> dict[str, Piece]:
    """ZeRO-1 that averages the ranks' own gradients. What they sum to is exact: quarters of fp32."""
    import torch.distributed as dist

    model = build("zero1-4")
    opt = muon(model, "zero1-4", reduce_gradients=True)
    rank = dist.get_rank()
    for step in range(3):
        mine: dict[str, Tensor | None] = {}
        for i, (name, g) in enumerate(whole_gradients("zero1-4", step, (Missing(1, SOME),)).items()):
            # Either the same on all ranks, or four times as much on one of them and nothing on the others.
            nothing = None if g is None or kind == "absent" else torch.zeros_like(g)
            mine[name] = g if g is None or kind == "equal" else 4 * g if i % 4 == rank else nothing
        inject(model, mine)
        opt.step()
    return held(dict(model.named_parameters()))


@pytest.mark.parametrize("kind", ["equal", "zero", "absent"])
def test_zero1_averages_gradients(worlds: Worlds, one_process: OneProcess, kind: str) -> None:
    """A gradient that some ranks lack counts as zero there; one that all lack leaves the parameter alone."""
    got = assemble(worlds.run(4, reduced, kind))
    want = one_process("zero1-4", {}, range(3), (Missing(1, SOME),))
    assert not differences(got, {name: want[name] for name in got})


# ------------------------------------------------------------------------------------------------------- as torch's own


def used_by_a_trainer(layout: str) -> Outcome:
    """A closure, a scheduler of torch, gradients set to None, and parameters that come later (unfrozen, say)."""
    model = build(layout)
    first, *rest = groups(model, LAYOUTS[layout].sizes)
    names = [name for name, _ in first["params"]]
    late = [i for i, name in enumerate(names) if name in ("down.weight", "experts.w_in")]
    parts = [
        first | {key: type(first[key])(first[key][i] for i in chosen) for key in ("params", "matrices", "reasons")}
        for chosen in ([i for i in range(len(names)) if i not in late], late)
    ]
    opt = Muon([parts[0], *rest], lr=0.05, ns_dtype="float32", process_group=model.zero1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(4):
        if step == 2:
            opt.add_param_group(parts[1] | {"initial_lr": 0.05})
            schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (3 + step))

        def closure(step: int = step) -> float:
            opt.zero_grad(set_to_none=True)
            assert all(p.grad is None for group in opt.param_groups for p in group["params"])
            inject(model, whole_gradients(layout, step))
            return 0.5

        assert opt.step(closure) == 0.5
        schedule.step()
    return outcome(model, opt)


@pytest.mark.parametrize("layout", ["fsdp-4", "zero1-4"])
def test_in_a_training_loop(worlds: Worlds, layout: str) -> None:
    got = whole(worlds.run(4, used_by_a_trainer, layout))
    assert not differences(got, whole(worlds.run(1, used_by_a_trainer, plain(layout))))
