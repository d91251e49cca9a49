"""Options that cannot be carried out are refused by name."""

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError
from earthshine.upcycle.config import UpcycleConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "upcycle.experts=1"),
        ({"experts": 4, "top_k": 5}, "upcycle.top_k=5 must be between 1 and upcycle.experts=4"),
        ({"top_k": 0}, "upcycle.top_k=0"),
        ({"top_k": 1}, "upcycle.top_k=1 would leave the router without a gradient"),
        ({"layers": (1, 1)}, "twice"),
        ({"router_std": 0.0}, "same experts"),
        ({"router_std": float("nan")}, "router_std"),
        ({"seed": -1}, "seed=-1"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size=0"),
        ({"max_shard_gib": 0.0}, "max_shard_gib"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        UpcycleConfig(**options)


def test_survives_json():
    config = UpcycleConfig(experts=4, layers=(1, 2))
    assert decode(UpcycleConfig, encode(config)) == config
