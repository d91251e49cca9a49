"""config.py: what is wrong with a JSON config is said, whatever it is."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from earthshine import config
from earthshine.config import decode, diff, encode, load_json, not_defaults, override, parse_json, parse_object
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
    assert override(Car(), ["engine.pots=6"]) == override(Car(), ['engine={"pots": 6}']) == wanted
    assert lines == ["Car.engine.pots is called num_cylinders now; the old name is still read."]
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


# ------------------------------------------------------------------------------------------- what is read, and refused


@dataclass(frozen=True, kw_only=True)
class Petrol:
    kind: Literal["petrol"] = "petrol"
    liters: float = 40.0


@dataclass(frozen=True, kw_only=True)
class Battery:
    kind: Literal["battery"] = "battery"
    cells: int


@dataclass(frozen=True, kw_only=True)
class Wheel:
    inches: int = 16


@dataclass(frozen=True, kw_only=True)
class Vehicle:
    name: str
    power: Petrol | Battery = field(default_factory=Petrol)
    speed: float = 1.5
    seats: int = 4
    open: bool = False
    color: Literal["red", "blue"] = "red"
    wheels: tuple[Wheel, ...] = ()
    tags: tuple[str, ...] = ()
    gears: tuple[tuple[float, float], ...] = ()
    made: int = field(init=False, default=1)


VEHICLE = Vehicle(name="a", wheels=(Wheel(), Wheel(inches=17)), tags=("x",), gears=((1.0, 2.0),))


@pytest.mark.parametrize(
    ("change", "field_name", "value"),
    [
        ({"speed": 3}, "speed", 3.0),
        ({"speed": "-inf"}, "speed", -math.inf),
        ({"tags": []}, "tags", ()),
        ({"tags": ("p", "q")}, "tags", ("p", "q")),
        ({"wheels": [{}, {"inches": 9}]}, "wheels", (Wheel(), Wheel(inches=9))),
        ({"power": {"kind": "battery", "cells": 2}}, "power", Battery(cells=2)),
        ({"gears": [[1, 2], [3, 4.5]]}, "gears", ((1.0, 2.0), (3.0, 4.5))),
    ],
    ids=str,
)
def test_what_is_read(change: dict[str, Any], field_name: str, value: Any) -> None:
    vehicle = decode(Vehicle, encode(VEHICLE) | change)
    assert getattr(vehicle, field_name) == value and type(getattr(vehicle, field_name)) is type(value)
    assert decode(Vehicle, json.loads(json.dumps(encode(vehicle)))) == vehicle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seat": 2}, r"^Vehicle has no field 'seat'\. Did you mean 'seats'\?$"),
        (
            {"xyz": 2},
            r"^Vehicle has no field 'xyz'\. Known: color, gears, name, open, power, seats, speed, tags, wheels\.$",
        ),
        ({"made": 2}, r"^Vehicle has no field 'made'"),
        ({"": 2}, r"^Vehicle has no field ''"),
        ({"seats": None}, r"^Vehicle\.seats=None must be of type int, not NoneType\.$"),
        ({"seats": 2.0}, r"^Vehicle\.seats=2\.0 must be of type int, not float\.$"),
        ({"seats": True}, r"^Vehicle\.seats=True must be of type int, not bool\.$"),
        ({"seats": "2"}, r"^Vehicle\.seats='2' must be of type int, not str\.$"),
        ({"speed": False}, r"^Vehicle\.speed=False must be of type float, not bool\.$"),
        ({"speed": "fast"}, r"^Vehicle\.speed='fast' must be of type float, not str\.$"),
        ({"speed": None}, r"^Vehicle\.speed=None must be of type float"),
        ({"speed": 10**400}, r"^Vehicle\.speed is an integer beyond any float\.$"),
        ({"open": 1}, r"^Vehicle\.open=1 must be of type bool, not int\.$"),
        ({"open": "false"}, r"^Vehicle\.open='false' must be of type bool, not str\.$"),
        ({"name": 3}, r"^Vehicle\.name=3 must be of type str, not int\.$"),
        ({"color": "green"}, r"^Vehicle\.color='green' is not one of 'red', 'blue'\.$"),
        ({"color": ["red"]}, r"^Vehicle\.color=\['red'\] is not one of"),
        ({"tags": "x"}, r"^Vehicle\.tags='x' must be a list\.$"),
        ({"tags": {"0": "x"}}, r"^Vehicle\.tags=.* must be a list\.$"),
        ({"tags": ["x", 1]}, r"^Vehicle\.tags\[1\]=1 must be of type str, not int\.$"),
        ({"wheels": [{}, {"inch": 9}]}, r"^Vehicle\.wheels\[1\] has no field 'inch'\. Did you mean 'inches'\?$"),
        ({"wheels": [None]}, r"^Vehicle\.wheels\[0\]=None must be an object with the fields of Wheel\.$"),
        ({"gears": [[1.0]]}, r"^Vehicle\.gears\[0\]=\[1\.0\] must be a list of 2 elements, not 1\.$"),
        ({"gears": [[1, 2, 3]]}, r"^Vehicle\.gears\[0\]=\[1, 2, 3\] must be a list of 2 elements, not 3\.$"),
        ({"gears": [1.0]}, r"^Vehicle\.gears\[0\]=1\.0 must be a list\.$"),
        ({"power": {"kind": "steam"}}, r"^Vehicle\.power\.kind='steam' is not one of battery, petrol\.$"),
        ({"power": {"liters": 1.0}}, r"^Vehicle\.power\.kind=None is not one of"),
        ({"power": None}, r"^Vehicle\.power\.kind=None is not one of"),
        ({"power": "petrol"}, r"^Vehicle\.power\.kind=None is not one of"),
        ({"power": {"kind": "battery"}}, r"^Vehicle\.power\.cells is missing: Battery needs it\.$"),
        ({"power": {"kind": "battery", "cells": 1, "liters": 1.0}}, r"^Vehicle\.power has no field 'liters'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Vehicle, encode(VEHICLE) | change)


@pytest.mark.parametrize("data", [None, [], "x", 1, [["name", "a"]]], ids=str)
def test_what_is_not_an_object_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Vehicle=.* must be an object with the fields of Vehicle\.$"):
        decode(Vehicle, data)
    with pytest.raises(ConfigError, match=r"^Vehicle\.name is missing: Vehicle needs it\.$"):
        decode(Vehicle, {})


@pytest.mark.parametrize(
    ("assignments", "field_name", "value"),
    [
        (["seats=7"], "seats", 7),
        (["speed=2"], "speed", 2.0),
        (["speed=inf"], "speed", math.inf),
        (["open=true"], "open", True),
        (["color=blue"], "color", "blue"),
        (['color="blue"'], "color", "blue"),
        (["name=7"], "name", "7"),
        (["name="], "name", ""),
        (["name=null"], "name", "null"),
        (["name=a=b"], "name", "a=b"),
        (['tags=["p", "q"]'], "tags", ("p", "q")),
        (['wheels=[{"inches": 3}]'], "wheels", (Wheel(inches=3),)),
        (["power.liters=5"], "power", Petrol(liters=5.0)),
        (['power={"liters": 5}'], "power", Petrol(liters=5.0)),
        (['power={"kind": "battery", "cells": 2}', "power.cells=3"], "power", Battery(cells=3)),
        (["seats=7", "seats=8"], "seats", 8),
        ([], "seats", 4),
    ],
    ids=str,
)
def test_what_an_override_sets(assignments: list[str], field_name: str, value: Any) -> None:
    vehicle = override(VEHICLE, assignments)
    assert vehicle == replace(VEHICLE, **{field_name: value})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seats", r"^override 'seats' must have the form path\.to\.field=value\.$"),
        ("", r"^override '' must have the form"),
        ("=1", r"^override '': no field ''"),
        ("seat=1", r"^override 'seat': no field 'seat'\. Did you mean 'seats'\?$"),
        ("power.liter=1", r"^override 'power\.liter': no field 'power\.liter'\. Did you mean 'liters'\?$"),
        ("seats.more=1", r"^override 'seats\.more': no field 'seats\.more'\.$"),
        ("wheels.0.inches=1", r"^override 'wheels\.0\.inches': no field 'wheels\.0'\.$"),
        ("power.cells=1", r"^override 'power\.cells': no field 'power\.cells'"),
        ("seats=many", r"^Vehicle\.seats='many' must be of type int, not str\.$"),
        ("seats=1.5", r"^Vehicle\.seats=1\.5 must be of type int, not float\.$"),
        ("seats=", r"^Vehicle\.seats='' must be of type int"),
        ("seats=null", r"^Vehicle\.seats=None must be of type int"),
        ("open=yes", r"^Vehicle\.open='yes' must be of type bool, not str\.$"),
        ("color=green", r"^Vehicle\.color='green' is not one of"),
        ("tags=p", r"^Vehicle\.tags='p' must be a list\.$"),
        ("power=battery", r"^Vehicle\.power\.kind=None is not one of battery, petrol\.$"),
        ('power={"kind": "battery"}', r"^Vehicle\.power\.cells is missing"),
        ('power={"lites": 1}', r"^Vehicle\.power has no field 'lites'\. Did you mean 'liters'\?$"),
    ],
)
def test_what_an_override_cannot_set(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(VEHICLE, [assignment])


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c: 2 -> 3"]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a: 1 -> 2", "b: 1 -> 2"]),
        ({"a": 1}, {"b": None}, ['a: 1 -> "(absent)"', 'b: "(absent)" -> null']),
        ({"a": {"b": 1}}, {"a": 1}, ['a: {"b": 1} -> 1']),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ['a: [1, {"b": 2}] -> [1, {"b": 3}]']),
        ({"a": "x"}, {"a": ""}, ['a: "x" -> ""']),
        (1, 2, [": 1 -> 2"]),
    ],
    ids=str,
)
def test_differences_are_leaves_by_path(old: Any, new: Any, lines: list[str]) -> None:
    assert diff(old, new) == lines
    assert diff(old, old) == diff(new, new) == []


def test_a_key_that_stands_twice_anywhere_is_refused_and_once_in_each_object_is_not() -> None:
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        parse_json('{"b": [{"a": 1, "c": 2, "a": 1}]}', distinct=True)
    assert parse_json('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}', distinct=True)["b"][1] == {"a": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "codec can't decode|Expecting value"),
        (b"[1]", r"^Vehicle=\[1\] must be an object"),
    ],
)
def test_a_file_that_is_not_a_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vehicle.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_json(Vehicle, path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"', "{", ""])
def test_what_must_be_an_object_is_named_with_the_fix(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^here (must hold a JSON object, not|is not readable JSON: ).*\. Restore it\.$"
    ):
        parse_object(text, "here", "Restore it.")
    assert parse_object('{"a": 1}', "here") == {"a": 1}
