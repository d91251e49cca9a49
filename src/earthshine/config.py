"""Strict conversion between JSON and frozen dataclasses, dotted overrides, and differences.

A config is a tree of frozen dataclasses whose leaves are str, int, float, bool, Literal, or tuples of these or of
dataclasses. A field that may be one of several dataclasses is a union whose members each carry a field
`kind: Literal["..."]`; the JSON's "kind" chooses. Nothing unknown is ever ignored.

A field that was renamed names its old spelling, as in `field(metadata={"was": "rest"})`: that is read too, and logged.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from earthshine.console import log
from earthshine.errors import ConfigError, nearest

T = TypeVar("T")

MAX_JSON_DEPTH = 100  # far beyond any config, index or manifest
_TOO_DEEP = f"it nests deeper than {MAX_JSON_DEPTH} levels"


def encode(value: Any) -> Any:
    """A config, or dicts and lists, as JSON-ready dicts, lists and scalars; the inverse of `decode`.

    An infinity becomes the text "inf", because JSON has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """Build a `cls` from parsed JSON.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, or a value of the wrong type;
    and whatever `cls.__post_init__` raises.
    """
    return typing.cast(T, _decode(cls, data, where or cls.__name__))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), data, where)
    if origin is Literal:
        options = typing.get_args(kind)
        if data not in options:
            raise ConfigError(f"{where}={data!r} is not one of {', '.join(map(repr, options))}.")
        return data
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{where}={data!r} must be a list.")
        if items[-1] is Ellipsis:
            items = (items[0],) * len(data)
        if len(items) != len(data):
            raise ConfigError(f"{where}={data!r} must be a list of {len(items)} elements, not {len(data)}.")
        return tuple(_decode(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, data, strict=True)))
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError as e:
            raise ConfigError(f"{where} is an integer beyond any float.") from e
    if kind is float and data in ("inf", "-inf"):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ConfigError(f"{where}={data!r} must be of type {kind.__name__}, not {type(data).__name__}.")
    return data


def _decode_union(members: Sequence[Any], data: Any, where: str) -> Any:
    by_kind = {m.__dataclass_fields__["kind"].default: m for m in members}
    chosen = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(chosen, str) or chosen not in by_kind:
        raise ConfigError(f"{where}.kind={chosen!r} is not one of {', '.join(sorted(by_kind))}.")
    return _decode_dataclass(by_kind[chosen], data, where)


def _decode_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where}={data!r} must be an object with the fields of {cls.__name__}.")
    data = _renamed(cls, data, where)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where} has no field '{key}'.{nearest(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{where}.{name} is missing: {cls.__name__} needs it.")
    return cls(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _renamed(cls: Any, data: dict[str, Any], where: str) -> dict[str, Any]:
    """`data` with the names that the fields of `cls` have now. Raises ConfigError for a field under both names."""
    for field in dataclasses.fields(cls):
        old = field.metadata.get("was")
        if old in data:
            if field.name in data:
                raise ConfigError(f"{where}.{old} is the old name of {where}.{field.name}: give one of them.")
            _log_renamed(f"{where}.{old}", field.name)
            data = {field.name if key == old else key: value for key, value in data.items()}
    return data


@functools.cache
def _log_renamed(old: str, new: str) -> None:
    log(f"{old} is called {new} now; the old name is still read.")


def load_json(cls: type[T], path: str | Path) -> T:
    """Decode a JSON file. Raises ConfigError when it is not readable, not JSON, or not a `cls`."""
    try:
        data = read_json(path, distinct=True)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e  # an OSError's own text has the path once more
        raise ConfigError(f"{path} is not a readable JSON config: {reason}.") from e
    return decode(cls, data)


def parse_json(text: str | bytes, *, distinct: bool = False) -> Any:
    """JSON that comes from outside. Raises ValueError for whatever cannot be used.

    That includes nesting deeper than `MAX_JSON_DEPTH`, which json.loads meets with a RecursionError (not a ValueError)
    at a depth that depends on the interpreter, or reads, so that what walks the result fails.

    Args:
        distinct: refuse an object that has a key twice, the first of which would be ignored.
    """
    try:
        data = json.loads(text, object_pairs_hook=_distinct if distinct else None)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return data
    raise ValueError(_TOO_DEEP)


def read_json(path: str | Path, *, distinct: bool = False) -> Any:
    """The JSON of a file, by `parse_json`, whatever the locale's encoding. Raises OSError or ValueError."""
    return parse_json(Path(path).read_bytes(), distinct=distinct)


def parse_object(text: str | bytes, where: str | Path, fix: str = "") -> dict[str, Any]:
    """The JSON object that `text` is. Raises ConfigError, naming `where` and with `fix` at its end, when it is none."""
    try:
        data = parse_json(text)
    except ValueError as e:
        raise ConfigError(f"{where} is not readable JSON: {e}.{fix and ' ' + fix}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold a JSON object, not {type(data).__name__}.{fix and ' ' + fix}")
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return members


def override(config: T, assignments: Sequence[str]) -> T:
    """Apply 'a.b=value' assignments, decoded strictly; values are JSON, or plain strings when they are not.

    Raises ConfigError for an unknown path (with the nearest name) or a value of the wrong type.
    """
    data = encode(config)
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            raise ConfigError(f"override {assignment!r} must have the form path.to.field=value.")
        keys = path.split(".")
        node: Any = data
        part: Any = config
        for depth, key in enumerate(keys):
            if dataclasses.is_dataclass(part) and isinstance(node, dict) and key not in node:
                (key,) = _renamed(part, {key: None}, ".".join([type(config).__name__, *keys[:depth]]))
                keys[depth] = key
            if not isinstance(node, dict) or key not in node:
                known = node if isinstance(node, dict) else ()
                raise ConfigError(f"override {path!r}: no field '{'.'.join(keys[: depth + 1])}'.{nearest(key, known)}")
            part = getattr(part, key, None)
            if depth < len(keys) - 1:
                node = node[key]
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        if isinstance(node[keys[-1]], str) and not isinstance(value, str):
            value = text
        if isinstance(node[keys[-1]], dict) and isinstance(value, dict) and "kind" not in value:
            where = f"{type(config).__name__}.{path}"
            value = {**node[keys[-1]], **(_renamed(part, value, where) if dataclasses.is_dataclass(part) else value)}
        node[keys[-1]] = value
    return decode(type(config), data)


def not_defaults(config: Any, where: str = "") -> list[tuple[str, Any]]:
    """The leaves of a config that differ from its classes' defaults, or have none: (path, encoded value)."""
    leaves = []
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{where}.{field.name}" if where else field.name
        if not field.init:
            continue
        if dataclasses.is_dataclass(value):
            leaves += not_defaults(value, path)
        elif field.default is dataclasses.MISSING or encode(value) != encode(field.default):
            leaves.append((path, encode(value)))
    return leaves


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two encoded configs differ: (path, old, new), "(absent)" where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(set(old) | set(new)):
            path = f"{where}.{key}" if where else key
            changes += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), path)
        return changes
    return [] if old == new else [(where, old, new)]


def diff(old: Any, new: Any, where: str = "") -> list[str]:
    """`differences`, each as 'path: old -> new'."""
    return [f"{path}: {json.dumps(a)} -> {json.dumps(b)}" for path, a, b in differences(old, new, where)]
