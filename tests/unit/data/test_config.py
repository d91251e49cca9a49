import pytest

from earthshine.config import decode, encode
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import ConfigError


def test_round_trip() -> None:
    config = DataConfig(sources=(SourceConfig(path="a"), SourceConfig(path="b", weight=2.5)), document_attention=False)
    assert decode(DataConfig, encode(config)) == config


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight=.* of a must be finite and greater than 0"):
        SourceConfig(path="a", weight=weight)


def test_path_must_be_given_once() -> None:
    with pytest.raises(ConfigError, match="path='' must name"):
        SourceConfig(path="")
    with pytest.raises(ConfigError, match="names a 2 times"):
        DataConfig(sources=(SourceConfig(path="a"), SourceConfig(path="a", weight=2)))
