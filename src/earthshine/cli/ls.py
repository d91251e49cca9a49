"""`earthshine ls`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from earthshine.cli.options import print_json
from earthshine.console import human_count, table

DESCRIPTION = "List what there is, one line each."
EXAMPLES = (
    ("jobs to train as they are, or to change by key=value", "earthshine ls recipes"),
    ("named architectures with their sizes", "earthshine ls presets"),
    ("the same for a program", "earthshine ls presets --json"),
)


@dataclass(frozen=True)
class Options:
    what: Annotated[Positional[Literal["recipes", "presets"]], arg(metavar="recipes|presets")]
    """What to list."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    rows = _presets() if options.what == "presets" else _recipes()
    if options.json:
        print_json(rows)
        return
    shown = [[human_count(v) if isinstance(v, int) else v for v in row.values()] for row in rows]
    print(table([key.replace("_", " ") for key in rows[0]], shown))


def _presets() -> list[dict[str, Any]]:
    from earthshine.model.counts import count_parameters
    from earthshine.model.presets import PRESETS

    rows = []
    for name, make in PRESETS.items():
        counts = count_parameters(make())
        about = (make.__doc__ or "").partition("\n")[0]
        rows.append({"name": name, "parameters": counts.total, "active": counts.active, "about": about})
    return rows


def _recipes() -> list[dict[str, Any]]:
    from earthshine.recipes.registry import RECIPES

    return [{"name": n, "about": (make.__doc__ or "").partition("\n")[0]} for n, make in RECIPES.items()]
