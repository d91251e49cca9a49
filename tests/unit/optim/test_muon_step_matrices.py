"""A step of Muon: every logical matrix as if it were a parameter of its own, in any stack, batch, group, memory order
and dtype, and beside parameters that have no gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import normal
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.optim.muon import Muon

LR, WEIGHT_DECAY, MU = 0.02, 0.1, 0.9


# ------------------------------------------------------------------ logical matrices as if each were a parameter

# Specification -> indices of each logical matrix in the parameter, by hand.
Pick = Callable[[Tensor], list[Tensor]]
DIVISIONS: dict[str, tuple[tuple[int, ...], tuple[Any, ...], Pick]] = {
    "matrix": ((5, 8), ("matrix",), lambda t: [t]),
    "stack": ((3, 5, 8), ("batch",), lambda t: list(t)),
    "stack of stacks": ((2, 3, 8, 5), ("batch",), lambda t: list(t.flatten(0, 1))),
    "rows": ((9, 5), ("rows", (5, 3, 1)), lambda t: [t[:5], t[5:8], t[8:]]),
    "rows of a stack": ((2, 8, 5), ("rows", (5, 3)), lambda t: [t[0, :5], t[0, 5:], t[1, :5], t[1, 5:]]),
    "cols": ((5, 11), ("cols", (8, 3)), lambda t: [t[:, :8], t[:, 8:]]),
    "heads": ((12, 5), ("heads", 3), lambda t: [t[:4], t[4:8], t[8:]]),
    "heads in parts": (
        (12, 5),
        ("heads", 2, (4, 2)),
        lambda t: [t[:4], t[4:6], t[6:10], t[10:]],
    ),
    "interleaved": (
        (12, 5),
        ("interleaved", 3, (2, 1, 1)),
        lambda t: [t.view(3, 4, 5)[:, :2].flatten(0, 1), t.view(3, 4, 5)[:, 2], t.view(3, 4, 5)[:, 3]],
    ),
    "convolution": ((6, 2, 3), ("flatten", 2), lambda t: [t[:3].flatten(1), t[3:].flatten(1)]),
}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "normuon": {"normuon_beta2": 0.9},
    "exact rms": {"exact_rms": True},
    "cautious": {"cautious_weight_decay": True, "nesterov": False},
    "bf16 momentum": {"momentum_dtype": "bfloat16"},
    "svd": {"norm": "schatten", "schatten_p": 3.0},
    "skip idle": {"skip_idle": True},
}


def whole_and_apart(kinds: list[str], options: dict[str, Any], steps: int = 3) -> None:
    """Parameters in one optimizer give the bits of their logical matrices each in an optimizer of its own."""
    shapes = [DIVISIONS[k][0] for k in kinds]
    together = [nn.Parameter(normal(*s, dtype=torch.float32)) for s in shapes]
    apart = [
        [nn.Parameter(m.detach().clone()) for m in DIVISIONS[k][2](p)] for k, p in zip(kinds, together, strict=True)
    ]
    common: dict[str, Any] = {"lr": LR, "momentum": MU, "ns_dtype": "float32"} | options
    group = {"params": together, "matrices": tuple(DIVISIONS[k][1] for k in kinds)}
    one = Muon([group], **common)
    many = [[Muon([m], **common) for m in ms] for ms in apart]
    for step in range(1, 1 + steps):
        for k, p, ms, optimizers in zip(kinds, together, apart, many, strict=True):
            p.grad = normal(*p.shape, seed=step, dtype=torch.float32)
            p.grad.view(-1, p.shape[-1])[: 4 * (step == 2)] = 0  # some are idle in the second step
            for m, part, optimizer in zip(ms, DIVISIONS[k][2](p.grad), optimizers, strict=True):
                m.grad = part.clone()
                optimizer.step()
        one.step()
    for k, p, ms, optimizers in zip(kinds, together, apart, many, strict=True):
        momentum = DIVISIONS[k][2](one.state[p]["momentum_sum"])
        for n, (m, part, sums) in enumerate(zip(ms, DIVISIONS[k][2](p), momentum, strict=True)):
            assert torch.equal(part, m), f"{k}[{n}]"
            assert torch.equal(sums, optimizers[n].state[m]["momentum_sum"]), f"{k}[{n}]"


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_logical_matrix_is_updated_as_if_it_were_a_parameter(recipe: str) -> None:
    """All kinds in one optimizer: tall and wide ones of one (S, L) = (5, 8), (3, 5), (1, 5) share batches."""
    kinds = [k for k in DIVISIONS if k != "cols" or recipe != "normuon"]
    whole_and_apart(kinds, RECIPES[recipe])


def test_batches_that_are_cut_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every size of batch, a stack's boundaries and a batch's come to lie differently."""
    from earthshine.optim.sharding import batches

    for capacity in (1, 2, 3):
        monkeypatch.setattr(batches, "matrices_per_batch", lambda *_, capacity=capacity: capacity)
        whole_and_apart(["stack", "matrix", "stack of stacks", "cols"], {})


def test_normuon_by_columns_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.zeros(4, 6))], "matrices": [("cols", (4, 2))]}
    with pytest.raises(ConfigError, match=r"divided by columns \(\('cols', \(4, 2\)\)\): NorMuon keeps one number"):
        Muon([group], lr=LR, normuon_beta2=0.9)


def test_the_state_of_normuon_has_a_number_per_row() -> None:
    shapes = {"matrix": (5, 1), "stack": (3, 5, 1), "stack of stacks": (2, 3, 8, 1), "convolution": (6, 1, 1)}
    for kind, expected in shapes.items():
        shape, spec, _ = DIVISIONS[kind]
        p = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([{"params": [p], "matrices": [spec]}], lr=LR, normuon_beta2=0.9)
        assert tuple(optimizer.state[p]["row_second_moment"].shape) == expected, kind


# ------------------------------------------------------------------------------------------------------- idle matrices


def test_skip_idle_leaves_out_the_stale_update_and_nothing_else() -> None:
    stack = normal(3, 5, 8, dtype=torch.float32)
    results = {}
    for skip in (False, True):
        p = nn.Parameter(stack.clone())
        group = {"params": [p], "matrices": [("batch",)]}
        optimizer = Muon([group], lr=LR, weight_decay=0.5, momentum=MU, ns_dtype="float32", skip_idle=skip)
        p.grad = normal(3, 5, 8, seed=1, dtype=torch.float32)
        optimizer.step()
        before, momentum = p.detach().clone(), optimizer.state[p]["momentum_sum"].clone()
        p.grad = normal(3, 5, 8, seed=2, dtype=torch.float32)
        p.grad[1] = 0
        optimizer.step()
        results[skip] = before, momentum, p.detach().clone(), optimizer.state[p]["momentum_sum"].clone()
    published, skipped = results[False], results[True]
    for plain, ours in zip(published[:2], skipped[:2], strict=True):
        assert torch.equal(plain, ours)  # nobody was idle yet
    for expert in (0, 2):
        assert torch.equal(published[2][expert], skipped[2][expert])
    before, momentum, after, shrunk = skipped
    assert torch.equal(after[1], before[1] * (1 - LR * 0.5))
    assert torch.equal(shrunk, published[3])
    torch.testing.assert_close(shrunk[1], MU * momentum[1])
    # The published rule gives the idle expert an update of full size: 0.85 of 0.2 by keller5.
    stale = (published[2][1] - before[1] * (1 - LR * 0.5)) / LR
    assert 0.14 < stale.square().mean().sqrt() < 0.2


def test_skip_idle_lets_the_row_moments_of_normuon_rest() -> None:
    p = nn.Parameter(normal(2, 4, 6, dtype=torch.float32))
    group = {"params": [p], "matrices": [("batch",)]}
    optimizer = Muon([group], lr=LR, ns_dtype="float32", skip_idle=True, normuon_beta2=0.9)
    p.grad = normal(2, 4, 6, seed=1, dtype=torch.float32)
    optimizer.step()
    before = optimizer.state[p]["row_second_moment"].clone()
    p.grad[1] = 0
    optimizer.step()
    after = optimizer.state[p]["row_second_moment"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


# ------------------------------------------------------------------------------------------ memory, types, odd shapes


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def every_second(t: Tensor) -> Tensor:
    room = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
    room[..., ::2] = t
    return room[..., ::2]


@pytest.mark.parametrize(
    ("shape", "spec", "lay"),
    [
        ((6, 9), ("matrix",), transposed),
        ((6, 9), ("rows", (4, 2)), transposed),
        ((6, 9), ("matrix",), every_second),
        ((3, 6, 9), ("batch",), transposed),
        ((6, 4, 3, 3), ("flatten", 2), channels_last),
        ((3, 6, 9), ("batch",), every_second),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_memory_order_does_not_matter(
    shape: tuple[int, ...], spec: tuple[Any, ...], lay: Callable[[Tensor], Tensor], gradient: bool
) -> None:
    """Weights, and with `gradient` their gradients too, in another order than row-major: the same bits."""
    results = []
    for how in (contiguous, lay):
        p = nn.Parameter(how(normal(*shape, dtype=torch.float32)))
        assert p.is_contiguous() == (how is contiguous)
        address = p.data_ptr()
        optimizer = Muon([{"params": [p], "matrices": [spec]}], lr=LR, ns_dtype="float32", normuon_beta2=0.9)
        for step in range(1, 4):
            G = normal(*shape, seed=step, dtype=torch.float32)
            p.grad = how(G) if gradient else G
            optimizer.step()
        assert p.data_ptr() == address
        results.append((p.detach(), optimizer.state[p]["momentum_sum"], optimizer.state[p]["row_second_moment"]))
        if how is every_second:
            assert p._base is None or (p._base.view(-1)[1::2] == 7).all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lay", [transposed, every_second, channels_last])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "algorithm",
    ["adamw", "scion"],
)
def test_memory_order_does_not_matter_to_adamw_and_scion(
    algorithm: str, lay: Callable[[Tensor], Tensor], gradient: bool
) -> None:
    results = []
    for how in (contiguous, lay):
        weight = how(normal(6, 4, 3, 3, dtype=torch.float32))
        p = nn.Parameter(weight)
        group = {"params": [p], "algorithm": algorithm} | ({"lmo": ("row_rms",)} if algorithm == "scion" else {})
        optimizer = Muon([group], lr=LR)
        for step in range(1, 4):
            G = normal(6, 4, 3, 3, seed=step, dtype=torch.float32)
            p.grad = how(G) if gradient else G
            optimizer.step()
        if how is every_second:  # nothing beside the parameter was written
            assert weight._base is not None
            assert (weight._base[..., 1::2] == 7).all()
        results.append((p.detach(), *(s for s in optimizer.state[p].values())))
    for a, b in zip(*results, strict=True):  # torch's AdamW for what is not contiguous rounds in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
def test_bf16_parameters_take_the_fp32_step_and_are_rounded_once() -> None:
    W, lr, steps = normal(6, 9, dtype=torch.bfloat16), 0.05, 3
    p, zero = nn.Parameter(W.clone()), nn.Parameter(torch.zeros(6, 9))
    ours = Muon([p], lr=lr, weight_decay=WEIGHT_DECAY, ns_dtype="float32")
    update = Muon([zero], lr=lr, weight_decay=0.0, ns_dtype="float32")
    for step in range(1, 1 + steps):
        p.grad = normal(6, 9, seed=step, dtype=torch.bfloat16)
        zero.grad = p.grad.float()
        with torch.no_grad():
            zero.zero_()
        ours.step()
        update.step()
        W = (W.float() * (1 - lr * WEIGHT_DECAY) + zero.detach()).bfloat16()
        assert torch.equal(p, W)
    assert ours.state[p]["momentum_sum"].dtype == torch.float32
    assert torch.equal(ours.state[p]["momentum_sum"], update.state[zero]["momentum_sum"])


@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
def test_types_in_one_group_do_not_meet() -> None:
    """A batch of bf16, fp16 and fp32 weights of one shape gives each what it gets alone."""
    types = (torch.bfloat16, torch.float16, torch.float32)

    def stepped(*dtypes: torch.dtype) -> list[Tensor]:
        params = [nn.Parameter(normal(4, 6, dtype=t)) for t in dtypes]
        optimizer = Muon(params, lr=LR, ns_dtype="float32")
        for step in (1, 2):
            for p in params:
                p.grad = normal(4, 6, seed=step, dtype=p.dtype)
            optimizer.step()
        return [p.detach() for p in params]

    for one, t in zip(stepped(*types), types, strict=True):
        assert torch.equal(one, stepped(t)[0]), t


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_newton_schulz_below_fp32_is_near_and_keeps_the_momentum_exact(dtype: str) -> None:
    results = []
    for ns_dtype in ("float32", dtype):
        p = nn.Parameter(normal(16, 24, dtype=torch.float32))
        optimizer = Muon([p], lr=LR, ns_dtype=ns_dtype)
        p.grad = normal(16, 24, seed=1, dtype=torch.float32)
        optimizer.step()
        results.append((p.detach() - normal(16, 24, dtype=torch.float32), optimizer.state[p]["momentum_sum"]))
    (exactly, momentum), (near, same) = results
    assert torch.equal(momentum, same)
    # Five steps in bf16, with 8 bits, are within 3 % of fp32's (DESIGN section 5); fp16 has 11.
    assert 0 < (near - exactly).norm() <= 0.03 * exactly.norm()


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_group_of_no_parameters(algorithm: str) -> None:
    """What a rank of a pipeline may have of a kind; torch's optimizers take it too."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([{"params": [p]}, {"params": [], "algorithm": algorithm}], lr=LR, ns_dtype="float32")
    p.grad = normal(4, 6, dtype=torch.float32)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.last_stats["update_rms_by_group"][1] is None


@pytest.mark.parametrize("algorithm", ["muon", "adamw", "scion"])
def test_numbers_of_a_step_of_fp64_parameters(algorithm: str) -> None:
    p = nn.Parameter(normal(4, 6))
    group = {"params": [p], "algorithm": algorithm} | ({"lmo": ("sign",)} if algorithm == "scion" else {})
    optimizer = Muon([group], lr=LR, ns_dtype="float32")
    p.grad = normal(4, 6, seed=1)
    optimizer.step()
    assert optimizer.last_stats["update_rms"][algorithm] > 0.15


def test_empty_parameters_and_groups_of_them() -> None:
    full = nn.Parameter(normal(4, 6, dtype=torch.float32))
    alone = nn.Parameter(full.detach().clone())
    empty = [nn.Parameter(torch.zeros(s)) for s in ((0, 6), (4, 0))]
    stack = nn.Parameter(torch.zeros(0, 4, 6))
    first = {"params": [empty[0], full, empty[1], stack], "matrices": [("matrix",)] * 3 + [("batch",)]}
    vector = {"params": [nn.Parameter(torch.zeros(0))], "algorithm": "adamw"}
    other = {"params": [nn.Parameter(torch.zeros(0, 3))], "algorithm": "scion", "lmo": ("sign",)}
    optimizer = Muon([first, vector, other], lr=LR, ns_dtype="float32")
    reference = Muon([alone], lr=LR, ns_dtype="float32")
    for group in (*optimizer.param_groups, *reference.param_groups):
        for p in group["params"]:
            p.grad = normal(*p.shape, seed=1, dtype=torch.float32) if p.numel() else torch.zeros_like(p)
    optimizer.step()
    reference.step()
    assert torch.equal(full, alone)
    optimizer.load_state_dict(optimizer.state_dict())


# ------------------------------------------------------------------------------------- groups, and gradients that lack


def test_groups_with_options_of_their_own_are_optimizers_of_their_own() -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "momentum": 0.5, "normuon_beta2": 0.9},
        {"weight_decay": 0.0, "nesterov": False, "ns_coefficients": ((2.0, -1.5, 0.5),), "ns_steps": 7},
        {"norm": "schatten", "schatten_p": 2.0, "exact_rms": True, "update_rms": 0.5},
        {"algorithm": "adamw", "betas": (0.5, 0.6), "eps": 1e-3},
        {"algorithm": "scion", "lmo": ("sign",), "update_rms": 0.7, "momentum_dtype": "bfloat16"},
    ]
    start = normal(4, 6, dtype=torch.float32)
    together = [nn.Parameter(start.clone()) for _ in options]
    one = Muon([{"params": [p]} | o for p, o in zip(together, options, strict=True)], lr=LR, ns_dtype="float32")
    apart = [nn.Parameter(start.clone()) for _ in options]
    many = [Muon([{"params": [p]} | o], lr=LR, ns_dtype="float32") for p, o in zip(apart, options, strict=True)]
    for step in (1, 2, 3):
        for p in (*together, *apart):
            p.grad = normal(4, 6, seed=step, dtype=torch.float32)
        for optimizer in (one, *many):
            optimizer.step()
    for p, q, o in zip(together, apart, options, strict=True):
        assert torch.equal(p, q), o
    assert one.last_stats["update_rms_by_group"] == [m.last_stats["update_rms_by_group"][0] for m in many]


@pytest.mark.parametrize("recipe", ["default", "normuon", "skip idle", "bf16 momentum"])
def test_part_of_a_batch_without_gradient_is_left_alone(recipe: str) -> None:
    """One parameter in the middle of a batch, and two neighbors in another step: as if the others were alone."""
    shapes: list[tuple[int, ...]] = [(4, 6), (6, 4), (2, 4, 6), (4, 6)]
    missing = {1: {1}, 2: {0, 2}, 3: set()}
    params = [nn.Parameter(normal(*s, dtype=torch.float32)) for s in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    specs = tuple(("batch",) if len(s) == 3 else ("matrix",) for s in shapes)
    common: dict[str, Any] = {"lr": LR, "ns_dtype": "float32"} | RECIPES[recipe]
    one = Muon([{"params": params, "matrices": specs}], **common)
    many = [Muon([{"params": [p], "matrices": (spec,)}], **common) for p, spec in zip(alone, specs, strict=True)]
    for step, absent in missing.items():
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = None if i in absent else normal(*p.shape, seed=step, dtype=torch.float32)
            q.grad = None if p.grad is None else p.grad.clone()
            many[i].step()
        before = {i: params[i].detach().clone() for i in absent}
        one.step()
        for i, kept in before.items():
            assert torch.equal(params[i], kept)
    for i, (p, q) in enumerate(zip(params, alone, strict=True)):
        assert torch.equal(p, q), i
        for key, state in one.state[p].items():
            assert torch.equal(state, many[i].state[q][key]), (i, key)


def test_numbers_of_a_step_are_of_what_took_part() -> None:
    """Two matrices in one batch, of which one has no gradient."""
    a, b = (nn.Parameter(normal(4, 6, dtype=torch.float32)) for _ in range(2))
    optimizer = Muon([a, b], lr=LR, ns_dtype="float32")
    a.grad = normal(4, 6, seed=1, dtype=torch.float32)
    optimizer.step()
    lone = Muon([nn.Parameter(a.detach().clone())], lr=LR, ns_dtype="float32")
    lone.param_groups[0]["params"][0].grad = a.grad.clone()
    lone.step()
    assert optimizer.last_stats["update_rms"] == pytest.approx(lone.last_stats["update_rms"])
    a.grad = None
    optimizer.step()
    assert optimizer.last_stats["update_rms"] == {}
    assert optimizer.last_stats["update_rms_by_group"] == [None]
    assert optimizer.last_stats["ns_flops"] == 0
