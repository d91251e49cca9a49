"""What people read while something runs: log lines, progress and tables.

Everything here but `table` and the `human_*` functions writes to stderr; results go to stdout and are the callers'.
On a terminal rich draws (and honors NO_COLOR); elsewhere the output is plain lines. Work never ends because nobody
reads of it any more: a log that cannot be written stops, silently.
"""

import functools
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_LINE_SECONDS = 10.0
BAR_SECONDS = 0.1


# What a terminal obeys instead of showing: C0 and C1 controls (line ends and tabs aside), what turns the direction of
# writing, line and paragraph separators; and halves of surrogate pairs, which stand for bytes that are no UTF-8.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, one_line: bool = False) -> str:
    """Text that may hold anything (names of files and tensors, a model's words), safe to show on a terminal.

    Control characters are spelled as Python does (`\\x1b`); with `one_line`, ends of lines and tabs, too.
    """
    shown = _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], text)
    return shown.replace("\n", "\\n").replace("\t", "\\t") if one_line else shown


class _Shown:
    """A terminal's stream that is only given what is printable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_stdout() -> Iterator[None]:
    """Within it a terminal's stdout is only given what is printable; files and pipes get every byte as it is."""
    stream = sys.stdout
    if stream is None or not stream.isatty():
        yield
        return
    sys.stdout = cast(TextIO, _Shown(stream))
    try:
        yield
    finally:
        sys.stdout = stream


def log(message: str) -> None:
    """One line to stderr, if there is one; made `printable`."""
    message = printable(message)
    with surviving_stderr():
        if _is_terminal():
            _terminal().print(message, markup=False, highlight=False, soft_wrap=True)
        elif sys.stderr is not None:
            print(message, file=sys.stderr, flush=True)


@contextmanager
def surviving_stderr() -> Iterator[None]:
    """Writing in the block may fail: on a closed pipe, a lost terminal, a full disk. From then on it goes nowhere."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: a file object that was closed
        silence(sys.stderr)


def silence(stream: Any) -> None:
    """Send a standard stream to the null device, so that flushing what it still holds does not fail at the exit."""
    with suppress(OSError, ValueError, AttributeError):  # no stream, or one without a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@functools.cache
def _terminal() -> "Console":
    """One console for the process, so that log lines appear above a live progress bar. It looks sys.stderr up anew."""
    from rich.console import Console

    return Console(stderr=True)


class Progress(Protocol):
    """What `progress` gives: tell it how much more is done."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` units; `note` replaces the text shown at the end of the line."""


@contextmanager
def progress(title: str, total: float, unit: str = "") -> Iterator[Progress]:
    """Show how far a long piece of work is, with the time left.

    A bar on a terminal; elsewhere one plain line about every 10 s and one at the end. `total` and the amounts are in
    `unit`s; the unit "B" is shown as KiB, MiB, ...
    """
    title = printable(title, one_line=True)
    if not _is_terminal():
        lines = _PlainProgress(title, total, unit)
        try:
            yield lines
        finally:
            lines.finish()
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # Refreshed by `advance`, not by rich's thread: a thread would outlive the bar for a moment, and not survive a fork.
    bar = RichProgress(*columns, console=_terminal(), auto_refresh=False)
    with surviving_stderr():
        bar.start()
    try:
        yield _BarProgress(bar, title, total, unit)
    finally:
        with surviving_stderr():
            bar.stop()


class _BarProgress:
    """A rich progress bar."""

    def __init__(self, bar: Any, title: str, total: float, unit: str) -> None:
        self._bar, self._total, self._unit, self._note = bar, total, unit, ""
        self._done = self._last = 0.0
        with surviving_stderr():
            bar.add_task(title, total=total or None, amount=_amount(0, total, unit), note="")
        self._task = bar.task_ids[-1]  # there also when drawing it failed

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        shown = _amount(self._done, self._total, self._unit)
        now = time.monotonic()
        due = now - self._last >= BAR_SECONDS
        self._last = now if due else self._last
        with surviving_stderr():
            self._bar.update(self._task, completed=self._done, amount=shown, note=self._note, refresh=due)


class _PlainProgress:
    """Plain lines, at most one every PLAIN_LINE_SECONDS, and a last one."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        self._title, self._total, self._unit, self._note = title, total, unit, ""
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_SECONDS:
            self._last = now
            elapsed = now - self._start
            left = elapsed * (self._total / self._done - 1) if 0 < self._done <= self._total else 0.0
            percent = f"{100 * self._done / self._total:3.0f}%  " if self._total else ""
            self._line(f"{percent}{_amount(self._done, self._total, self._unit)}  eta {human_seconds(left)}")

    def finish(self) -> None:
        took = human_seconds(time.monotonic() - self._start)
        self._line(f"{_amount(self._done, self._total, self._unit)} in {took}")

    def _line(self, text: str) -> None:
        log(f"{self._title}: {text}{'  ' + self._note if self._note else ''}")


def _amount(done: float, total: float, unit: str) -> str:
    show = human_bytes if unit == "B" else human_count
    text = f"{show(done)}/{show(total)}" if total else show(done)
    return text if unit in ("", "B") else f"{text} {unit}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text: columns of numbers to the right, others to the left, a rule under the headers."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(headers)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(r) for r in cells)])


def _is_number(cell: object) -> bool:
    if isinstance(cell, int | float):
        return True
    return isinstance(cell, str) and cell[:1] in "-+.0123456789" and any(c.isdigit() for c in cell[:3])


def human_bytes(n: float) -> str:
    """Bytes in binary units: 1536 -> '1.5 KiB'."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def counted(n: int, noun: str) -> str:
    """A number and what it counts: "1 file", "1,024 files"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def human_count(n: float) -> str:
    """A count in powers of a thousand: 999 -> '999', 1234 -> '1.23k', 5_000_000 -> '5.00M', then B and T."""
    size = float(n)
    if abs(size) < 1000:
        return f"{size:.0f}" if size == int(size) else f"{size:.1f}"
    for unit in ("k", "M", "B"):
        size /= 1000
        if abs(size) < 999.995:
            return f"{size:.2f}{unit}"
    return f"{size / 1000:.2f}T"


def human_seconds(s: float) -> str:
    """A duration: '0.42s', '12s', '3m05s', '2h07m', '3d04h'."""
    if s < 10:
        return f"{s:.2f}s" if s < 1 else f"{s:.1f}s"
    whole = round(s)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
