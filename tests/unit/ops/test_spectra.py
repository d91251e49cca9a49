"""Spectra against matrices whose singular values are known."""

import math

import pytest
import torch

from earthshine.ops.spectra import rms, stable_rank, svd_entropy


def with_spectrum(values: list[float], rows: int = 6, cols: int = 9) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(cols, cols, generator=g, dtype=torch.float64))
    k = len(values)
    return left[:, :k] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:k]


def test_known_spectra() -> None:
    flat, one = with_spectrum([3.0] * 6), with_spectrum([5.0])
    mixed = with_spectrum([2.0, 1.0, 1.0])
    assert svd_entropy(flat) == pytest.approx(1, abs=1e-12)
    assert svd_entropy(one) == pytest.approx(0, abs=1e-12)
    q = [4 / 6, 1 / 6, 1 / 6]
    assert svd_entropy(mixed) == pytest.approx(-sum(x * math.log(x) for x in q) / math.log(6), abs=1e-12)
    assert stable_rank(flat) == pytest.approx(6, abs=1e-9)
    assert stable_rank(one) == pytest.approx(1, abs=1e-9)
    assert stable_rank(mixed) == pytest.approx(6 / 4, abs=1e-9)


def test_batches_scale_and_transposes() -> None:
    W = torch.stack([with_spectrum([3.0, 2.0, 1.0]), with_spectrum([1.0, 1.0])])
    for measure in (svd_entropy, stable_rank):
        both = measure(W)
        assert both.shape == (2,)
        torch.testing.assert_close(measure(W.mT), both)
        torch.testing.assert_close(measure(1e-3 * W), both)
        torch.testing.assert_close(both[0], measure(W[0]))


def test_zero_matrices_single_values_and_low_precision() -> None:
    for measure in (svd_entropy, stable_rank):
        assert measure(torch.zeros(3, 4)) == 0
    assert svd_entropy(torch.ones(1, 4)) == 0
    assert stable_rank(torch.ones(1, 4)) == pytest.approx(1)
    half = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert svd_entropy(half).dtype == torch.float32
    torch.testing.assert_close(stable_rank(half), stable_rank(half.float()))


def test_rms() -> None:
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))
    assert rms(torch.zeros(0)) == 0
    assert rms(torch.full((1000,), 300.0, dtype=torch.float16)) == pytest.approx(300)  # its squares overflow fp16
    assert rms(torch.ones(3, dtype=torch.float64)).dtype == torch.float64
