"""Writes docs/cli.md from the commands' own `--help`: python tools/cli_page.py. A test keeps it current."""

import contextlib
import io
import os
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 96  # columns, which fit the site's page
VERIFY = ("upcycle", "hf", "checkpoint")

_INTRODUCTION = """# Commands

What each command prints for `--help`. {subject}

Results go to stdout, logs to stderr. Every command that only reads takes `--json`.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | the run failed |
| 2 | wrong usage or config |
| 3 | a check did not hold |
| 75 | interrupted after saving: re-run the same command to resume |
"""
_SUBJECT = "This page is generated from them by `tools/cli_page.py`, and a test keeps it current."


def help_text(*command: str) -> str:
    """What `earthshine COMMAND --help` prints, WIDTH columns wide."""
    from earthshine.cli.main import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = os.environ.get("COLUMNS")
    os.environ |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    out.seek(0)
    return "\n".join(line.rstrip() for line in out.read().strip().splitlines())


def page() -> str:
    """The text of docs/cli.md."""
    from earthshine.cli.main import COMMANDS

    parts = [_INTRODUCTION.format(subject=_SUBJECT), f"```text\n{help_text()}\n```\n"]
    for name in COMMANDS:
        parts.append(f"## {name}\n\n```text\n{help_text(name)}\n```\n")
        if name == "verify":
            parts += [f"### verify {check}\n\n```text\n{help_text(name, check)}\n```\n" for check in VERIFY]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
