"""Files, written so that nothing half-written is ever visible; locks, hashes and free space."""

import errno
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from earthshine.console import human_bytes, log
from earthshine.errors import ConfigError, DiskFullError

_HASH_CHUNK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
# What file systems without flock answer: NFS without a lock daemon, Lustre mounted without it, FUSE; and EBADF where
# NFS turns it into a byte-range lock, which a directory cannot have.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EISDIR}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" or "quota exceeded" into a DiskFullError that names `path`."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        free = free_bytes(path)
        left = f" ({human_bytes(free)} free there)" if math.isfinite(free) else ""
        raise DiskFullError(
            f"{path} could not be written: the disk is full{left}. "
            f"Free some space or choose another folder, then run the same command again."
        ) from e


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` as that home folder, where there is one."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for an unknown user, and respells the rest


def sync_folder(folder: Path) -> None:
    """Make the names in a folder, as after a rename, survive a power loss, where its file system can do that."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Take an exclusive lock that the kernel releases however the process ends; False where there are no locks.

    Raises BlockingIOError when another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return False
    return True


def take_lock(fd: int, folder: Path, busy: str) -> None:
    """`try_lock`, or ConfigError with the message `busy`; a file system without locks is warned of."""
    try:
        locked = try_lock(fd)
    except BlockingIOError as e:
        raise ConfigError(busy) from e
    if not locked:
        log(f"warning: the file system of {folder} has no locks; make sure that no other process writes there.")


def make_folder(path: Path) -> None:
    """Make an output folder and those above it. Raises ConfigError where that is impossible, DiskFullError."""
    with naming_full_disk(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            if e.errno in _FULL:
                raise
            raise ConfigError(f"{path} cannot be made: {e.strerror} ({e.filename}). Choose another place.") from e


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a whole file, or leave what was there: temporary in the same folder, fsync, rename, fsync of the folder.

    Text is written as UTF-8, and surrogates (of file names in other encodings) as escapes. The folder is made when it
    is missing. Raises DiskFullError, naming `path`.
    """
    path = Path(path)
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Delete what `atomic_write` left in a folder when it was killed. Only for the process that alone writes there."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _umask() -> int:
    """The process's umask, which can only be read by setting it; mkstemp's files are 0600 whatever it is."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def to_json(value: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """`value` as JSON that any parser reads. JSON has no NaN and no infinity: such a number becomes null.

    Whoever writes a number that may be null says why beside it. Surrogates, of file names that are not UTF-8, are
    escaped. Keys keep their order.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as JSON (`to_json`, one space of indent) by `atomic_write`."""
    atomic_write(path, to_json(obj, indent=1) + "\n")


def append_line(path: Path, text: str | bytes) -> None:
    """Append one line by a single write, so that a kill leaves whole lines; when the disk is full, none of it stays.

    Not fsynced: a step's metrics are not worth a disk's latency. Raises DiskFullError, naming `path`.
    """
    raw = (text.encode(errors="backslashreplace") if isinstance(text, str) else text).rstrip(b"\n") + b"\n"
    path = Path(path)
    with naming_full_disk(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(fd).st_size
            try:
                written = os.write(fd, raw)
                if written < len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):  # the reason for the failure is the news, not that it cannot be undone
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex; constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> float:
    """Bytes that this user may still write where `path` is, or would be once it and its parents exist.

    Infinity where the file system does not say: some FUSE and network file systems report a size of 0 blocks.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    usage = os.statvfs(existing)
    return usage.f_bavail * usage.f_frsize if usage.f_blocks else math.inf


def require_space(path: Path, num_bytes: int, hint: str) -> None:
    """Raises DiskFullError unless `num_bytes` can still be written at `path`; `hint` says what to do about it."""
    free = free_bytes(path)
    if free < num_bytes:
        raise DiskFullError(f"{path} needs {human_bytes(num_bytes)}, but {human_bytes(free)} are free there. {hint}")


def write_speed(folder: Path, num_bytes: int = 64 << 20) -> float:
    """Bytes per second of one sequential write with fsync, measured now in a file that is removed again."""
    block = os.urandom(1 << 20)
    with naming_full_disk(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - start)
