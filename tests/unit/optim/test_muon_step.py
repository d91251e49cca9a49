"""A step of Muon, each of its options: its paper's equation over several steps, written again in fp64.

Where SVD stands in for Newton-Schulz (norm="schatten") a step is fp64 throughout and 1e-12 is asked. Newton-Schulz
runs in fp32 at most, and its five steps multiply a rounding of 6e-8 by some ten: 1e-6 of how far the weights moved.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small import normal
from torch import Tensor, nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim import rules
from earthshine.optim.muon import Muon
from earthshine.optim.rules import register_scale

LR, WEIGHT_DECAY, MU, STEPS = 0.02, 0.1, 0.9, 4
KELLER = ((3.4445, -4.7750, 2.0315),) * 5
SHAPES = ((6, 11), (11, 6), (7, 7))
SVD: dict[str, Any] = {"norm": "schatten", "schatten_p": math.inf}

Rule = Callable[[Tensor], Tensor]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "_REGISTERED", {})
    return


# ------------------------------------------------------------------------------------- the equations, one fp64 matrix


def exact(M: Tensor) -> Tensor:
    """U V^T."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def polynomial(table: tuple[tuple[float, float, float], ...]) -> Rule:
    """Newton-Schulz with one (a, b, c) per step."""

    def direction(M: Tensor) -> Tensor:
        X = M / M.norm()
        for a, b, c in table:
            A = X @ X.T
            X = a * X + b * A @ X + c * A @ A @ X
        return X

    return direction


def matched(O: Tensor) -> Tensor:  # noqa: E741 - the papers' name
    return 0.2 * math.sqrt(max(O.shape)) * O


@dataclass
class Expected:
    """W <- W - lr (finish(direction(mu M + G)) + wd mask W), a matrix of its own."""

    W: Tensor
    direction: Rule = exact
    finish: Rule = matched
    nesterov: bool = True
    cautious: bool = False
    M: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.M = torch.zeros_like(self.W)

    def step(self, G: Tensor) -> None:
        self.M = MU * self.M + G
        U = self.finish(self.direction(MU * self.M + G if self.nesterov else self.M))
        mask = (U * self.W >= 0).double() if self.cautious else 1.0
        self.W = self.W - LR * (U + WEIGHT_DECAY * mask * self.W)


def compare(
    make: Callable[[Tensor], Expected], options: dict[str, Any], tolerance: float = 1e-12, steps: int = STEPS
) -> Muon:
    """Tall, wide and square parameters in one optimizer: largest error relative to the largest movement."""
    start = [0.1 * normal(*shape) for shape in SHAPES]
    params = [nn.Parameter(W.clone()) for W in start]
    expected = [make(W) for W in start]
    optimizer = Muon(params, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MU, ns_dtype="float32", **options)
    for step in range(1, steps + 1):
        for p, e in zip(params, expected, strict=True):
            G = normal(*p.shape, seed=step)
            p.grad = G.clone()
            e.step(G)
        optimizer.step()
    for p, e, W in zip(params, expected, start, strict=True):
        assert p.dtype == torch.float64
        assert (p.detach() - e.W).abs().max() <= tolerance * (e.W - W).abs().max(), tuple(p.shape)
        if options.get("momentum_dtype") != "bfloat16":
            torch.testing.assert_close(optimizer.state[p]["momentum_sum"], e.M, rtol=1e-14, atol=1e-14)
    return optimizer


def test_the_direction_is_the_nesterov_momentum_or_the_momentum() -> None:
    compare(Expected, SVD)
    compare(lambda W: Expected(W, nesterov=False), SVD | {"nesterov": False})


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0, math.inf])
def test_schatten_p_is_the_steepest_direction_under_its_norm(p: float) -> None:
    """argmax <G, X> over ||X||_Sp <= 1 is U (s / ||s||_q)^(q-1) V^T with 1/p + 1/q = 1."""
    q = 1 / (1 - 1 / p)

    def direction(M: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        X = U @ torch.diag((s / (s**q).sum() ** (1 / q)) ** (q - 1)) @ Vh
        if not math.isinf(p):
            assert float((torch.linalg.svdvals(X) ** p).sum()) == pytest.approx(1)
        return X

    compare(lambda W: Expected(W, direction), {"norm": "schatten", "schatten_p": p})


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ("original", lambda rows, cols: math.sqrt(max(1, rows / cols))),
        ("spectral", lambda rows, cols: math.sqrt(rows / cols)),
        ("ours", lambda rows, cols: 0.3 * rows + 0.01 * cols),
    ],
)
def test_scale_rules(registry: None, rule: str, factor: Callable[[int, int], float]) -> None:
    """update_rms belongs to match_rms_adamw alone (which every other test here has)."""
    if rule == "ours":
        register_scale("ours", factor)
    compare(lambda W: Expected(W, finish=lambda X: factor(*X.shape) * X), SVD | {"scale": rule, "update_rms": 77.0})


def test_a_registered_function_is_saved_by_its_name(registry: None) -> None:
    half = lambda rows, cols: 0.5  # noqa: E731 - a lambda is what cannot be saved otherwise
    with pytest.raises(ConfigError, match=r"has no name.*register_scale\('a_name', function\)"):
        Muon([nn.Parameter(torch.zeros(2, 3))], lr=LR, scale=half)
    register_scale("half", half)
    optimizer = compare(lambda W: Expected(W, finish=lambda X: 0.5 * X), SVD | {"scale": half})
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["scale"] == "half"
    compare(lambda W: Expected(W, finish=lambda X: 0.5 * X), SVD | {"scale": "half"}).load_state_dict(saved)
    register_scale("third", lambda rows, cols: 1 / 3)
    with pytest.raises(CheckpointError, match=r"group 0 scale: half \(saved\) -> third"):
        compare(lambda W: Expected(W, finish=lambda X: X / 3), SVD | {"scale": "third"}).load_state_dict(saved)


def test_exact_rms_is_moonlights_update_norm() -> None:
    """0.3 O / RMS(O), where O's RMS is not 1 / sqrt(max(rows, cols)), as with p = 4."""
    q = 4 / 3

    def direction(M: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        return U @ torch.diag(s ** (q - 1)) @ Vh

    optimizer = compare(
        lambda W: Expected(W, direction, lambda X: 0.3 * X / X.square().mean().sqrt()),
        {"norm": "schatten", "schatten_p": 4.0, "exact_rms": True, "update_rms": 0.3},
    )
    assert optimizer.last_stats["update_rms"]["muon"] == pytest.approx(0.3, rel=1e-12)


def test_normuon_is_algorithm_1_of_its_paper() -> None:
    """arXiv:2510.05491. 1e-6: the second moment per row is kept in fp32, whose rounding is 6e-8."""

    def make(W: Tensor) -> Expected:
        v = torch.zeros(W.shape[0], dtype=torch.float64)

        def finish(O: Tensor) -> Tensor:  # noqa: E741
            nonlocal v
            v = 0.8 * v + 0.2 * O.square().mean(dim=1)
            hat = O / (v.sqrt() + 1e-8)[:, None]
            return 0.2 * math.sqrt(O.numel()) / hat.norm() * hat

        return Expected(W, finish=finish)

    optimizer = compare(make, SVD | {"normuon_beta2": 0.8}, tolerance=1e-6)
    for p, (rows, _) in zip(optimizer.param_groups[0]["params"], SHAPES, strict=True):
        moment = optimizer.state[p]["row_second_moment"]
        assert (moment.shape, moment.dtype) == ((rows, 1), torch.float32)
        # After k steps of O with mean square 1 / max(rows, cols): less than that by 0.8^k.
        assert float(moment.mean()) == pytest.approx((1 - 0.8**STEPS) * min(p.shape) / p.numel(), rel=1e-6)
    assert optimizer.last_stats["update_rms"]["muon"] == pytest.approx(0.2, rel=1e-6)


def test_cautious_weight_decay_is_algorithm_1_of_its_paper() -> None:
    """arXiv:2510.12402, with the mask taken before the step; and it is not plain decay."""
    compare(lambda W: Expected(W, cautious=True), SVD | {"cautious_weight_decay": True})
    with pytest.raises(AssertionError):
        compare(Expected, SVD | {"cautious_weight_decay": True})


def test_momentum_in_bf16_is_rounded_once_a_step_and_after_its_use() -> None:
    """M is kept in bf16, but the direction is taken from M before it is rounded."""

    class Rounded(Expected):
        def step(self, G: Tensor) -> None:
            super().step(G)
            self.M = self.M.bfloat16().double()

    optimizer = compare(Rounded, SVD | {"momentum_dtype": "bfloat16"})
    assert {s["momentum_sum"].dtype for s in optimizer.state.values()} == {torch.bfloat16}


PAPERS_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
TABLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "keller5": KELLER,
    "you5": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in PAPERS_POLAR_EXPRESS),
    "deepseek_v4": KELLER[:1] * 8 + ((2.0, -1.5, 0.5),) * 2,
}


@pytest.mark.parametrize("name", list(TABLES))
def test_coefficient_tables_with_their_own_number_of_steps(name: str) -> None:
    """1e-5 for ten steps of which eight enlarge what is small by 3.4 each, and for polar_express's first by 8."""
    optimizer = compare(lambda W: Expected(W, polynomial(TABLES[name])), {"ns_coefficients": name}, tolerance=1e-5)
    assert optimizer.param_groups[0]["ns_steps"] == len(TABLES[name])


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_table_of_the_users(form: str) -> None:
    table = [[2.0, -1.5, 0.5], [1.875, -1.25, 0.375], [3.0, -3.2, 1.2]]
    exactly = tuple((a, b, c) for a, b, c in table)
    options: dict[str, Any] = {"ns_coefficients": table, "ns_form": form}
    optimizer = compare(lambda W: Expected(W, polynomial(exactly)), options, tolerance=1e-6)
    assert optimizer.param_groups[0]["ns_coefficients"] == exactly
    # More steps than rows repeat the last one; fewer leave rows out.
    compare(lambda W: Expected(W, polynomial((*exactly, exactly[2]))), options | {"ns_steps": 4}, tolerance=1e-6)
    compare(lambda W: Expected(W, polynomial(exactly[:2])), options | {"ns_steps": 2}, tolerance=1e-6)


def test_a_row_of_a_table_is_three_numbers() -> None:
    with pytest.raises(ConfigError, match="ns_coefficients"):
        Muon([nn.Parameter(torch.zeros(2, 3))], lr=LR, ns_coefficients=((2.0, -1.5),))


def test_one_row_is_the_normalized_row_times_the_polynomial_of_one() -> None:
    x = 1.0
    for a, b, c in KELLER:
        x = a * x + b * x**3 + c * x**5
    for shape in ((1, 9), (9, 1), (1, 1)):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, ns_dtype="float32")
        p.grad = normal(*shape, seed=3)
        optimizer.step()
        expected = -0.2 * math.sqrt(max(shape)) * x * p.grad / p.grad.norm()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)
