"""`Muon` against Moonlight's rule written again in fp64, and what an optimizer has to survive."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon

KELLER = (3.4445, -4.7750, 2.0315)
LR, WEIGHT_DECAY, MU = 3e-3, 0.1, 0.95


def moonlight_direction(G: Tensor) -> Tensor:
    """Five steps on one fp64 matrix, as the paper writes them."""
    a, b, c = KELLER
    X = G / G.norm() if G.norm() > 0 else G
    for _ in range(5):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def moonlight_step(W: Tensor, M: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """(W, M) after one step of arXiv:2502.16982 equation 4 with Nesterov (footnote 1), one fp64 matrix."""
    M = MU * M + G
    O = moonlight_direction(MU * M + G)  # noqa: E741 - the paper's name
    return W - LR * (0.2 * O * math.sqrt(max(W.shape)) + WEIGHT_DECAY * W), M


def gradients(kind: str, shape: tuple[int, ...], steps: int, seed: int) -> list[Tensor]:
    """`gaussian`; `rank4`: each step another product of rank 4; `subspace`: all steps in one subspace of rank 4."""
    g = torch.Generator().manual_seed(seed)
    rows, cols, batch = shape[-2], shape[-1], shape[:-2]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    if kind == "gaussian":
        return [normal(*shape) for _ in range(steps)]
    right = normal(*batch, 4, cols)
    if kind == "rank4":
        return [normal(*batch, rows, 4) @ normal(*batch, 4, cols) / 2 for _ in range(steps)]
    return [normal(*batch, rows, 4) @ right / 2 for _ in range(steps)]


# Shape, specification, and the slices of dimension 0 and batch that are one logical matrix each.
CASES: dict[str, tuple[tuple[int, ...], tuple[object, ...]]] = {
    "wide": ((24, 64), ("matrix",)),
    "tall": ((64, 24), ("matrix",)),
    "square": ((32, 32), ("matrix",)),
    "stack": ((5, 24, 40), ("batch",)),
    "rows": ((72, 40), ("rows", (40, 16, 16))),
}


def logical(t: Tensor, spec: tuple[object, ...]) -> list[Tensor]:
    """Views of the logical matrices, divided here by hand and not by the code under test."""
    if spec[0] == "batch":
        return list(t)
    return list(t.split(spec[1])) if spec[0] == "rows" else [t]  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("kind", ["gaussian", "rank4", "subspace"])
def test_equals_moonlights_rule_in_fp64(kind: str, form: str) -> None:
    """Parameters within 1e-6 after 20 steps: what fp32 leaves of 20 steps of 6e-4 per element (measured 5e-7)."""
    start = {
        n: 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(9)) for n, (shape, _) in CASES.items()
    }
    params = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    group = {"params": list(params.items()), "algorithm": "muon", "matrices": [spec for _, spec in CASES.values()]}
    optimizer = Muon([group], lr=LR, weight_decay=WEIGHT_DECAY, momentum=MU, ns_dtype="float32", ns_form=form)
    grads = {n: gradients(kind, shape, 20, seed=i) for i, (n, (shape, _)) in enumerate(CASES.items())}
    for step in range(20):
        for n, p in params.items():
            p.grad = grads[n][step].clone()
        optimizer.step()
    for n, (_, spec) in CASES.items():
        for index, W in enumerate(logical(start[n].double(), spec)):
            M = torch.zeros_like(W)
            for G in grads[n]:
                W, M = moonlight_step(W, M, logical(G.double(), spec)[index])
            got = logical(params[n].detach().double(), spec)[index]
            assert (got - W).abs().max() <= 1e-6, f"{n}[{index}]"
            # the state, too: relative, as sums of twenty gradients are of size 12
            state = logical(optimizer.state[params[n]]["momentum_sum"].double(), spec)[index]
            assert (state - M).abs().max() <= 1e-6 * M.abs().max()


def test_without_nesterov_the_direction_is_the_momentum() -> None:
    W, grads = (
        0.02 * torch.randn(12, 20, generator=torch.Generator().manual_seed(0)),
        gradients("gaussian", (12, 20), 2, 1),
    )
    p = nn.Parameter(W.clone())
    optimizer = Muon([p], lr=LR, weight_decay=0.0, momentum=0.5, nesterov=False, update_rms=1.0, ns_dtype="float32")
    expected, M = W.double(), torch.zeros(12, 20, dtype=torch.float64)
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
        M = 0.5 * M + G.double()
        expected = expected - LR * math.sqrt(20) * moonlight_direction(M)
    assert (p.detach() - expected).abs().max() <= 1e-6


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(11, 8))
    model.add_module("norm", nn.LayerNorm(8))
    model.add_module("up", nn.Linear(8, 16, bias=False))
    model.add_module("down", nn.Linear(16, 8))
    model.add_module("head", nn.Linear(8, 11, bias=False))
    return model


def train(model: nn.Module, optimizer: Muon, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(11, (6,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()


def tiny_optimizer(model: nn.Module, **options: object) -> Muon:
    return Muon(param_groups(model), **{"lr": LR, "ns_dtype": "float32", **options})  # type: ignore[arg-type]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_state_exists_before_the_first_step() -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    assert set(optimizer.state[model.up.weight]) == {"momentum_sum"}  # type: ignore[union-attr,index]
    assert set(optimizer.state[model.embed.weight]) == {"exp_avg", "exp_avg_sq", "step"}  # type: ignore[union-attr,index]
    assert set(optimizer.state) == set(model.parameters())


def test_state_dict_round_trip_resumes_bit_for_bit() -> None:
    a, b = tiny_model(), tiny_model()
    opt_a, opt_b = tiny_optimizer(a), tiny_optimizer(b)
    train(a, opt_a, 3, seed=1)
    file = io.BytesIO()
    torch.save({"model": a.state_dict(), "optimizer": opt_a.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    b.load_state_dict(saved["model"])
    opt_b.load_state_dict(saved["optimizer"])
    train(a, opt_a, 3, seed=2)
    train(b, opt_b, 3, seed=2)
    assert_same(a, b)


def test_distributed_checkpoint_names_survive_a_round_trip() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    a, b = tiny_model(), tiny_model()
    opt_a, opt_b = tiny_optimizer(a), tiny_optimizer(b)
    train(a, opt_a, 3, seed=1)
    b.load_state_dict(a.state_dict())
    saved = get_optimizer_state_dict(a, opt_a)
    assert set(saved["state"]["up.weight"]) == {"momentum_sum"}  # type: ignore[index]
    set_optimizer_state_dict(b, opt_b, copy.deepcopy(saved))
    train(a, opt_a, 2, seed=2)
    train(b, opt_b, 2, seed=2)
    assert_same(a, b)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"momentum": 0.9}, r"group 0 momentum: 0\.95 \(saved\) -> 0\.9"),
        ({"weight_decay": 0.0}, r"group 0 weight_decay: 0\.1 \(saved\) -> 0\.0; group 1 weight_decay"),
        ({"betas": (0.9, 0.99)}, r"betas\[1\]: 0\.95 \(saved\) -> 0\.99"),
        ({"ns_form": "standard"}, r"ns_form: auto \(saved\) -> standard"),
    ],
)
def test_a_saved_hyper_parameter_that_differs_is_refused(option: dict[str, object], message: str) -> None:
    saved = tiny_optimizer(tiny_model()).state_dict()
    other = tiny_optimizer(tiny_model(), **option)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(saved)
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_learning_rate_is_the_saved_ones_and_no_difference() -> None:
    saved = tiny_optimizer(tiny_model(), lr=1e-3).state_dict()
    other = tiny_optimizer(tiny_model(), lr=2e-3)
    other.load_state_dict(saved)
    assert {g["lr"] for g in other.param_groups} == {1e-3}


def test_other_parameters_or_missing_state_are_refused() -> None:
    optimizer = tiny_optimizer(tiny_model())
    renamed = tiny_optimizer(tiny_model()).state_dict()
    renamed["param_groups"][0]["param_names"] = ["left.weight", *renamed["param_groups"][0]["param_names"][1:]]
    with pytest.raises(CheckpointError, match=r"param_names\[0\]: left\.weight \(saved\) -> up\.weight"):
        optimizer.load_state_dict(renamed)
    missing = tiny_optimizer(tiny_model()).state_dict()
    del missing["state"][0]
    with pytest.raises(CheckpointError, match="momentum_sum of parameter up.weight is missing"):
        optimizer.load_state_dict(missing)
    fewer = tiny_model()
    fewer.up.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"parameters per group: \[1, 5\] \(saved\) -> \[2, 5\]"):
        optimizer.load_state_dict(tiny_optimizer(fewer).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    a = tiny_model()
    opt_a = tiny_optimizer(a)
    train(a, opt_a, 2, seed=1)
    both = (a, opt_a)
    b, opt_b = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert opt_b.last_stats["update_rms"] == {}  # a copy has made no step yet
    train(a, opt_a, 2, seed=2)
    train(b, opt_b, 2, seed=2)
    assert_same(a, b)


def test_no_gradient_means_no_change_and_a_zero_gradient_no_nan() -> None:
    p, q, stack = (nn.Parameter(torch.ones(s)) for s in ((4, 6), (4, 6), (3, 4, 6)))
    group = {"params": [p, q, stack], "algorithm": "muon", "matrices": [("matrix",), ("matrix",), ("batch",)]}
    v, w = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Muon([group, {"params": [v, w], "algorithm": "adamw"}], lr=0.1, weight_decay=0.5, ns_dtype="float32")
    optimizer.step()
    assert all(torch.equal(x, torch.ones_like(x)) for x in (p, q, stack, v, w))
    assert optimizer.last_stats["update_rms"] == {}
    q.grad, stack.grad, w.grad = torch.zeros(4, 6), torch.zeros(3, 4, 6), torch.ones(3)
    stack.grad[1] = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 6))
    assert torch.equal(v, torch.ones(3))
    for untouched in (q, stack[0], stack[2]):  # only the decay
        torch.testing.assert_close(untouched, torch.full((4, 6), 0.95))
    assert stack.isfinite().all()
    assert (stack[1] - 0.95).abs().max() > 1e-3
    assert not optimizer.state[p]["momentum_sum"].any()
    assert optimizer.state[v]["step"] == 0


def test_a_step_writes_to_no_gradient_and_keeps_no_alias() -> None:
    """torch once normalized the momentum buffer in place (nesterov=False, bf16: PR 194664)."""
    for nesterov in (True, False):
        p = nn.Parameter(torch.zeros(4, 6))
        optimizer = Muon([p], lr=0.1, weight_decay=0.0, nesterov=nesterov, ns_dtype="float32")
        G = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G)
        assert torch.equal(optimizer.state[p]["momentum_sum"], G)


def test_update_rms_is_counted_per_algorithm() -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    for group in optimizer.param_groups:
        moved = torch.cat([((before[p] - p.detach()) / LR).flatten() for p in group["params"]])
        got = optimizer.last_stats["update_rms"][group["algorithm"]]
        assert got == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)  # moves of 1e-3 in fp32
    assert optimizer.last_stats["update_rms"]["adamw"] == pytest.approx(1, rel=1e-4)  # AdamW's first step is the sign


@pytest.mark.parametrize(("rows", "cols"), [(48, 48), (32, 96), (96, 32), (16, 128)])
def test_update_rms_is_near_the_nominal(rows: int, cols: int) -> None:
    """Five steps do not bring singular values to 1: 0.80 to 0.88 of the nominal 0.2 here, 0.94 on matrices of 576."""
    p = nn.Parameter(torch.zeros(rows, cols))
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, ns_dtype="float32")
    p.grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0.78 * 0.2 <= optimizer.last_stats["update_rms"]["muon"] <= 0.2


def test_closure_schedulers_tensor_rates_and_later_groups() -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model, lr=torch.tensor(1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(tiny_optimizer(model), lambda step: 0.5**step)
    later = nn.Parameter(torch.ones(2, 4, 6))
    optimizer.add_param_group({"params": [("later", later)], "matrices": [("batch",)]})
    assert not optimizer.state[later]["momentum_sum"].any()

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.arange(5)).square().mean() + later.pow(3).mean()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [LR / 2, LR / 2]
    scheduled = tiny_optimizer(model)
    scheduled.load_state_dict(scheduler.optimizer.state_dict())  # with the scheduler's initial_lr in it


def test_large_stacks_are_cut_and_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from earthshine.ops import orthogonalize

    stack = torch.randn(7, 16, 24, generator=torch.Generator().manual_seed(0))

    def stepped() -> Tensor:
        p = nn.Parameter(stack.clone())
        optimizer = Muon([{"params": [p], "matrices": [("batch",)]}], lr=0.1, ns_dtype="float32")
        p.grad = stack.clone()
        optimizer.step()
        return p.detach()

    whole = stepped()
    monkeypatch.setattr(orthogonalize, "_CPU_BATCH_BYTES", 20_000)
    assert orthogonalize.matrices_per_batch(16, 24, torch.float32, torch.device("cpu")) == 3
    torch.testing.assert_close(stepped(), whole, rtol=1e-5, atol=1e-6)  # only the products' rounding may differ


def test_unfit_parameters_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter 0 of shape \[3, 4, 4\] is not one matrix: .*param_groups"):
        Muon([nn.Parameter(torch.zeros(3, 4, 4))], lr=0.1)
    with pytest.raises(ConfigError, match=r"fused of shape \[7, 4\] cannot be divided .*'rows', \(4, 4\)"):
        Muon([{"params": [("fused", nn.Parameter(torch.zeros(7, 4)))], "matrices": [("rows", (4, 4))]}], lr=0.1)
    with pytest.raises(ConfigError, match="1 'matrices' for 2 parameters"):
        Muon([{"params": [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)], "matrices": [("matrix",)]}], lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizer\.momentum=1\.0 must be"):
        Muon([nn.Parameter(torch.zeros(4, 4))], lr=0.1, momentum=1.0)
    with pytest.raises(ConfigError, match=r"algorithm='sgd'"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))], "algorithm": "sgd"}], lr=0.1)
    with pytest.raises(ConfigError, match="real floating-point"):
        Muon([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))], lr=0.1)
    embedding = nn.Embedding(4, 4, sparse=True)
    optimizer = Muon([{"params": embedding.parameters(), "algorithm": "adamw"}], lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [("cube", nn.Parameter(torch.zeros(2, 3, 4)))]})
    train(model, optimizer, 1, seed=0)
    assert len(optimizer.param_groups) == 2
