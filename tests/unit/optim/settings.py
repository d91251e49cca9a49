"""Every option of the optimizer at every value other than its default: what the tests of its costs and of its making
go through. An option that is new is among them; one whose values cannot be listed from its type needs a row in ROWS.
"""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from earthshine.optim.config import OptimizerConfig

# Values of options of other types, and what some values need beside them.
ROWS: dict[str, tuple[Any, ...]] = {
    "scale": ("original", "spectral"),
    "schatten_p": (1.5, 4.0, float("inf")),
    "ns_table": (((2.0, -1.5, 0.5),) * 3,),
    "ns_steps": (1, 7),
    "rounding_seed": (3,),
    "freeze": (("*norm*",),),
}
WITH: dict[str, dict[str, Any]] = {
    "norm=schatten": {"schatten_p": 4.0},
    "schatten_p": {"norm": "schatten"},
    "ns_coefficients=table": {"ns_table": ((2.0, -1.5, 0.5),) * 3},
    "ns_table": {"ns_coefficients": "table"},
}


def values_of(name: str) -> tuple[Any, ...]:
    """The values of an option other than its default."""
    default, kind = getattr(OptimizerConfig(), name), get_type_hints(OptimizerConfig)[name]
    if name in ROWS:
        return ROWS[name]
    if kind is bool:
        return (not default,)
    if get_origin(kind) is Literal:
        return tuple(value for value in get_args(kind) if value != default)
    assert kind is float, f"a new option, {name}: list its values in ROWS"
    return (0.5,)


SETTINGS: dict[str, dict[str, Any]] = {
    f"{field.name}={value}": WITH.get(field.name, {}) | WITH.get(f"{field.name}={value}", {}) | {field.name: value}
    for field in fields(OptimizerConfig)
    for value in values_of(field.name)
}
