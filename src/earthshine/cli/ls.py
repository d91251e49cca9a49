"""`earthshine ls`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from earthshine.cli.arguments import Positional
from earthshine.cli.options import print_json
from earthshine.console import human_count, table

DESCRIPTION = "List recipes (jobs for `train`) and presets (architectures), one per line."
EXAMPLES = (
    ("everything", "earthshine ls"),
    ("named architectures with their sizes", "earthshine ls presets"),
    ("machine-readable", "earthshine ls recipes --json"),
)


@dataclass(frozen=True)
class Options:
    what: Annotated[Literal["all", "recipes", "presets"], Positional("recipes|presets")] = "all"
    """What to list."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    makers = {"recipes": _recipes, "presets": _presets}
    if options.what != "all":
        rows = makers[options.what]()
        if options.json:
            print_json(rows)
        else:
            print(_table(rows))
        return
    listings = {what: make() for what, make in makers.items()}
    if options.json:
        print_json(listings)
    else:
        print("\n\n".join(f"{what}:\n{_table(rows)}" for what, rows in listings.items()))


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [[human_count(v) if isinstance(v, int) else v for v in row.values()] for row in rows]
    return table(list(rows[0]), cells)


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
