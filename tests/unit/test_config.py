"""config.py: what is wrong with a JSON config is said, whatever it is."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from earthshine import config
from earthshine.config import decode, encode, load_json, not_defaults, override, parse_json
from earthshine.errors import ConfigError
from earthshine.files import write_json
from earthshine.recipes.registry import RECIPES
from earthshine.train.job import TrainJob


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """JSON parsers take the last one; whoever wrote the first meant it."""
    path = tmp_path / "job.json"
    path.write_text('{"seed": 1, "name": "a", "seed": 2}')
    with pytest.raises(ConfigError, match="the key 'seed' stands twice"):
        load_json(TrainJob, path)


def test_infinity_survives_json(tmp_path: Path) -> None:
    """Schatten's p may be infinite, and JSON has no infinity."""
    job = override(RECIPES["tiny"](), ["optimizer.norm=schatten", "optimizer.schatten_p=inf"])
    assert job.optimizer.schatten_p == math.inf
    write_json(tmp_path / "job.json", encode(job))
    assert '"schatten_p": "inf"' in (tmp_path / "job.json").read_text()
    assert load_json(TrainJob, tmp_path / "job.json") == job
    with pytest.raises(ConfigError, match="seed='inf' must be of type int"):
        override(job, ["seed=inf"])


@pytest.mark.parametrize("kind", [[], {}, None, 1], ids=str)
def test_a_kind_of_any_type_is_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match=r"init.kind=.* is not one of checkpoint, huggingface, scratch"):
        decode(TrainJob, encode(RECIPES["tiny"]()) | {"init": {"kind": kind}})


@pytest.mark.parametrize("depth", [101, 900, 200_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_deep_nesting_is_a_value_error(opening: str, closing: str, depth: int) -> None:
    """900 levels are what json.loads still reads and a recursive walk of the result may not; 200,000 it does not."""
    text = opening * depth + "1" + closing * depth
    with pytest.raises(ValueError, match="nests deeper than 100 levels"):
        parse_json(text)
    assert parse_json("[" * 99 + "]" * 99)


def test_a_deep_config_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ConfigError, match="job.json is not a readable JSON config: it nests deeper"):
        load_json(TrainJob, path)
    assert override(RECIPES["tiny"](), ["name=" + "[" * 5000]).name == "[" * 5000, "text that is no JSON stays text"


@dataclass(frozen=True)
class Engine:
    num_cylinders: int = field(default=4, metadata={"was": "pots"})


@dataclass(frozen=True)
class Car:
    engine: Engine = field(default_factory=Engine)


def test_a_renamed_field_is_read_by_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """From JSON and from both forms of an override, with one line in the log."""
    lines: list[str] = []
    monkeypatch.setattr(config, "log", lines.append)
    config._log_renamed.cache_clear()
    wanted = Car(Engine(6))
    assert decode(Car, {"engine": {"pots": 6}}) == decode(Car, {"engine": {"pots": 6}}) == wanted
    assert lines == ["Car.engine.pots is called num_cylinders now; the old name is still read."]
    assert override(Car(), ["engine.pots=6"]) == override(Car(), ['engine={"pots": 6}']) == wanted
    assert encode(wanted) == {"engine": {"num_cylinders": 6}}
    with pytest.raises(ConfigError, match="Car.engine.pots is the old name of Car.engine.num_cylinders: give one"):
        decode(Car, {"engine": {"pots": 6, "num_cylinders": 6}})


def test_what_is_not_a_default() -> None:
    """Fields without a default are among them; nested configs are compared with their own classes' defaults."""
    job = override(RECIPES["tiny_moe"](), ["balance.coefficient=0.5"])
    changed = dict(not_defaults(job))
    assert changed["name"] == "tiny_moe" and changed["init.model.vocab_size"] == 2048
    assert changed["init.model.moe.layers"] == [0, 1, 2] and changed["balance.coefficient"] == 0.5
    assert not changed.keys() & {"seed", "data.sources", "init.kind", "balance.loss", "init.model.moe.top_k"}
