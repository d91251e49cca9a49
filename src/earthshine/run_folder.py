"""What a run folder holds, by name, and how its files of lines are read: for all who write or read one.

A file of lines outlives what befalls one of them: a line that was cut off or damaged is told apart, and costs no other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from earthshine.config import parse_json

CONFIG, PLAN, ENV, METRICS, STARTS, EVAL = (
    "config.json", "plan.json", "env.json", "metrics.jsonl", "starts.jsonl", "eval",
)  # fmt: skip
ORIGIN = "origin.json"  # where the weights began, when not at random
HELDOUT_BEFORE = "heldout-before.json"  # in EVAL: the held-out loss at step 0
DAMAGED = "metrics.damaged"  # lines of metrics.jsonl that are no JSON, set aside


class Line(NamedTuple):
    """A line of a file of JSON objects. `record` is None where it is damaged: no JSON, or no object.

    number: from 1. raw: the bytes, with the newline; without one the line was being written.
    """

    number: int
    raw: bytes
    record: dict[str, Any] | None

    @property
    def cut_off(self) -> bool:
        """Whether it is a last line that is not whole, as in the file of a run that is writing."""
        return self.record is None and not self.raw.endswith(b"\n")


def json_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, damaged ones too; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                record = parse_json(raw)
            except ValueError:  # not JSON, or not even text
                record = None
            yield Line(number, raw, record if isinstance(record, dict) else None)
