"""`earthshine report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.arguments import Positional
from earthshine.cli.options import json_text, print_outcome

DESCRIPTION = """Write one self-contained HTML page from run folders, with Markdown and JSON beside it.

It shows what was run, loss curves, expert load, update sizes, held-out losses with their errors, verifications, samples
and the environment. Opening it fetches nothing."""
EXAMPLES = (
    ("one run; the page is written into its folder", "earthshine report runs/a"),
    ("two runs compared", "earthshine report runs/dense runs/moe --out report.html --title 'dense and upcycled'"),
    ("the numbers behind the page, for a program", "earthshine report runs/a --json"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Annotated[tuple[Path, ...], Positional("RUN")]
    """Run folders."""

    out: Annotated[Path | None, "FILE"] = None
    """Page to write; by default report.html in the first run folder."""

    title: str = ""
    """Title of the page."""

    json: bool = False
    """Print report.json instead of the path of the page."""


def run(options: Options) -> None:
    import json

    from earthshine.report.page import write_report

    page = write_report(options.runs, options.out, options.title)
    print_outcome(json_text(json.loads(page.with_suffix(".json").read_bytes())) if options.json else str(page))
