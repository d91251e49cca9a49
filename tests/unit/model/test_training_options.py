"""Capacity: how many tokens an expert takes."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

from earthshine.config import decode, encode
from earthshine.model.training_options import CapacityConfig


def test_capacity_is_exact_arithmetic_with_the_factor_that_was_written() -> None:
    """In floats 200 * 1.1 / 4 is more than 55: an expert would take one token too many."""
    assert CapacityConfig(factor=1.1).tokens_per_expert(100, 4, 2) == 55
    assert CapacityConfig(factor=1.1, relative_to="per_token").tokens_per_expert(1000, 11, 6) == 100
    for factor in ("0.07", "0.3", "1.05", "1.1", "1.15", "1.2", "1.4", "2.2", "3", "1e-3"):
        config = CapacityConfig(factor=float(factor))
        for tokens, experts, top_k in itertools.product((1, 8, 100, 4096, 10**6), (4, 7, 11, 60), (1, 2, 6)):
            exact = math.ceil(Fraction(factor) * tokens * top_k / experts)
            assert config.tokens_per_expert(tokens, experts, top_k) == min(tokens, max(1, exact)), factor
    assert not CapacityConfig(factor=0.7).can_drop(7, 10) and CapacityConfig(factor=0.7).can_drop(8, 11)
    assert decode(CapacityConfig, encode(config)) == config == replace(CapacityConfig(factor=2.0), factor=1e-3)
    assert CapacityConfig().tokens_per_expert(8, 4, 2) == 0
