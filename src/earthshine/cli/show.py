"""`earthshine show`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from earthshine.cli.options import print_json
from earthshine.config import encode
from earthshine.console import human_count
from earthshine.errors import ConfigError, nearest

DESCRIPTION = (
    "Print a recipe or a preset: its source, or with --json every resolved value, which `train` reads as a file."
)
EXAMPLES = (
    ("how a preset is made, and how large it is", "earthshine show llama3_8b_e8t2"),
    ("a job as a file to edit and train", "earthshine show tiny --json > job.json"),
    ("an architecture's values for a program", "earthshine show smollm2_135m --json"),
)


@dataclass(frozen=True)
class Options:
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A name from `earthshine ls recipes` or `earthshine ls presets`."""

    json: bool = False
    """Print the resolved values as JSON."""


def run(options: Options) -> None:
    make = _find(options.name)
    if options.json:
        print_json(encode(make()))
        return
    print(inspect.getsource(make).rstrip())
    print("\n" + _size(make()))


def _find(name: str) -> Callable[[], Any]:
    from earthshine.model.presets import PRESETS
    from earthshine.recipes.registry import RECIPES

    known: dict[str, Callable[[], Any]] = {**PRESETS, **RECIPES}
    if name not in known:
        raise ConfigError(f"recipe or preset '{name}' is not known.{nearest(name, known)}")
    return known[name]


def _size(value: Any) -> str:
    from earthshine.model.config import ModelConfig
    from earthshine.model.counts import count_parameters
    from earthshine.train.job import model_config

    config = value if isinstance(value, ModelConfig) else model_config(value)
    counts = count_parameters(config)
    return (
        f"# {counts.total:,} parameters ({human_count(counts.total)}), "
        f"{counts.active:,} active per token ({human_count(counts.active)});\n"
        f"# without embeddings {counts.total_non_embedding:,}, {counts.active_non_embedding:,} active per token"
    )
