"""The run folder: every name in it, and how it is read; for all who write or read one.

    RUN/
        config.json      the job, as the last start had it
        plan.json        every number that follows from it (`train.derive`)
        env.json         where the first start ran
        origin.json      where the weights began, when not at random
        starts.jsonl     one line per start, with what has changed (`train.starts`)
        metrics.jsonl    one line per logged step and per held-out evaluation (`train.metrics`)
        metrics.damaged  its damaged lines, set aside at a resume
        checkpoints/     step-NNNNNN/manifest.json, ... (`checkpoint.manifest`)
        eval/            held-out results, samples, verifications
        tensorboard/     with tracker="tensorboard"
        report.html      `earthshine report`

A damaged line costs no other: one that is cut off, or is not a JSON object, is told apart and passed over.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from earthshine.config import parse_json
from earthshine.errors import DataError

CONFIG, PLAN, ENV, ORIGIN = "config.json", "plan.json", "env.json", "origin.json"
STARTS, METRICS, DAMAGED = "starts.jsonl", "metrics.jsonl", "metrics.damaged"
START_PARTS = ("config", "plan", "environment")  # of a start; those that are as in the line before are left out
TENSORBOARD, REPORT = "tensorboard", "report.html"

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"  # in a checkpoint, written last
_STEP = "step-"
STEP_FOLDERS = f"{_STEP}*"  # a pattern of the checkpoints in CHECKPOINTS

EVAL = "eval"
HELDOUT_BEFORE, HELDOUT_AFTER = "heldout-before.json", "heldout-after.json"  # at step 0 and at the end
SAMPLES_BEFORE, SAMPLES_AFTER = "samples-before.json", "samples-after.json"
VERIFY_UPCYCLE, VERIFY_HUGGINGFACE = "verify-upcycle.json", "verify-huggingface.json"
VERIFICATIONS = "verify-*.json"  # a pattern of all of them

UPCYCLING = "earthshine.json"  # not of a run: beside the weights of an upcycled model, its options, ledger and hashes


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run_dir / CHECKPOINTS / f"{_STEP}{step:06d}"


def step_folders(run_dir: Path) -> list[Path]:
    """The folders of finished checkpoints, newest first; nothing is read."""
    folders = [p for p in (run_dir / CHECKPOINTS).glob(STEP_FOLDERS) if p.is_dir() and _number(p).isdecimal()]
    return sorted(folders, key=lambda p: int(_number(p)), reverse=True)


def _number(folder: Path) -> str:
    return folder.name.removeprefix(_STEP)


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoint folders that `path` can mean, newest first: itself, or those of a run folder."""
    if (path / MANIFEST).is_file():
        return [path]
    return step_folders(path.parent if path.name == CHECKPOINTS else path)


def is_run(path: Path) -> bool:
    """Whether a path is a training run's folder, or one of its checkpoints, rather than a Hugging Face directory."""
    return (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir()


def run_of(path: Path) -> Path:
    """The run folder of a path that `is_run`."""
    return path if (path / CHECKPOINTS).is_dir() else path.parent.parent


class Line(NamedTuple):
    """A line of a file of JSON objects. `record` is None where it is damaged: not JSON, or not an object.

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
    """The lines of a file, damaged ones too; none where there is no file. Raises DataError where it cannot be read."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    record = parse_json(raw)
                except ValueError:  # not JSON, or not even text
                    record = None
                yield Line(number, raw, record if isinstance(record, dict) else None)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}. Make it readable, or move it away.") from e


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines, in order; damaged lines are passed over."""
    return (line.record for line in json_lines(path) if line.record is not None)


def start_lines(starts: Path) -> Iterator[Line]:
    """The lines of a starts.jsonl, whole: what a start leaves out of `START_PARTS` is as in the line before.

    After a damaged line, what a start leaves out is not known.
    """
    before: dict[str, Any] = {}
    for line in json_lines(starts):
        if line.record is None:
            before = {}
            yield line
            continue
        start = before | line.record
        before = {part: start[part] for part in START_PARTS if part in start}
        yield line._replace(record=start)


def read_steps(metrics: Path) -> dict[int, dict[str, Any]]:
    """The step records of a metrics.jsonl, by step; those that are damaged or missing are not there."""
    return {r["step"]: r for r in records(metrics) if r.get("kind") == "step" and isinstance(r.get("step"), int)}
