"""The folder of a run: who may write in it, what run it belongs to, and where that run took place."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from earthshine.config import encode, read_json
from earthshine.console import log
from earthshine.data.usage import fingerprint
from earthshine.errors import ConfigError, OutputExistsError
from earthshine.files import make_folder, to_json, try_lock, write_json
from earthshine.model.config import ModelConfig
from earthshine.run_folder import CONFIG, ENV, EVAL, HELDOUT_BEFORE, METRICS, ORIGIN, PLAN
from earthshine.train.job import Derived, TrainJob, changes_on_resume
from earthshine.train.starts import PLACE, first_environment, new_start, stored, write_start

__all__ = ["CONFIG", "ENV", "EVAL", "METRICS", "ORIGIN", "PLAN", "check_config", "claim", "describe", "same_data"]
_LOCK = ".lock"


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it; when nothing was written into a new one, it goes again.

    Raises ConfigError when another process trains there, OutputExistsError when it is not a run folder.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputExistsError(f"run folder {run_dir} is a file: choose another path.")
    new = not run_dir.exists()
    if not new and not (run_dir / CONFIG).exists() and not all(map(_left_by_a_kill, run_dir.iterdir())):
        raise OutputExistsError(f"{run_dir} exists and is not a run folder (no {CONFIG}): choose another path.")
    make_folder(run_dir)
    lock = run_dir / _LOCK
    fd = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
    locked = False
    try:
        _lock(fd, run_dir)
        locked = True
        yield
    finally:
        if locked and new and [p.name for p in run_dir.iterdir()] == [_LOCK]:
            lock.unlink()
            run_dir.rmdir()
        os.close(fd)


def _left_by_a_kill(path: Path) -> bool:
    """Whether that is all a run leaves behind that was killed before its first file, config.json, was whole."""
    return path.name == _LOCK or (path.name.startswith(f".{CONFIG}.") and path.suffix == ".tmp")


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a kill left of files that were being written. Only for the process that has claimed the folder."""
    for folder in (run_dir, run_dir / EVAL):
        for path in folder.glob(".*.tmp"):
            path.unlink()


def _lock(fd: int, run_dir: Path) -> None:
    try:
        locked = try_lock(fd)
    except BlockingIOError as e:
        raise ConfigError(f"another process is training in {run_dir}: wait for it, or choose another --run.") from e
    if not locked:
        log(f"warning: the file system of {run_dir} has no locks; make sure that no other process trains there.")


def check_config(
    run_dir: Path,
    job: TrainJob,
    steps_done: int,
    *,
    allow_change: bool,
    saved: dict[str, Any] | None = None,
    same_data: frozenset[str] = frozenset(),
) -> None:
    """Raise ConfigError, with the differences, when the folder belongs to a run of another config.

    saved: the job in the checkpoint that would be resumed from, which tells when config.json itself was edited.
    same_data: as the function of that name gives it.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return
    try:
        old = read_json(path)
        if not isinstance(old, dict):
            raise ValueError(f"it holds {type(old).__name__}, not an object")
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON of a run: {e}. Restore it, or choose another --run.") from e
    changes = changes_on_resume(old, job, steps_done, same_data)
    if saved is not None:
        changes += [line for line in changes_on_resume(saved, job, steps_done, same_data) if line not in changes]
    if not changes:
        return
    listed = "\n".join(f"  {line}" for line in changes)
    if not allow_change:
        raise ConfigError(
            f"{run_dir} is a run of another config. From its config to this one:\n{listed}\n"
            f"Choose another --run, restore the config, or insist with --allow-config-change."
        )
    log(f"warning: going on with a changed config, as allowed; this run is no longer that of one config:\n{listed}")


def same_data(run_dir: Path, job: TrainJob, fingerprints: Sequence[str]) -> frozenset[str]:
    """Which of "data" and "heldout" are, by their fingerprints, what the run had, wherever they lie now.

    fingerprints: of the sources, in the checkpoint that would be resumed from; without one the plan's are taken.
    """
    then: dict[str, list[Any]] = {"data": list(fingerprints), "heldout": []}
    with suppress(OSError, ValueError, KeyError, TypeError):  # of before there were fingerprints
        plan = read_json(run_dir / PLAN)
        then["heldout"] = [plan["heldout_sha256"]]
        then["data"] = then["data"] or [s["sha256"] for s in plan["sources"]]
    with suppress(OSError, ValueError, KeyError, TypeError):
        then["heldout"] = [read_json(run_dir / EVAL / HELDOUT_BEFORE)["sha256"]]
    now = {"data": [s.path for s in job.data.sources], "heldout": [job.heldout.path]}
    return frozenset(name for name, paths in now.items() if paths and [fingerprint(p) for p in paths] == then[name])


def warnings_told(run_dir: Path) -> tuple[str, ...]:
    """What earlier starts have warned of: the plan's warnings."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tuple(read_json(run_dir / PLAN)["warnings"])
    return ()


def describe(
    run_dir: Path,
    job: TrainJob,
    derived: Derived,
    model: ModelConfig,
    environment: dict[str, Any],
    *,
    done: int = 0,
    saved: dict[str, Any] | None = None,
    same_data: frozenset[str] = frozenset(),
) -> None:
    """Write config.json and plan.json where they differ, a line of starts.jsonl, and at the first step origin.json and
    env.json. What changed since an earlier start is said.

    done: steps that are kept of earlier starts. saved: the job in the checkpoint that they end with. same_data: which
    data are the same, if elsewhere.
    """
    plan = json.loads(to_json(asdict(derived) | {"state_bytes": derived.state_bytes, "model": encode(model)}))
    start = new_start(run_dir, job, plan, environment, done, saved, same_data)
    if done:  # before what it tells of is overwritten
        write_start(run_dir, start, finished=done >= job.num_steps)
    for name, content in ((CONFIG, start["config"]), (PLAN, plan)):
        if stored(run_dir / name) != content:
            write_json(run_dir / name, content)
    origin = getattr(job.init, "path", "")
    if origin and not (run_dir / ORIGIN).exists():  # a relative path is meant from here, which an export may not be
        write_json(run_dir / ORIGIN, {"path": str(Path(origin).absolute())})
    if not done:
        write_start(run_dir, start, finished=False)
    then = stored(run_dir / ENV) if done else None
    if then is None:
        write_json(run_dir / ENV, (first_environment(run_dir) if done else None) or environment)
        return
    for key in PLACE:
        if then.get(key) != environment.get(key):
            log(
                f"warning: this run began with {key} {then.get(key)}, now it is {environment.get(key)}: "
                f"its numbers may differ in the last bits from those of an uninterrupted run."
            )
