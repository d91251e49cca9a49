"""The equations of a step against their papers', in float64 and plainly written out.

A tolerance of 1e-14: a handful of roundings of 1e-16 each.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim import rules
from earthshine.optim.config import GroupOptions
from earthshine.optim.rules import decay_, exact_rms, normuon, register_scale, scale_factor, scale_name


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "_REGISTERED", {})
    return


@pytest.mark.parametrize(
    ("rule", "tall", "wide"),
    [("match_rms_adamw", 0.2 * 12, 0.2 * 12), ("original", 4.0, 1.0), ("spectral", 4.0, 0.25)],
)
def test_scales_of_a_tall_and_a_wide_matrix(rule: str, tall: float, wide: float) -> None:
    assert scale_factor(rule, 144, 9, 0.2) == pytest.approx(tall, rel=1e-15)
    assert scale_factor(rule, 9, 144, 0.2) == pytest.approx(wide, rel=1e-15)
    assert scale_name(rule) == rule


def test_a_callable_rule_goes_by_its_registered_name(registry: None) -> None:
    def area(rows: int, cols: int) -> float:
        return rows * cols

    with pytest.raises(ConfigError, match=r"register_scale\('a_name', function\)"):
        scale_name(area)
    register_scale("area", area)
    register_scale("area", area)  # importing a module twice is no mistake
    assert scale_name(area) == scale_name("area") == "area"
    assert scale_factor("area", 3, 5, 0.2) == 15
    with pytest.raises(ConfigError, match="another function"):
        register_scale("area", lambda rows, cols: 1.0)
    with pytest.raises(ConfigError, match="not one of"):
        register_scale("spectral", area)


def test_an_unknown_rule_is_refused_with_the_known_ones(registry: None) -> None:
    for ask in (lambda: scale_name("muP"), lambda: scale_factor("muP", 1, 1, 0.2)):
        with pytest.raises(ConfigError, match="'muP'.*known: match_rms_adamw, original, spectral"):
            ask()


def test_exact_rms_is_moonlights_update_norm() -> None:
    O_BMN = gaussian(3, 7, 5) * torch.tensor([1e-3, 1.0, 40.0]).view(3, 1, 1)
    for O_MN, got in zip(O_BMN, exact_rms(O_BMN), strict=True):
        rms = (sum(float(x) ** 2 for x in O_MN.flatten()) / O_MN.numel()) ** 0.5
        torch.testing.assert_close(0.2 * got, 0.2 * O_MN / rms, rtol=1e-14, atol=0)


def plain_normuon(O_MN: Tensor, v_M: Tensor, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2510.05491, from O_t on: (eta_hat / eta * O_hat, v)."""
    (m, n), v_M = O_MN.shape, v_M.clone()
    O_hat = torch.empty_like(O_MN)
    for i in range(m):
        v_M[i] = beta2 * v_M[i] + (1 - beta2) * sum(float(x) ** 2 for x in O_MN[i]) / n
        O_hat[i] = O_MN[i] / (math.sqrt(v_M[i]) + eps)
    frobenius = math.sqrt(sum(float(x) ** 2 for x in O_hat.flatten()))
    return 0.2 * math.sqrt(m * n) / frobenius * O_hat, v_M


def test_normuon_is_algorithm_1_of_its_paper_over_steps() -> None:
    v_BM = torch.zeros(2, 4, dtype=torch.float64)
    expected_v = v_BM.clone()
    for step in range(3):
        O_BMN = gaussian(2, 4, 6 + step) * torch.tensor([0.1, 1.0, 3.0, 0.01], dtype=torch.float64).unsqueeze(1)
        O_hat_BMN, v_BM = normuon(O_BMN, v_BM, 0.95, eps=1e-3)  # large enough to be seen
        for b in range(2):
            update, expected_v[b] = plain_normuon(O_BMN[b], expected_v[b], 0.95, 1e-3)
            torch.testing.assert_close(0.2 * O_hat_BMN[b], update, rtol=1e-14, atol=0)
        torch.testing.assert_close(v_BM, expected_v, rtol=1e-14, atol=0)


def test_normuon_makes_rows_even_and_keeps_zeros_and_types() -> None:
    O_BMN = gaussian(1, 5, 64).bfloat16()
    O_BMN[0, 3] = 0
    v_BM = torch.zeros(1, 5)
    O_hat_BMN, new_v_BM = normuon(O_BMN, v_BM, 0.9)
    assert (O_hat_BMN.dtype, new_v_BM.dtype) == (torch.bfloat16, torch.float32)
    assert not v_BM.any(), "the state given is not written to"
    # The four rows that are not zero carry all of 5 rows' squares; 1 %: bf16 rounds each element by up to 0.4 %.
    rows = O_hat_BMN.float().square().mean(-1)
    torch.testing.assert_close(rows, torch.tensor([[1.25, 1.25, 1.25, 0, 1.25]]), rtol=0.01, atol=0)


def test_zero_matrices_stay_zero() -> None:
    zero = torch.zeros(2, 3, 4)
    assert torch.equal(exact_rms(zero), zero)
    O_hat, v = normuon(zero, torch.zeros(2, 3), 0.95)
    assert torch.equal(O_hat, zero)
    assert not v.any()


@pytest.mark.parametrize(("M", "N"), [(1, 9), (9, 1), (33, 65), (64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_gives_the_same_bits_in_any_batch_and_memory_order(M: int, N: int, dtype: torch.dtype) -> None:
    """Which process owns a matrix, and so its batch, depends on the layout; the update may not."""
    O_BMN = gaussian(4, M, N, dtype=torch.float32).to(dtype)
    v_BM = gaussian(4, M).float().square()
    whole, (rows, v) = exact_rms(O_BMN), normuon(O_BMN, v_BM, 0.95)
    for b in range(4):
        for alone in (O_BMN[b : b + 1], O_BMN[b : b + 1].mT.contiguous().mT):
            assert torch.equal(exact_rms(alone)[0], whole[b])
            alone_rows, alone_v = normuon(alone, v_BM[b : b + 1], 0.95)
            assert torch.equal(alone_rows[0], rows[b])
            assert torch.equal(alone_v[0], v[b])


def test_decay_is_decoupled() -> None:
    weights = [gaussian(3, 4), gaussian(5)]
    expected = [w - 0.03 * w for w in weights]
    decay_(weights, [torch.ones_like(w) for w in weights], 0.03, cautious=False)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_cautious_decay_with_the_step_is_algorithm_1_of_its_paper() -> None:
    """x <- x - eta (u + lambda 1[u x >= 0] x), entry by entry; zeros on either side included."""
    eta, lamda = 0.1, 0.3
    weights, updates = [gaussian(6, 7), gaussian(11)], [gaussian(7, 6).mT.contiguous(), gaussian(12)[:11]]
    weights[0][0, :3], updates[0][1, :3] = 0, 0
    expected = []
    for w, u in zip(weights, updates, strict=True):
        entries = [
            x - eta * (y + lamda * (1 if y * x >= 0 else 0) * x)
            for x, y in zip(w.flatten().tolist(), u.flatten().tolist(), strict=True)
        ]
        expected.append(torch.tensor(entries, dtype=torch.float64).view_as(w))
    decay_(weights, updates, eta * lamda, cautious=True)
    torch.testing.assert_close(
        [w - eta * u for w, u in zip(weights, updates, strict=True)], expected, rtol=1e-14, atol=1e-15
    )


def test_cautious_decay_reads_signs_of_numbers_whose_product_underflows() -> None:
    w, u = torch.tensor([1e-30, -1e-30]), torch.tensor([-1e-30, -1e-30])
    before = w.clone()
    decay_([w], [u], 0.5, cautious=True)
    assert torch.equal(w, before * torch.tensor([1.0, 0.5]))


def test_where_all_signs_agree_cautious_decay_is_plain_decay_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plain = gaussian(9, 9).to(dtype)
        cautious = plain.clone()
        decay_([plain], [plain.float()], 0.07, cautious=False)
        decay_([cautious], [cautious.float()], 0.07, cautious=True)
        assert torch.equal(plain, cautious)


def test_decay_of_bfloat16_weights_is_rounded_once() -> None:
    """A factor in bf16, 0.93 to 0.9297 and 0.9999 to 1, would be another weight decay."""
    w = gaussian(81).bfloat16()
    expected = (w.double() * 0.93).bfloat16()
    decay_([w], [w], 0.07, cautious=False)
    assert torch.equal(w, expected)


def test_decay_reaches_the_parameter_through_a_view() -> None:
    p = torch.ones(4, 3)
    decay_([p[1:3].T], [torch.ones(3, 2)], 0.5, cautious=True)
    assert torch.equal(p, torch.tensor([1.0, 0.5, 0.5, 1.0]).unsqueeze(1).expand(4, 3))


def test_momentum_is_a_sum_and_the_direction_nesterovs() -> None:
    mu, grads = 0.95, [gaussian(3, 4), gaussian(5)]
    first = [gaussian(4, 3).T.contiguous(), gaussian(6)[:5]]
    sums = [m.clone() for m in first]
    expected = [mu * m + g for m, g in zip(first, grads, strict=True)]
    after = rules.momentum_(sums, grads, mu, torch.float64)
    torch.testing.assert_close(list(after), expected, rtol=1e-14, atol=1e-15)
    assert all(a is m for a, m in zip(after, sums, strict=True)), "in place"
    for nesterov, wanted in ((True, mu * expected[0] + grads[0]), (False, expected[0])):
        X = torch.full_like(grads[0], math.nan)
        rules.direction_(X, grads[0], sums[0], {"nesterov": nesterov, "momentum": mu})
        torch.testing.assert_close(X, wanted, rtol=1e-14, atol=1e-15)


def test_momentum_kept_in_bfloat16_is_rounded_after_use() -> None:
    grad, kept = gaussian(64).float(), gaussian(65)[:64].bfloat16()
    exact = kept.float() * 0.95 + grad
    (used,) = rules.momentum_([kept], [grad], 0.95, torch.float32)
    assert torch.equal(used, exact)
    assert torch.equal(kept, exact.bfloat16())


def test_an_update_takes_the_equations_in_the_papers_order() -> None:
    """Polar factors by SVD, then NorMuon, each matrix by itself; two tall ones (transposed), two wide ones. The second
    has no token, so no update; the last has no gradient on any rank: the second moments of both stay as they were."""
    X_BSL, v_BL = gaussian(4, 4, 6), gaussian(4, 6).square()
    X_BSL[3] = 0
    before, busy_B = v_BL.clone(), torch.tensor([True, False, True, True])
    options = GroupOptions(norm="schatten", schatten_p=math.inf, normuon_beta2=0.95, skip_idle=True).as_group()
    by_shape = [(slice(0, 2), (6, 4)), (slice(2, 4), (4, 6))]
    O_BSL = rules.update(X_BSL.clone(), by_shape, options, torch.float64, busy_B, v_BL)
    for b, (M, _) in ((0, (6, 4)), (2, (4, 6))):
        U, _, Vh = torch.linalg.svd(X_BSL[b].T if M == 6 else X_BSL[b], full_matrices=False)
        expected, v_M = plain_normuon(U @ Vh, before[b, :M], 0.95, rules.NORMUON_EPS)
        got = O_BSL[b].T if M == 6 else O_BSL[b]
        # The SVD of another memory order differs by some 1e-15.
        torch.testing.assert_close(rules.scale(options, *got.shape) * got, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(v_BL[b, :M], v_M, rtol=1e-12, atol=0)
        assert torch.equal(v_BL[b, M:], before[b, M:])
    assert not O_BSL[1].any() and not O_BSL[3].any()
    assert torch.equal(v_BL[1], before[1]) and torch.equal(v_BL[3], before[3])


def test_the_scale_is_the_rms_alone_where_the_update_has_rms_one() -> None:
    for options, expected in (
        (GroupOptions(), 0.2 * 3),
        (GroupOptions(exact_rms=True), 0.2),
        (GroupOptions(normuon_beta2=0.95), 0.2),
        (GroupOptions(scale="spectral"), 1.5),
    ):
        assert rules.scale(options.as_group(), 9, 4) == pytest.approx(expected, rel=1e-15)
