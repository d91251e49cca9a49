"""The starts of a run, from starts.jsonl: what changed mid-run, in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from earthshine.errors import DataError
from earthshine.files import to_json
from earthshine.report.content import Cell, Table
from earthshine.report.scales import whole
from earthshine.run_folder import STARTS, start_lines

LONGEST = 80  # characters of a value
SHOWN = 6  # changes of one start, where space is short


@dataclass(frozen=True)
class Change:
    """A leaf of the config, of the plan or of the environment."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = (v if v == "(absent)" else _short(to_json(v)) for v in (self.before, self.now))
        return f"`{self.field}` {before} \u2192 {now}"


@dataclass(frozen=True)
class Start:
    """One start of a run, from `first_step` on. `another_run`: the changed fields that make it another config's run."""

    first_step: int
    time: str = ""
    config: tuple[Change, ...] = ()
    plan: tuple[Change, ...] = ()
    environment: tuple[Change, ...] = ()
    another_run: tuple[str, ...] = ()
    derived: Mapping[str, Any] = field(default_factory=dict)  # the whole plan of this start

    @property
    def moved(self) -> bool:
        """Whether last bits may differ from this start on; another host alone changes nothing."""
        return any(c.field != "host" for c in self.environment)

    @property
    def changed(self) -> bool:
        return bool(self.config or self.plan) or self.moved

    @property
    def marked(self) -> bool:
        """Whether the steps from this start on differ from an uninterrupted run's, or may."""
        return bool(self.another_run or (self.plan and not self.config)) or self.moved


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\u2026"


def read_starts(path: Path) -> tuple[list[Start], list[int]]:
    """The starts whose steps remain, and the line numbers of damaged records. Raises DataError as `start_of` does."""
    lines = list(start_lines(path))
    starts = effective(start_of(x.record, f"{path} line {x.number}") for x in lines if x.record is not None)
    return starts, [x.number for x in lines if x.record is None]


def effective(records: Iterable[Start]) -> list[Start]:
    """Starts by first step, without those that a later start went back beyond: none of their steps remain."""
    starts: list[Start] = []
    for start in records:
        starts = [s for s in starts if s.first_step < start.first_step] + [start]
    return starts


def start_of(record: Mapping[str, Any], where: str = STARTS) -> Start:
    """A record of starts.jsonl as a `Start`. Raises DataError for a record that is not one."""
    first, changes = record.get("first_step"), record.get("changes")
    if isinstance(first, bool) or not isinstance(first, int) or not isinstance(changes, Mapping):
        raise DataError(f"{where}: a start needs 'first_step' (an integer) and 'changes' (an object).")
    try:
        parts = {
            part: tuple(Change(str(c["field"]), c["from"], c["to"]) for c in changes.get(part, ()))
            for part in ("config", "plan", "environment")
        }
        another_run = tuple(map(str, record.get("another_run", ())))
    except (TypeError, KeyError, AttributeError) as e:
        raise DataError(f"{where}: 'changes' must be lists of {{field, from, to}}: {e}.") from e
    plan = record.get("plan")
    derived = plan if isinstance(plan, Mapping) else {}
    return Start(first, str(record.get("time", "")), **parts, another_run=another_run, derived=derived)


def change_words(start: Start, limit: int = 0) -> str:
    """What changed at a start; at most `limit` changes (0: all) of the config and as many of the environment."""
    words = []
    for title, changes in (("config", start.config), ("environment", start.environment)):
        if changes:
            shown = changes[: limit or None]
            more = f" and {len(changes) - len(shown)} more" if len(changes) > len(shown) else ""
            words.append(f"{title}: {', '.join(map(str, shown))}{more}")
    if start.plan and not start.config:  # else it follows from that
        words.append(f"derived numbers: {', '.join(map(str, start.plan[: limit or SHOWN]))}")
    return "; ".join(words)


def segments(starts: Sequence[Start], part: str, field: str, now: Any, last: int) -> list[tuple[int, int, Any]]:
    """(first step, last step, value) of a field of the "config" or the "plan" whose value is `now` at step `last`."""
    pieces = []
    for start in reversed(starts):
        before = {c.field: c.before for c in getattr(start, part)}
        if field in before:
            pieces.append((start.first_step, last, now))
            last, now = start.first_step - 1, before[field]
    pieces.append((1, last, now))
    return [piece for piece in reversed(pieces) if piece[0] <= piece[1]]


def mid_run_changes(starts: Sequence[Start]) -> str:
    """All changes of a run in one text, "" for none: "from step 4 config: `optimizer.lr` 0.005 \u2192 0.05"."""
    return ". ".join(f"From step {whole(s.first_step)} {change_words(s, SHOWN)}" for s in starts if s.changed)


def starts_table(name: str, starts: Sequence[Start]) -> Table | None:
    """Every start of a run that had more than one, or whose first one is not known."""
    if not any(s.first_step > 1 for s in starts):
        return None
    rows = tuple(
        (
            whole(s.first_step),
            s.time.replace("T", " ").removesuffix("+00:00") or "not recorded",
            Cell(change_words(s) or ("\u2014" if s.first_step == 1 else "nothing"), "" if s.changed else "quiet"),
        )
        for s in starts
    )
    caption = (
        f"Starts of {name}, and what had changed since the steps before. Config and plan on this page are those of the "
        "last start, the environment is that of the first."
    )
    return Table(caption, ("First step", "Started (UTC)", "Changed"), rows)
