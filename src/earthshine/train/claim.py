"""One process per run folder: claim and lock it, and remove the temporary files that a killed process left."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from earthshine.errors import OutputExistsError
from earthshine.files import make_folder, remove_temporary_files, take_lock
from earthshine.run_folder import CONFIG, DAMAGED, ENV, EVAL, METRICS, ORIGIN, PLAN, STARTS

_LOCK = ".lock"


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it; a new one in which nothing was written is removed again, with
    the folders above it that were made for it.

    Raises ConfigError when another process trains there, OutputExistsError when it is not a run folder, or a
    name in it is taken by something else.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputExistsError(f"run folder {run_dir} is a file: choose another path.")
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]  # from the inside out
    if not made and not (run_dir / CONFIG).exists() and not all(map(_left_by_a_kill, run_dir.iterdir())):
        raise OutputExistsError(f"{run_dir} exists and is not a run folder (no {CONFIG}): choose another path.")
    _check_kinds(run_dir)
    make_folder(run_dir)
    lock = run_dir / _LOCK
    fd = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
    locked = False
    try:
        take_lock(fd, run_dir, f"another process is training in {run_dir}: wait for it, or choose another --run.")
        locked = True
        yield
    finally:
        if locked and made and [p.name for p in run_dir.iterdir()] == [_LOCK]:
            lock.unlink()
            with suppress(OSError):  # another run may have begun beside it
                for folder in made:
                    folder.rmdir()
        os.close(fd)


def _check_kinds(run_dir: Path) -> None:
    """Raise OutputExistsError for a folder under the name of a file that training writes, and the reverse."""
    for name in (CONFIG, PLAN, ENV, ORIGIN, STARTS, METRICS, DAMAGED):
        if (run_dir / name).is_dir():
            raise OutputExistsError(f"{run_dir / name} is a folder where a file of the run belongs: move it away.")
    if (run_dir / EVAL).is_file():
        raise OutputExistsError(f"{run_dir / EVAL} is a file where a folder of the run belongs: move it away.")


def _left_by_a_kill(path: Path) -> bool:
    """Whether a run leaves this file when it is killed before its first one, config.json, is complete."""
    return path.name == _LOCK or (path.name.startswith(f".{CONFIG}.") and path.suffix == ".tmp")


def remove_leftovers(run_dir: Path) -> None:
    """Delete the temporary files of interrupted writes. Only for the process that has claimed the folder."""
    for folder in (run_dir, run_dir / EVAL):
        remove_temporary_files(folder)
