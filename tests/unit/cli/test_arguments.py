"""Options from a dataclass: where arguments may stand, what types become, and what is read from the source."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest

from earthshine.cli.arguments import REPEATED, Positional, help_text, parse
from earthshine.errors import ConfigError

DESCRIPTION = "Cook."
EXAMPLES = (("plain", "earthshine cook soup"),)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every kind of field that commands have."""

    dish: Annotated[Path, Positional("DISH")]
    """What to cook, 100% of it."""

    extras: Annotated[tuple[str, ...], Positional("key=value")] = ()
    """More."""

    oven: Annotated[Path | None, "OVEN"] = None
    """Where."""

    hours: tuple[int, ...] = ()
    """When."""

    spices: Annotated[tuple[Path, ...], "JAR", REPEATED] = ()
    """What with."""

    heat: float = 0.5
    """How."""

    size: Literal["small", "large"] = "small"
    """How much."""

    dry_run: bool = False
    """Whether."""


command: ModuleType = sys.modules[__name__]


def test_everything_by_default_and_everything_given() -> None:
    assert parse(command, "cook", ["soup"]) == Options(dish=Path("soup"))
    line = "a=1 --oven o --hours 1 2 --dry_run soup b=2 --spices x --heat=1e-3 --spices y --size large"
    with pytest.raises(ConfigError, match="--hours: 'soup' is not an integer"):
        parse(command, "cook", line.replace("--dry_run ", "").split())
    assert parse(command, "cook", ["soup", *line.replace("soup ", "").split()]) == Options(
        dish=Path("soup"),
        extras=("a=1", "b=2"),
        oven=Path("o"),
        hours=(1, 2),
        spices=(Path("x"), Path("y")),
        heat=1e-3,
        size="large",
        dry_run=True,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "cook needs DISH. See earthshine cook --help."),
        ("soup --ovn o", "cook has no option '--ovn'. Did you mean '--oven'? See earthshine cook --help."),
        ("--ov=o", "cook has no option '--ov'."),
        ("soup --oven -top", "--oven: expected one argument; a value that begins with - is written --oven=-VALUE. See"),
        ("soup --heat warm", "--heat: 'warm' is not a number. See earthshine cook --help."),
        ("soup --size big", "--size: 'big' is not one of its values."),
        ("soup --size smal", "--size: 'smal' is not one of its values. Did you mean 'small'? See"),
        ("soup --dry-run=yes", "--dry-run: it takes no value. See earthshine cook --help."),
        ("soup --help=oven", "-h/--help: it takes no value."),
    ],
)
def test_complaints_are_one_line(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(command, "cook", line.split())
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_only_the_names_of_options_are_respelled() -> None:
    """Not a text that begins like one; a misspelled option is one whatever its value."""
    options = parse(command, "cook", ["soup_of", "--dry_run", "a_b=1", "--oven=--my_oven"])
    assert options == Options(dish=Path("soup_of"), extras=("a_b=1",), oven=Path("--my_oven"), dry_run=True)
    assert parse(command, "cook", ["soup", "--oven", "--my_oven is hot"]).oven == Path("--my_oven is hot")
    with pytest.raises(ConfigError, match="cook has no option '--ovn'. Did you mean '--oven'?"):
        parse(command, "cook", ["soup", "--ovn=my oven"])


def test_help_is_the_source_and_shows_no_default_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert help_text(command, "cook") == (
        "usage: earthshine cook DISH [key=value ...] [OPTIONS]\n\nCook.\n\n"
        "arguments:\n  DISH                What to cook, 100% of it. (required)\n  key=value           More.\n\n"
        "options:\n  --oven OVEN         Where.\n  --hours [N ...]     When.\n  --spices JAR        What with.\n"
        "  --heat X            How. (default: 0.5)\n  --size small|large  How much. (default: small)\n"
        "  --dry-run           Whether.\n  -h, --help          Show this help.\n"
        "\nexamples:\n  # plain\n  earthshine cook soup"
    )
