"""Directions under other norms against their definitions, in float64.

1e-12: an SVD of a 6 x 9 matrix is exact to some 1e-15, and ratios of its smallest values lose up to three digits.
"""

import math

import pytest
import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.ops.lmo import rms, row_rms, schatten, sign


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def with_spectrum(values: list[float], rows: int = 6, cols: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """(U diag(values) V^T, U, V^T)."""
    left, _ = torch.linalg.qr(gaussian(rows, rows))
    right, _ = torch.linalg.qr(gaussian(cols, cols))
    k = len(values)
    return left[:, :k] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:k], left[:, :k], right[:k]


@pytest.mark.parametrize("p", [1.25, 2.0, 3.0, 4.0, 32.0])
@pytest.mark.parametrize("turned", [False, True])
def test_schatten_is_its_equation(p: float, turned: bool) -> None:
    values = [5.0, 3.0, 1.0, 0.1]
    G, U, Vh = with_spectrum(values)
    q = 1 / (1 - 1 / p)
    norm = sum(s**q for s in values) ** (1 / q)
    expected = U @ torch.diag(torch.tensor([(s / norm) ** (q - 1) for s in values], dtype=torch.float64)) @ Vh
    got = schatten(G.mT, p).mT if turned else schatten(G, p)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, 2.0, 5.0, math.inf])
def test_no_other_matrix_of_schatten_norm_one_is_steeper(p: float) -> None:
    """The definition: the largest <G, X> over the unit ball; it is the dual norm of G."""
    G = gaussian(5, 8)

    def norm(X: Tensor, p: float) -> float:
        return float(torch.linalg.vector_norm(torch.linalg.svdvals(X), p))

    best = schatten(G, p)
    q = 1 / (1 - 1 / p)
    assert norm(best, p) == pytest.approx(1, rel=1e-12)
    assert float((G * best).sum()) == pytest.approx(norm(G, q), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for step in (1e-3, 0.1, 10.0):
        other = best + step * torch.randn(5, 8, dtype=torch.float64, generator=generator)
        assert float((G * other).sum()) / norm(other, p) < norm(G, q)


def test_schatten_2_is_the_normalized_gradient_and_infinity_the_polar_factor() -> None:
    G, U, Vh = with_spectrum([5.0, 3.0, 1.0, 1e-6])
    torch.testing.assert_close(schatten(G, 2.0), G / torch.linalg.matrix_norm(G), rtol=0, atol=1e-14)
    # The smallest value's direction is known to 1e-16 / 1e-6 only.
    torch.testing.assert_close(schatten(G, math.inf), U @ Vh, rtol=0, atol=1e-8)


def test_schatten_leaves_directions_of_rounding_alone() -> None:
    G, U, Vh = with_spectrum([2.0, 1.0])
    torch.testing.assert_close(schatten(G, math.inf), U @ Vh, rtol=0, atol=1e-12)
    assert torch.equal(schatten(torch.zeros(3, 4), math.inf), torch.zeros(3, 4))
    assert torch.equal(schatten(torch.zeros(3, 4), 3.0), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schatten_of_a_batch_is_that_of_each_alone_to_the_bit(dtype: torch.dtype) -> None:
    G = gaussian(2, 3, 17, 33, dtype=torch.float32).to(dtype)  # odd widths: other alignment in each place
    G[0, 1] *= 1e-20
    G[1, 2, 4, 4] = math.nan
    whole = schatten(G, 4.0)
    assert whole.dtype == torch.float32
    assert whole[1, 2].isnan().all()
    assert whole.isnan().sum() == 17 * 33
    for i, j in [(0, 0), (0, 1), (1, 1)]:
        assert torch.equal(schatten(G[i, j].clone(), 4.0), whole[i, j])


@pytest.mark.parametrize("p", [1.0, 0.5, -math.inf, math.nan])
def test_schatten_p_of_one_and_below_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="schatten_p=.*must be above 1"):
        schatten(torch.eye(2), p)


def test_rows_are_columns_of_scions_input_table() -> None:
    """col_j -> sqrt(d_out) col_j / ||col_j||_2 of the paper's [d_out, vocabulary]; ours is stored transposed."""
    G = gaussian(7, 5)
    G[3] = 0
    W = G.mT
    expected = torch.zeros_like(W)
    for j in range(7):
        length = math.sqrt(sum(float(x) ** 2 for x in W[:, j]))
        if length > 0:
            expected[:, j] = math.sqrt(5) * W[:, j] / length
    torch.testing.assert_close(row_rms(G), expected.mT, rtol=1e-14, atol=0)


def test_signs() -> None:
    G = torch.tensor([[-2.0, 0.0, 1e-30], [3.0, -1e-30, 5.0]])
    assert torch.equal(sign(G), torch.tensor([[-1.0, 0, 1], [1, -1, 1]]))


def test_rms_of_a_vector_and_of_its_parts() -> None:
    g = gaussian(12)
    expected = g / math.sqrt(sum(float(x) ** 2 for x in g) / 12)
    torch.testing.assert_close(rms(g), expected, rtol=1e-14, atol=0)
    squares = g.square().sum()
    parts = [rms(part, squares, 12) for part in (g[:5], g[5:5], g[5:])]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_sizes_do_not_matter_even_where_squares_leave_float32(scale: float) -> None:
    g = gaussian(4, 6, dtype=torch.float32)
    for direction in (row_rms, rms, lambda x: schatten(x, 3.0)):
        # 1e-6: float32, and the scaled numbers are rounded anew.
        torch.testing.assert_close(direction(g * scale), direction(g), rtol=1e-5, atol=1e-6)


def test_zeros_stay_zero_and_empty_stays_empty() -> None:
    for direction in (row_rms, rms, sign):
        assert not direction(torch.zeros(3, 4)).any()
        assert direction(torch.zeros(0, 4)).shape == (0, 4)
    assert not rms(torch.zeros(3), torch.zeros(()), 6).any()
    assert schatten(torch.zeros(0, 3, 4), 2.0).shape == (0, 3, 4)
