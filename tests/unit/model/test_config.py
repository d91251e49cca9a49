"""ModelConfig: what contradicts itself is refused, and named."""

from dataclasses import replace

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.presets import PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    assert decode(ModelConfig, encode(PRESETS[name]())) == PRESETS[name]()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 9}, "top_k=9 must be between 1 and model.moe.num_experts=8"),
        ({"layers": [0, 7]}, r"\[7\] do not exist; the model has layers 0 to 2"),
        ({"layers": [1, 0]}, "sorted list"),
        ({"num_expert": 4}, "no field 'num_expert'. Did you mean 'num_experts'"),
        ({"top_k": "2"}, "must be of type int, not str"),
        ({"gate": "top_softmax"}, "not one of 'topk_softmax'"),
    ],
)
def test_contradictions_are_named(change: dict, message: str) -> None:
    data = encode(PRESETS["llama3_tiny_e8t2"]())
    data["moe"] |= change
    with pytest.raises(ConfigError, match=message):
        decode(ModelConfig, data)


def test_what_would_be_planned_for_minutes_is_refused_at_once() -> None:
    """A slip of the keyboard: 100,000 layers, a million experts."""
    with pytest.raises(ConfigError, match="num_hidden_layers=100000 must be at most 4096"):
        replace(PRESETS["llama3_tiny"](), num_hidden_layers=10**5)
    moe = PRESETS["llama3_tiny_e8t2"]()
    with pytest.raises(ConfigError, match="expert networks: at most 65,536 are possible"):
        replace(moe, moe=replace(moe.moe, num_experts=10**6))
