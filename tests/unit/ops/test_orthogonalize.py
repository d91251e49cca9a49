"""Newton-Schulz against the same polynomial in fp64, in every form and type it is offered in."""

import pytest
import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.ops import orthogonalize
from earthshine.ops.orthogonalize import (
    choose_form,
    coefficient_steps,
    matrices_per_batch,
    newton_schulz,
    newton_schulz_flops,
    resolve_form,
)

CPU = torch.device("cpu")


def reference(G: Tensor, steps: int = 5) -> Tensor:
    """Through the singular values in fp64: the scalar polynomial applied to each of them."""
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


def sample(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(rows, cols, generator=g)
    if kind == "condition":  # singular values over three decades
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        return U @ torch.diag(torch.logspace(0, -3, len(s))) @ Vh
    if kind == "rank16":
        return torch.randn(rows, 16, generator=g) @ torch.randn(16, cols, generator=g)
    return G


def relative_error(O: Tensor, G: Tensor) -> float:  # noqa: E741 - the paper's name
    exact = reference(G)
    return float((O.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("kind", ["gaussian", "condition", "rank16"])
@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (24, 72), (72, 24), (400, 400), (390, 480)])
def test_fp32_equals_the_polynomial(form: str, kind: str, rows: int, cols: int) -> None:
    """The polynomial's slope at 0 is 485: a rounding of 6e-8 becomes 3e-5 (measured up to 2e-5 in standard form). The
    gram form sees squared singular values and keeps fewer digits of the smallest (measured up to 2e-3, rank 16), far
    inside the bar of 0.03. From 384 rows on, symmetric products are computed by halves."""
    G = sample(kind, rows, cols)
    O = newton_schulz(G, form=form)  # type: ignore[arg-type]  # noqa: E741
    is_standard = resolve_form(form, rows, cols, torch.float32, CPU)[0] == "standard"  # type: ignore[arg-type]
    assert relative_error(O, G) <= (1e-4 if is_standard else 5e-3)
    assert torch.linalg.svdvals(O).max() <= 1.01 * torch.linalg.svdvals(reference(G)).max()


def test_fp64_needs_no_less() -> None:
    G = sample("condition", 24, 72).double()
    for form in ("standard", "gram"):
        assert relative_error(newton_schulz(G, dtype=torch.float64, form=form), G) <= 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gaussian", "condition", "rank16"])
@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (24, 72)])
def test_bf16_is_no_worse_than_torch(kind: str, rows: int, cols: int) -> None:
    """DESIGN's bar for other precisions: relative error to fp64 <= max(0.03, 1.1x torch.optim.Muon's on the same
    matrix), largest singular value <= 1.01x its. Normalising before the cast loses less, so it is not near the bar."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    G = sample(kind, rows, cols)
    ours = newton_schulz(G, dtype=torch.bfloat16)
    theirs = _zeropower_via_newtonschulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, G) <= max(0.03, 1.1 * relative_error(theirs, G))
    largest = [torch.linalg.svdvals(x.double()).max() for x in (ours, theirs)]
    assert largest[0] <= 1.01 * largest[1]


def test_standard_form_has_torchs_operations() -> None:
    """In fp32, written as torch.optim.Muon writes it: the same bits, whatever the batch is cut into."""
    G_BMN = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    X = G_BMN / G_BMN.abs().amax((1, 2), keepdim=True)
    X = X / X.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    torch.testing.assert_close(newton_schulz(G_BMN), X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e-12, 1e12, 1e25])
def test_any_scale_gives_the_same_direction(scale: float) -> None:
    """Squares below 1e-38 or above 1e38 leave fp32; a norm below 1e-30 counts as 1e-30, so 1e-44 shrinks to nothing."""
    G = sample("gaussian", 16, 24)
    O = newton_schulz(G * scale)  # noqa: E741
    if scale < 1e-30:
        assert O.abs().max() < 1e-8
    else:
        torch.testing.assert_close(O, newton_schulz(G), rtol=1e-4, atol=1e-5)


def test_zero_empty_and_not_finite() -> None:
    G_BMN = torch.zeros(3, 4, 6)
    G_BMN[1] = sample("gaussian", 4, 6)
    G_BMN[2, 0, 0] = float("inf")
    O_BMN = newton_schulz(G_BMN)
    assert not O_BMN[0].any()
    torch.testing.assert_close(O_BMN[1], newton_schulz(G_BMN[1]))
    assert O_BMN[2].isnan().all()
    for shape in ((0, 4, 6), (2, 0, 6), (2, 4, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_the_input_is_not_touched_nor_returned(dtype: torch.dtype, given: torch.dtype) -> None:
    for shape in ((2, 6, 8), (2, 8, 6), (2, 0, 6)):
        G_BMN = torch.ones(shape, dtype=given) / 4
        before = G_BMN.clone()
        O_BMN = newton_schulz(G_BMN, dtype=dtype)
        O_BMN.zero_()
        assert torch.equal(G_BMN, before)
        assert O_BMN.dtype == dtype


def test_batches_are_cut_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    G_BMN = torch.randn(7, 12, 20, generator=torch.Generator().manual_seed(0))
    whole = newton_schulz(G_BMN)
    monkeypatch.setattr(orthogonalize, "_CPU_BATCH_BYTES", 3 * 4 * (2 * 12 * 20 + 3 * 12 * 12))
    assert matrices_per_batch(12, 20, torch.float32, CPU) == matrices_per_batch(20, 12, torch.float32, CPU) == 3
    assert matrices_per_batch(5000, 5000, torch.float32, CPU) == 1
    torch.testing.assert_close(newton_schulz(G_BMN), whole, rtol=1e-5, atol=1e-6)
    for i in range(7):
        torch.testing.assert_close(newton_schulz(G_BMN[i]), whole[i], rtol=1e-5, atol=1e-6)


def test_the_rule_of_the_forms() -> None:
    assert choose_form(576, 1536, torch.float32, CPU) == ("gram", 4)
    assert choose_form(1536, 576, torch.float32, CPU) == ("gram", 4)
    assert choose_form(576, 576, torch.float32, CPU) == ("standard", 4)
    assert choose_form(192, 576, torch.float32, CPU) == ("gram", 1)
    assert choose_form(192, 256, torch.float32, CPU) == ("standard", 1)
    assert choose_form(576, 1536, torch.bfloat16, CPU) == ("standard", 1)
    assert choose_form(576, 1536, torch.float32, torch.device("meta")) == ("gram", 1)  # blocks are a CPU's gain
    assert resolve_form("standard", 576, 1536, torch.float32, CPU) == ("standard", 1)  # torch's operations
    with pytest.raises(ConfigError, match='ns_form="gram" with ns_dtype=torch.bfloat16 diverges'):
        newton_schulz(torch.ones(2, 3), dtype=torch.bfloat16, form="gram")
    with pytest.raises(ConfigError, match="ns_form='fast'"):
        newton_schulz(torch.ones(2, 3), form="fast")  # type: ignore[arg-type]


def test_operations_are_counted() -> None:
    """n^3 (20 r + 10) and n^3 (4 r + 34) for five steps, r = L/S; p blocks leave (p + 1) / 2p of symmetric ones."""
    n = 64
    for r in (1, 3):
        assert newton_schulz_flops(n, r * n) == newton_schulz_flops(r * n, n) == n**3 * (20 * r + 10)
        assert newton_schulz_flops(n, r * n, form="gram") == n**3 * (4 * r + 34)
    assert newton_schulz_flops(n, n, form="standard", blocks=2) == n**3 * (15 // 2 * 2 + 1 + 10)
    assert newton_schulz_flops(n, n, steps=1) == n**3 * 6


def test_coefficient_tables() -> None:
    assert coefficient_steps("keller5", 3) == ((3.4445, -4.7750, 2.0315),) * 3
    assert coefficient_steps(((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), 3) == (
        (1.0, 2.0, 3.0),
        (4.0, 5.0, 6.0),
        (4.0, 5.0, 6.0),
    )
    with pytest.raises(ConfigError, match="'keller' is not a known table; known: keller5"):
        newton_schulz(torch.ones(2, 2), coefficients="keller")
    with pytest.raises(ConfigError, match="steps=0"):
        newton_schulz(torch.ones(2, 2), steps=0)
    with pytest.raises(ConfigError, match=r"not \[4\]"):
        newton_schulz(torch.ones(4))


def test_two_steps_of_a_users_table() -> None:
    table = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
    G = sample("gaussian", 6, 10)
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    for form in ("standard", "gram"):
        got = newton_schulz(G, coefficients=table, steps=2, form=form)  # type: ignore[arg-type]
        torch.testing.assert_close(got.double(), U @ torch.diag(s) @ Vh, rtol=1e-5, atol=1e-6)
