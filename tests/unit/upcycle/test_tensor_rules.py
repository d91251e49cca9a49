"""A rule's slice is the slice of its whole, bit for bit; its random numbers are normal, and the same everywhere."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from earthshine.checkpoint.safetensors_store import Store
from earthshine.errors import WeightsError
from earthshine.upcycle.tensor_rules import Copy, Normal, Zeros, normal_at, random_bits

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_any_slice_is_the_slice_of_the_whole(tmp_path, data, shape, dtype):
    save_file({"w": torch.randn(shape).to(dtype)}, tmp_path / "model.safetensors")
    store = Store(tmp_path)
    slices = [slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape]
    slices = slices[: data.draw(st.integers(0, len(shape)))]
    layer, seed = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 2**63 - 1))
    for rule in (
        Copy("w"),
        Zeros(tuple(shape), dtype),
        Normal(tuple(shape), dtype, 0.02, seed, layer, "router"),
    ):
        whole, part = rule.read(store), rule.read(store, slices)
        assert whole.shape == torch.Size(shape)
        assert whole.dtype == part.dtype == dtype
        assert torch.equal(part, whole[tuple(slices)])


def test_random_bits_are_splitmix64():
    """The first outputs from state 1234567, as published with the reference code (prng.di.unimi.it/splitmix64.c)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(np.arange(5, dtype=np.uint64), 1234567).tolist() == expected


def test_normals_equal_box_and_muller_by_the_math_library():
    """To 1e-14: the polynomials' own error is a few units in the last place."""
    index = np.arange(20_000, dtype=np.uint64)
    bits = random_bits(index, 5)
    expected = [
        math.sqrt(-2 * math.log(((b >> 32) + 1) / 2**32)) * math.cos(2 * math.pi * (b & 0xFFFFFFFF) / 2**32)
        for b in bits.tolist()
    ]
    assert np.abs(normal_at(index, 5) - expected).max() < 1e-14


def test_normals_are_normal():
    """Each statistic of n = 10^6 draws within 5 of its standard errors; keys and neighbors uncorrelated."""
    n = 1_000_000
    index = np.arange(n, dtype=np.uint64)
    for key in (0, 1, 2**64 - 1):
        x = normal_at(index, key)
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((x**power).mean() - mean) < 5 * math.sqrt(variance / n), (key, power)
        assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(n)
        assert abs((x * normal_at(index, key ^ 1)).mean()) < 5 / math.sqrt(n)


def test_the_extremes_are_finite(monkeypatch):
    """Radius from the smallest and the largest 32 bits, angle at every eighth of a turn."""
    from earthshine.upcycle import tensor_rules

    corners = np.array([(r << 32) | a for r in (0, 2**32 - 1) for a in range(0, 2**32, 2**29)], dtype=np.uint64)
    monkeypatch.setattr(tensor_rules, "random_bits", lambda index, key: corners)
    x = normal_at(np.arange(16, dtype=np.uint64), 0)
    assert np.isfinite(x).all()
    assert abs(x).max() == pytest.approx(math.sqrt(64 * math.log(2)))


def test_golden_bits():
    """A change here changes every converted model: it must raise plan.PLAN_VERSION."""
    x = Normal((3, 5), torch.float32, 0.02, 7, 3, "router").read(None)  # type: ignore[arg-type]
    assert [v.hex() for v in x.double().flatten().tolist()[:4]] == [
        "-0x1.4ef1d40000000p-8",
        "0x1.b3ddd60000000p-6",
        "-0x1.4374d20000000p-7",
        "0x1.36fef80000000p-6",
    ]


@pytest.mark.parametrize("change", [{"seed": 1}, {"layer": 1}, {"expert": 1}, {"matrix": "other"}])
def test_every_part_of_the_key_matters(change):
    base = {"shape": (50,), "dtype": torch.float32, "std": 1.0, "seed": 0, "layer": 0, "matrix": "router"}
    a, b = Normal(**base).read(None), Normal(**{**base, **change}).read(None)  # type: ignore[arg-type]
    assert not (a == b).any()


def test_a_copy_refuses_what_is_not_finite(tmp_path):
    w = torch.ones(4, 4)
    w[3, 3] = float("nan")
    save_file({"w": w}, tmp_path / "model.safetensors")
    assert Copy("w").read(Store(tmp_path), [slice(0, 3)]).shape == (3, 4)
    with pytest.raises(WeightsError, match="tensor w holds"):
        Copy("w").read(Store(tmp_path))
