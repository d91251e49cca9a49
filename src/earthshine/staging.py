"""A directory that becomes visible only when it is complete.

Conversions, exports, `prepare` and checkpoints write into a hidden sibling of their output, `.NAME.partial`, which is
synced and renamed at the end. A kill at any moment leaves the whole directory, or a hidden one that the next start
removes or resumes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from earthshine.config import diff, read_json
from earthshine.errors import ConfigError, OutputExistsError
from earthshine.files import (
    make_folder,
    naming_full_disk,
    remove_temporary_files,
    sync_folder,
    take_lock,
    write_json,
)

RESUME_FILE = "resume.json"


def staging_path(out_dir: Path) -> Path:
    """Where `out_dir` is written before it is complete."""
    return out_dir.parent / f".{out_dir.name}.partial"


@contextlib.contextmanager
def staged_directory(out_dir: Path, *, resume: dict[str, Any] | None = None, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling of `out_dir` to write into; on success it is synced and renamed to `out_dir`.

    On an error it is removed, so that nothing half-written stays. What a killed process left there is removed too,
    unless `resume`, a JSON-ready description of the work, equals that process's: then the caller finds it there and
    resumes the work; an interrupt, too, leaves it.

    replace: `out_dir` may exist and is deleted just before the rename. No lock is taken: the caller holds that of a
        folder around it.

    Raises OutputExistsError when `out_dir` exists; ConfigError when another process is writing it, or what is there
    belongs to other work; DiskFullError.
    """
    if not replace:
        require_absent(out_dir)
    staging = staging_path(out_dir)
    make_folder(staging)
    with contextlib.nullcontext() if replace else _locked(staging, out_dir):
        if resume is not None and _is_resumable(staging, resume):
            remove_temporary_files(staging)
        else:
            _empty(staging)
        try:
            with naming_full_disk(out_dir):
                if resume is not None:
                    write_json(staging / RESUME_FILE, resume)
                yield staging
                (staging / RESUME_FILE).unlink(missing_ok=True)
                sync_folder(staging)
                if not replace:
                    require_absent(out_dir, "it appeared while it was being written: remove it and try again")
                elif out_dir.exists():
                    discard(out_dir)
                staging.rename(out_dir)
                sync_folder(out_dir.parent)
        except BaseException as e:
            if resume is None or isinstance(e, Exception):  # an interrupt leaves what can be resumed
                shutil.rmtree(staging, ignore_errors=True)
            raise


def discard(directory: Path) -> None:
    """Delete a directory; a kill halfway leaves a hidden one, not half of it under its name."""
    hidden = directory.with_name(f".{directory.name}.old")
    directory.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Delete what a killed writer, or a kill during `discard`, left of the directories whose names match `pattern`.

    Only for the process that holds the lock of a folder around them.
    """
    for path in parent.glob(f".{pattern}"):
        _remove(path)


def require_absent(out_dir: Path, fix: str = "choose another output folder, or remove this one") -> None:
    """Raises OutputExistsError when there is anything at `out_dir`, if only a link to nowhere."""
    if os.path.lexists(out_dir):
        raise OutputExistsError(f"{out_dir} exists: {fix}.")


@contextlib.contextmanager
def _locked(staging: Path, out_dir: Path) -> Iterator[None]:
    """Hold a lock on the directory itself: it dies with the process, so a kill leaves nothing to clean up."""
    fd = os.open(staging, os.O_RDONLY)
    try:
        take_lock(fd, out_dir, f"{out_dir} is being written by another process; wait for it or stop it.")
        require_absent(out_dir)  # a writer that ended since we looked has put what we have locked there, or removed it
        if not staging.exists():
            raise ConfigError(f"another process has just given up writing {out_dir}; run the same command again.")
        yield
    finally:
        os.close(fd)


def _is_resumable(staging: Path, resume: dict[str, Any]) -> bool:
    try:
        saved = read_json(staging / RESUME_FILE)
    except (FileNotFoundError, ValueError):
        return False
    changes = diff(saved, json.loads(json.dumps(resume)))
    if changes:
        raise ConfigError(
            f"{staging} holds the unfinished output of other work ({'; '.join(changes[:5])}): "
            f"run that again to finish it, or remove the folder."
        )
    return True


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
