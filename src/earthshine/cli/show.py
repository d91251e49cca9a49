"""`earthshine show`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from earthshine.cli.arguments import Positional
from earthshine.cli.options import print_json
from earthshine.config import diff, encode
from earthshine.console import human_count
from earthshine.errors import ConfigError, nearest

DESCRIPTION = """Print a recipe or a preset: its source, its size, and what it changes.

--json prints every resolved value instead, as a file that `train` reads."""
EXAMPLES = (
    ("how a preset is made, and how large it is", "earthshine show llama3_8b_e8t2"),
    ("a job as a file, to edit and train", "earthshine show tiny --json > job.json"),
    ("the values of an architecture, machine-readable", "earthshine show smollm2_135m --json"),
)


@dataclass(frozen=True)
class Options:
    name: Annotated[str, Positional("NAME")]
    """A name from `earthshine ls recipes` or `earthshine ls presets`."""

    json: bool = False
    """Print the resolved values as JSON."""


def run(options: Options) -> None:
    make = _find(options.name)
    if options.json:
        print_json(encode(make()))
        return
    print(inspect.getsource(make).rstrip())
    print(f"\n{_size(make())}")
    for base in _bases(make):
        changes = diff(encode(base()), encode(make()))
        print("\n".join([f"\n# changes to {base.__name__}:", *(f"#   {line}" for line in changes)]))


def _bases(make: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The recipe, or the preset, that a recipe or a preset begins from: it calls its function."""
    from earthshine.model.presets import PRESETS
    from earthshine.recipes.registry import RECIPES

    kin = RECIPES if make.__name__ in RECIPES else PRESETS
    return [kin[name] for name in make.__code__.co_names if name in kin]


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
