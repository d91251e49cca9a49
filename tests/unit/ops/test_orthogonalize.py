"""Newton-Schulz against the same polynomial in fp64, in every form and type and with every table it is offered in."""

import pytest
import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.ops import orthogonalize
from earthshine.ops.newton_schulz_tables import COEFFICIENTS, coefficient_steps, default_steps, gram_restarts
from earthshine.ops.orthogonalize import (
    choose_form,
    matrices_per_batch,
    newton_schulz,
    newton_schulz_flops,
    resolve_form,
    resolve_method,
)

CPU = torch.device("cpu")
KELLER = (3.4445, -4.7750, 2.0315)
KINDS = ("gaussian", "condition", "rank16", "few tokens")


def reference(G: Tensor, table: str = "keller5") -> Tensor:
    """Through the singular values in fp64: the scalar polynomial applied to each of them."""
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficient_steps(table):
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


def sample(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(rows, cols, generator=g)
    if kind == "condition":  # singular values over three decades
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        return U @ torch.diag(torch.logspace(0, -3, len(s))) @ Vh
    if kind == "rank16":
        return torch.randn(rows, 16, generator=g) @ torch.randn(16, cols, generator=g)
    if kind == "few tokens":  # an expert's gradient: outer products of unequal weight that have much in common
        common = [torch.randn(n, 1, generator=g) for n in (rows, cols)]
        left, right = (torch.randn(n, 24, generator=g) + c for n, c in zip((rows, cols), common, strict=True))
        return left * torch.exp(1.5 * torch.randn(24, generator=g)) @ right.mT
    return G


def relative_error(O: Tensor, G: Tensor, table: str = "keller5") -> float:  # noqa: E741 - the paper's name
    exact = reference(G, table)
    return float((O.double() - exact).norm() / exact.norm())


def torch_muon(G: Tensor, table: str = "keller5") -> Tensor:
    """torch.optim.Muon's lines (2.13), in bf16, with a row of coefficients per step."""
    X = G.bfloat16()
    X = X.T if G.size(0) > G.size(1) else X
    X.div_(X.norm().clamp(min=1e-7))
    for a, b, c in coefficient_steps(table):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if G.size(0) > G.size(1) else X


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (24, 72), (72, 24), (400, 400), (390, 480)])
def test_fp32_equals_the_polynomial(form: str, kind: str, rows: int, cols: int) -> None:
    """The polynomial's slope at 0 is 485: a rounding of 6e-8 becomes 3e-5 (measured up to 2e-5 in standard form). The
    gram form sees squared singular values and keeps fewer digits of the smallest (measured up to 0.015, of few tokens
    with one large common direction): inside DESIGN's bar of 0.03. From 320 rows on, symmetric products are computed by
    halves."""
    G = sample(kind, rows, cols)
    O = newton_schulz(G, form=form)  # type: ignore[arg-type]  # noqa: E741
    is_standard = resolve_form(form, rows, cols, torch.float32, CPU)[0] == "standard"  # type: ignore[arg-type]
    assert relative_error(O, G) <= (1e-4 if is_standard else 0.03)
    assert torch.linalg.svdvals(O).max() <= 1.01 * torch.linalg.svdvals(reference(G)).max()


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("table", COEFFICIENTS)
def test_fp32_with_every_table(form: str, table: str) -> None:
    """Slopes at 0 up to 80,000 (deepseek_v4), so 5e-3 of the smallest singular values for that one; without restarts
    its gram form would end at 1e28."""
    for kind in KINDS:
        G = sample(kind, 48, 64)
        O = newton_schulz(G, table, form=form)  # type: ignore[arg-type]  # noqa: E741
        assert relative_error(O, G, table) <= 5e-3, kind


def test_fp64_needs_no_less() -> None:
    G = sample("condition", 24, 72).double()
    for form in ("standard", "gram"):
        assert relative_error(newton_schulz(G, dtype=torch.float64, form=form), G) <= 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("table", COEFFICIENTS)
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (96, 64), (64, 160)])
def test_below_fp32_is_no_worse_than_torch(table: str, form: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    """DESIGN's bar for other precisions: relative error to fp64 <= max(0.03, 1.1x torch.optim.Muon's on the same
    matrix), largest singular value <= 1.01x its. Also of the gram form, which without restarts ends at 2 to 1e38."""
    for kind in KINDS:
        G = sample(kind, rows, cols)
        ours = newton_schulz(G, table, dtype=dtype, form=form)  # type: ignore[arg-type]
        theirs = torch_muon(G, table)
        assert ours.dtype == dtype
        assert relative_error(ours, G, table) <= max(0.03, 1.1 * relative_error(theirs, G, table)), kind
        largest = [torch.linalg.svdvals(x.double()).max() for x in (ours, theirs)]
        assert largest[0] <= 1.01 * largest[1], kind


def test_those_are_torchs_lines() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in ((20, 30), (30, 20)):
        G = sample("gaussian", *shape)
        assert torch.equal(torch_muon(G), _zeropower_via_newtonschulz(G, KELLER, 5, 1e-7))


def test_standard_form_has_torchs_operations() -> None:
    """In fp32, written as torch.optim.Muon writes it; the norm alone is summed in another order."""
    G_BMN = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    X = G_BMN / G_BMN.abs().amax((1, 2), keepdim=True)
    X = X / X.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    torch.testing.assert_close(newton_schulz(G_BMN), X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_matrix_has_the_same_bits_in_any_batch_and_on_any_threads(form: str) -> None:
    """Alone, in pairs and all together, on one thread and two, wide and tall: the layout proof of Muon rests on it.
    Tiny and odd sizes are those that MKL computes in another order."""
    threads = torch.get_num_threads()
    shapes = [(2, 135), (9, 9), (10, 675), (11, 417), (33, 91), (177, 301)]
    try:
        for S, L in shapes:
            G_BSL = torch.randn(3, S, L, generator=torch.Generator().manual_seed(S * L))
            torch.set_num_threads(1)
            expected = newton_schulz(G_BSL, form=form)  # type: ignore[arg-type]
            for n in (1, 2):
                torch.set_num_threads(n)
                for parts in (G_BSL.split(1), G_BSL.split(2)):
                    got = torch.cat([newton_schulz(part, form=form) for part in parts])  # type: ignore[arg-type]
                    assert torch.equal(got, expected), (S, L, n, len(parts))
            if S != L:
                tall = newton_schulz(G_BSL.mT.contiguous(), form=form)  # type: ignore[arg-type]
                assert torch.equal(tall.mT, expected), (S, L)
    finally:
        torch.set_num_threads(threads)


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


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [4, 5])
def test_a_consumed_input_gives_the_same_bits(form: str, dtype: torch.dtype, steps: int) -> None:
    for shape in ((3, 40, 50), (3, 50, 40), (3, 5, 6), (40, 50)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = newton_schulz(G, steps=steps, dtype=dtype, form=form)  # type: ignore[arg-type]
        given = G.clone()
        got = newton_schulz(given, steps=steps, dtype=dtype, form=form, consume=True)  # type: ignore[arg-type]
        assert torch.equal(got, expected)
        if dtype == torch.float32 and shape[-2:] == (40, 50):
            assert got.data_ptr() == given.data_ptr()  # what it is for


def test_no_gradient_flows() -> None:
    G = torch.ones(2, 3, requires_grad=True)
    assert not newton_schulz(G).requires_grad


@pytest.mark.slow  # 20 s of compiling
@pytest.mark.filterwarnings("default")  # torch's own compiler uses what torch deprecates
@pytest.mark.parametrize(("form", "dtype"), [("standard", torch.float32), ("gram", torch.bfloat16)])
def test_compiled_is_as_accurate(form: str, dtype: torch.dtype) -> None:
    """Bits may differ: fused additions round once less. (torch 2.13 gets products into reused buffers wrong.)"""
    for rows, cols in ((40, 64), (64, 40), (48, 200)):
        G = sample("gaussian", rows, cols)
        compiled = newton_schulz(G, dtype=dtype, form=form, compile=True)  # type: ignore[arg-type]
        eager = newton_schulz(G, dtype=dtype, form=form)  # type: ignore[arg-type]
        assert relative_error(compiled, G) <= max(1e-4, 1.1 * relative_error(eager, G))


def test_batches_are_cut_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    G_BMN = torch.randn(7, 40, 50, generator=torch.Generator().manual_seed(0))
    whole = newton_schulz(G_BMN)
    monkeypatch.setattr(orthogonalize, "_CPU_BATCH_BYTES", 3 * 4 * (2 * 40 * 50 + 3 * 40 * 40))
    assert matrices_per_batch(40, 50, torch.float32, CPU) == matrices_per_batch(50, 40, torch.float32, CPU) == 3
    assert matrices_per_batch(5000, 5000, torch.float32, CPU) == 1
    assert torch.equal(newton_schulz(G_BMN), whole)


def test_the_rule_of_the_forms() -> None:
    meta = torch.device("meta")  # stands for an accelerator: blocks are a CPU's gain
    assert choose_form(576, 1536, torch.float32, CPU) == ("gram", 4)
    assert choose_form(1536, 576, torch.float32, CPU) == ("gram", 4)
    assert choose_form(576, 576, torch.float32, CPU) == ("standard", 4)
    assert choose_form(192, 576, torch.float32, CPU) == ("gram", 1)
    assert choose_form(320, 320, torch.float32, CPU) == ("standard", 2)
    assert choose_form(192, 256, torch.float32, CPU) == ("standard", 1)
    assert choose_form(576, 1536, torch.float32, meta) == ("gram", 1)
    assert resolve_form("standard", 576, 1536, torch.float32, CPU) == ("standard", 1)  # torch's operations
    for dtype in (torch.bfloat16, torch.float16):
        assert choose_form(256, 704, dtype, CPU) == choose_form(704, 256, dtype, meta) == ("gram", 1)
        assert choose_form(256, 512, dtype, CPU) == ("standard", 1)
        assert choose_form(2048, 2048, dtype, CPU) == ("standard", 4)
        assert choose_form(2048, 2048, dtype, meta) == ("standard", 1)
        # Two restarts leave too little to save at 2.5, and one after every step nothing anywhere.
        assert choose_form(256, 640, dtype, CPU, coefficients="you5") == ("standard", 1)
        assert choose_form(256, 768, dtype, CPU, coefficients="you5") == ("gram", 1)
        assert choose_form(256, 1024, dtype, CPU, coefficients="polar_express") == ("standard", 1)
    with pytest.raises(ConfigError, match="ns_form='fast'"):
        newton_schulz(torch.ones(2, 3), form="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"torch\.int32 is not possible"):
        newton_schulz(torch.ones(2, 3), dtype=torch.int32)


def test_restarts_are_where_rounding_would_show() -> None:
    bf16, fp32, fp64 = (torch.finfo(t).eps for t in (torch.bfloat16, torch.float32, torch.float64))
    restarts = {name: [gram_restarts(coefficient_steps(name), e) for e in (bf16, fp32, fp64)] for name in COEFFICIENTS}
    assert restarts == {
        "keller5": [(3,), (), ()],
        "you5": [(2, 4), (), ()],
        "polar_express": [(1, 2, 3, 4), (4,), ()],
        "deepseek_v4": [(2, 4, 6, 8), (5,), ()],
    }
    assert gram_restarts(coefficient_steps("keller5", 7), bf16) == (1, 2, 3, 4, 5, 6)  # not a measured table
    assert resolve_method("gram", 4, 8, torch.bfloat16, CPU).restarts == (3,)
    assert resolve_method("standard", 4, 8, torch.bfloat16, CPU).restarts == ()


def test_operations_are_counted() -> None:
    """n^3 (20 r + 10) and n^3 (4 r + 34) for five steps, r = L/S; p blocks leave (p + 1) / 2p of symmetric ones."""
    n = 64
    for r in (1, 3):
        assert newton_schulz_flops(n, r * n) == newton_schulz_flops(r * n, n) == n**3 * (20 * r + 10)
        assert newton_schulz_flops(n, r * n, form="gram") == n**3 * (4 * r + 34)
    assert newton_schulz_flops(n, n, form="standard", blocks=2) == n**3 * (15 // 2 * 2 + 1 + 10)
    assert newton_schulz_flops(n, n, steps=1) == n**3 * 6
    assert newton_schulz_flops(n, 3 * n, form="gram", restarts=1) == n**3 * (8 * 3 + 28)
    assert resolve_method("gram", n, 3 * n, torch.bfloat16, CPU).flops(n, 3 * n) == n**3 * (8 * 3 + 28)


def test_coefficient_tables() -> None:
    assert coefficient_steps("keller5", 3) == (KELLER,) * 3
    assert coefficient_steps("deepseek_v4") == (KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2
    assert coefficient_steps("polar_express", 9)[7:] == ((1.875, -1.25, 0.375),) * 2
    assert [default_steps(name) for name in COEFFICIENTS] == [5, 5, 5, 10]
    assert coefficient_steps([[1, 2, 3], (4.0, 5.0, 6.0)], 3) == (
        (1.0, 2.0, 3.0),
        (4.0, 5.0, 6.0),
        (4.0, 5.0, 6.0),
    )
    assert default_steps([(1, 2, 3)] * 4) == len(coefficient_steps([(1, 2, 3)] * 4)) == 4


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_a_table_takes_singular_values_towards_one(table: str) -> None:
    """Of 0.02 to 1 none ends outside the range known of its table."""
    x = torch.linspace(0.02, 1, 2000, dtype=torch.float64)
    for a, b, c in coefficient_steps(table):
        x = a * x + b * x**3 + c * x**5
    low, high = {"keller5": (0.67, 1.21), "deepseek_v4": (0.99, 1.01)}.get(table, (0.85, 1.16))
    assert low < x.min() and x.max() < high


@pytest.mark.parametrize("table", [(), [(1.0, 2.0)], [(1.0, 2.0, float("nan"))]])
def test_a_table_is_rows_of_three_finite_numbers(table: list[tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"must be one or more rows \(a, b, c\) of finite numbers"):
        newton_schulz(torch.ones(2, 2), coefficients=table)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="'keller' is not a known table; known: keller5, you5"):
        newton_schulz(torch.ones(2, 2), coefficients="keller")
    with pytest.raises(ConfigError, match="ns_steps=0 must be at least 1; 5 is this table's own"):
        newton_schulz(torch.ones(2, 2), steps=0)
    with pytest.raises(ConfigError, match=r"not \[4\]"):
        newton_schulz(torch.ones(4))


@pytest.mark.parametrize("last", [(1.5, -0.5, 0.0), (1.5, -0.5, 1e-4)])
def test_two_steps_of_a_users_table(last: tuple[float, float, float]) -> None:
    """Also without, or nearly without, a quintic term."""
    table = ((2.0, -1.5, 0.5), last)
    G = sample("gaussian", 6, 10)
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    for form in ("standard", "gram"):
        got = newton_schulz(G, coefficients=table, form=form)  # type: ignore[arg-type]
        torch.testing.assert_close(got.double(), U @ torch.diag(s) @ Vh, rtol=1e-5, atol=1e-6)
