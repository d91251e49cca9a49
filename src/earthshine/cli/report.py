"""`earthshine report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from earthshine.cli.options import json_text, print_outcome
from earthshine.errors import ConfigError

DESCRIPTION = """One self-contained HTML page, with Markdown and JSON beside it, from run folders.

What was run, loss curves, expert load, update sizes, held-out losses with their errors, verifications, samples,
environment. Nothing is fetched when the page is opened."""
EXAMPLES = (
    ("one run; the page lands in its folder", "earthshine report runs/a"),
    ("two runs compared", "earthshine report runs/dense runs/moe --out report.html --title 'dense and upcycled'"),
    ("the numbers behind the page, for a program", "earthshine report runs/a --json"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders."""

    out: Path | None = None
    """The page to write; by default report.html in the first run folder."""

    title: str = ""
    """Title of the page."""

    json: bool = False
    """Print the contents of report.json instead of the page's path."""


def run(options: Options) -> None:
    import json

    from earthshine.report.page import write_report

    if not options.runs:
        raise ConfigError("RUN: report needs at least one run folder.")
    page = write_report(options.runs, options.out, options.title)
    print_outcome(json_text(json.loads(page.with_suffix(".json").read_bytes())) if options.json else str(page))
