"""Stochastic rounding: each neighbor with the probability that makes the mean exact, by bits that know no layout."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from earthshine.errors import CheckpointError, ConfigError
from earthshine.optim.muon import Muon
from earthshine.optim.rounding import elements, random_bits, stochastic
from earthshine.upcycle import tensor_rules

TYPES = [torch.bfloat16, torch.float16]
ALL_BITS = torch.arange(1 << 16, dtype=torch.int32)
SHAPES = {"muon": (48, 32), "adamw": (40, 8), "scion": (40, 8)}


def group(p: nn.Parameter, algorithm: str, **options: Any) -> dict[str, Any]:
    return {"params": [("w", p)], "algorithm": algorithm, "lmo": ("row_rms",) * (algorithm == "scion")} | options


def start(algorithm: str, dtype: torch.dtype) -> nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter((0.03 * torch.randn(SHAPES[algorithm], generator=g)).to(torch.bfloat16).to(dtype))


def gradient(p: Tensor, step: int) -> Tensor:
    steady = torch.randn(p.shape, generator=torch.Generator().manual_seed(99))
    return (steady + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))).to(p.dtype)


def moved(algorithm: str, dtype: torch.dtype, steps: int = 60, **options: Any) -> Tensor:
    """How far each element came at a learning rate of 1e-5."""
    p = start(algorithm, dtype)
    before = p.detach().float().clone()
    optimizer = Muon([group(p, algorithm)], lr=1e-5, weight_decay=0.1, ns_dtype="float32", **options)
    for step in range(steps):
        p.grad = gradient(p, step)
        optimizer.step()
    return p.detach().float() - before


def test_bits_are_those_of_upcycling() -> None:
    index = torch.tensor([0, 1, 2, 12_345, 2**40, 2**62])
    for key in (0, 1, 0xFEDCBA9876543210):
        ours = random_bits(index, key).numpy().view(np.uint64)
        np.testing.assert_array_equal(ours, tensor_rules.random_bits(index.numpy().astype(np.uint64), key))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_mean_over_all_bits_is_the_number(dtype: torch.dtype) -> None:
    """Over all 2^16 random numbers; 1e-3 of the distance of neighbors is a few of them. Also fp16's small numbers."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.randn(40, generator=g) * 10.0**-k for k in range(9)])
    for x in numbers:
        rounded = stochastic(x.expand(len(ALL_BITS)), ALL_BITS, dtype).double()
        low, high = rounded.min(), rounded.max()
        assert low <= x.double() <= high
        after = torch.nextafter(low.to(dtype), torch.tensor(torch.inf, dtype=dtype))  # low is exact in dtype
        assert x.to(dtype).double() in (low, high)
        assert high in (low, after.double())
        assert abs(rounded.mean() - x.double()) <= 1e-3 * (high - low)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_exact_or_not_finite_stays(dtype: torch.dtype) -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-14, 2.0**-24, torch.inf, -torch.inf, torch.nan]).to(dtype)
    for bits in (0, 1, 0x8000, 0xFFFF):
        got = stochastic(exact.float(), torch.full(exact.shape, bits, dtype=torch.int32), dtype)
        assert torch.equal(got.view(torch.int16)[:-1], exact.view(torch.int16)[:-1])
        assert got[-1].isnan()


def test_an_element_has_its_bits_wherever_it_lies() -> None:
    """Of a 6 x 5 parameter: whole, and divided by rows and columns that a process may hold in runs."""
    cpu = torch.device("cpu")
    whole = elements(((0, 6),), ((0, 5),), 5, cpu)
    part = elements(((1, 2), (4, 6)), ((0, 1), (3, 5)), 5, cpu)
    ((_, all_bits),) = whole.at(7, "w", 3).pieces()
    ((_, some),) = part.at(7, "w", 3).pieces()
    assert torch.equal(some, all_bits[[1, 4, 5]][:, [0, 3, 4]])
    ((_, fewer),) = part.at(7, "w", 3).part(1, 1, 2, 2).pieces()
    assert torch.equal(fewer, some[1:, 1:])
    others = [whole.at(*key) for key in ((8, "w", 3), (7, "v", 3), (7, "w", 4))]
    for ((_, bits),) in (list(noise.pieces()) for noise in others):
        assert not torch.equal(bits, all_bits)


@pytest.mark.parametrize("algorithm", list(SHAPES))
@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
def test_small_updates_arrive_on_average(algorithm: str) -> None:
    """At a learning rate of 1e-5: of fp32's movement nearest rounding lets a fraction through, stochastic all of it.

    Over 320 elements or more and 60 steps the noise of the mean is 2 % of it.
    """
    exact = moved(algorithm, torch.float32)
    arrived = {
        rounding: float((moved(algorithm, torch.bfloat16, rounding=rounding) * exact).sum() / exact.square().sum())
        for rounding in ("nearest", "stochastic")
    }
    assert arrived["nearest"] < 0.7
    assert arrived["stochastic"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("algorithm", list(SHAPES))
def test_the_seed_decides(algorithm: str) -> None:
    one, same, other = (moved(algorithm, torch.bfloat16, 5, rounding="stochastic", rounding_seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("algorithm", list(SHAPES))
def test_a_run_that_resumes_draws_what_the_whole_one_would(algorithm: str, dtype: torch.dtype) -> None:
    def make(p: nn.Parameter) -> Muon:
        return Muon([group(p, algorithm)], lr=1e-4, ns_dtype="float32", rounding="stochastic")

    p = start(algorithm, dtype)
    optimizer = make(p)
    for step in range(6):
        if step == 3:
            q = nn.Parameter(p.detach().clone())
            saved = copy.deepcopy(optimizer.state_dict())
        p.grad = gradient(p, step)
        optimizer.step()
    resumed = make(q)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        q.grad = gradient(q, step)
        resumed.step()
    assert torch.equal(p, q)


def test_fp32_weights_are_not_rounded() -> None:
    assert torch.equal(*(moved("muon", torch.float32, 3, rounding=r) for r in ("nearest", "stochastic")))


def test_a_warning_says_that_updates_will_be_lost() -> None:
    """At construction and for groups that come later; not where weights are fp32 or rounded stochastically."""
    narrow, wide = nn.Parameter(torch.ones(2, 3).bfloat16()), nn.Parameter(torch.ones(2, 3))
    with pytest.warns(UserWarning, match=r"1 parameters .*the first: w, torch\.bfloat16.*rounding='stochastic'"):
        Muon([group(narrow, "muon")], lr=1e-3, ns_dtype="float32")
    optimizer = Muon([group(wide, "muon")], lr=1e-3, ns_dtype="float32")
    with pytest.warns(UserWarning, match="are kept in 16 bits"):
        optimizer.add_param_group(group(narrow, "adamw"))
    Muon([group(narrow, "muon")], lr=1e-3, ns_dtype="float32", rounding="stochastic")


def test_rounding_is_an_option_like_the_others() -> None:
    p = nn.Parameter(torch.ones(2, 3).bfloat16())
    for wrong, message in (
        ("up", "rounding='up' must be one of nearest, stochastic"),
        (None, "rounding=None"),
    ):
        with pytest.raises(ConfigError, match=message):
            Muon([p], lr=1e-3, rounding=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rounding_seed=0\.5 must be a whole number"):
        Muon([p], lr=1e-3, rounding="stochastic", rounding_seed=0.5)  # type: ignore[arg-type]
    saved = Muon([p], lr=1e-3, ns_dtype="float32", rounding="stochastic").state_dict()
    with pytest.raises(CheckpointError, match=r"group 0 rounding_seed: 0 \(saved\) -> 1"):
        Muon([p], lr=1e-3, ns_dtype="float32", rounding="stochastic", rounding_seed=1).load_state_dict(saved)


# ------------------------------------------------------------------------------------------------- AdamW's moments


@pytest.mark.filterwarnings("ignore:.*are kept in 16 bits")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_adamw_of_16_bit_weights_has_moments_of_fp32(dtype: torch.dtype, size: float) -> None:
    """fp16's second moment of gradients of 1e-5 would be zero, and the update gradient / eps."""
    p, wide = nn.Parameter(torch.ones(64, dtype=dtype)), nn.Parameter(torch.ones(64))
    optimizers = [Muon([group(q, "adamw")], lr=0.01, weight_decay=0.1) for q in (p, wide)]
    for step in range(8):
        p.grad = (size * gradient(wide, step)).to(dtype)
        wide.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizers[0].state[p][key].dtype == torch.float32
        assert torch.equal(optimizers[0].state[p][key], optimizers[1].state[wide][key])
    # Eight roundings of numbers near 1.
    torch.testing.assert_close(p.detach().float(), wide.detach(), rtol=0, atol=8 * torch.finfo(dtype).eps)
