"""Files: nothing half-written is visible, and a full disk is said to be full."""

import errno
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from earthshine import files
from earthshine.errors import DiskFullError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    files.atomic_write(path, "first, longer text")
    files.atomic_write(path, "zweiter: ä")
    assert path.read_bytes() == "zweiter: ä".encode()
    files.atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["a.txt"]


def test_atomic_write_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_no_json_holds_what_json_has_not(tmp_path):
    """NaN and infinities become null at any depth; Python's own reader would take them, others do not."""
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [1.5, -inf, {"c": (inf, None, True)}], "d": "NaN", "e": 2}
    expected = {"a": None, "b": [1.5, None, {"c": [None, None, True]}], "d": "NaN", "e": 2}

    def refuse(word: str) -> None:
        raise ValueError(word)

    files.write_json(tmp_path / "a.json", value)
    for text in (files.to_json(value), (tmp_path / "a.json").read_text()):
        assert json.loads(text, parse_constant=refuse) == expected
    assert math.isnan(value["a"])  # what was given is left as it is


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    with pytest.raises(DiskFullError, match=r"a\.json could not be written: the disk is full \(.* free there\)"):
        files.atomic_write(path, "new")
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "old"


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        files.atomic_write(tmp_path / "file" / "a", "x")


def test_a_device_that_is_full_is_named():
    """/dev/full refuses every write as a full disk does."""
    with pytest.raises(DiskFullError, match="/dev/full"):
        files.append_line(Path("/dev/full"), "x")


def test_append_line_takes_back_a_line_cut_short(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, "one")
    files.append_line(path, "two\n")
    whole_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole_write(fd, data[:3]))
    with pytest.raises(DiskFullError):
        files.append_line(path, "three")
    assert path.read_text() == "one\ntwo\n"


def test_write_json_keeps_the_order_of_keys(tmp_path):
    files.write_json(tmp_path / "a.json", {"z": 1, "a": ["é"]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "z": 1,\n "a": [\n  "é"\n ]\n}\n'


def test_sha256_of_more_than_one_chunk(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_write_speed_leaves_nothing(tmp_path):
    assert files.write_speed(tmp_path, num_bytes=1 << 20) > 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["", "run", "new/deeper/run"])
@pytest.mark.parametrize(
    ("num_bytes", "error"),
    [
        (0, None),
        (3 << 20, None),
        ((3 << 20) + 1, r"needs 3.0 MiB, but 3.0 MiB are free there\. Lower keep\."),
        (1 << 40, r"needs 1.0 TiB, but 3.0 MiB are free there"),
        (-1, None),  # what is there already is more than what is needed
    ],
)
def test_space_is_required_before_it_is_used(tmp_path, monkeypatch, where, num_bytes, error):
    """Of the file system that the path is on, or will be; what root alone may use (f_bfree) does not count."""
    asked = []

    def statvfs(path):
        asked.append(path)
        return SimpleNamespace(f_bavail=3 << 10, f_frsize=1 << 10, f_blocks=1 << 40, f_bfree=1 << 40, f_bsize=1 << 20)

    monkeypatch.setattr(os, "statvfs", statvfs)
    path = tmp_path / where
    if error is None:
        files.require_space(path, num_bytes, "Lower keep.")
    else:
        with pytest.raises(DiskFullError, match=re.escape(str(path)) + " " + error):
            files.require_space(path, num_bytes, "Lower keep.")
    assert set(asked) == {tmp_path}


def test_a_file_system_that_does_not_say_its_size_is_no_full_disk(tmp_path, monkeypatch):
    """Some FUSE file systems, and /proc, answer with zeros."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0))
    files.require_space(tmp_path, 1 << 40, "")
    with pytest.raises(DiskFullError, match="the disk is full\\. Free some"), files.naming_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "ENOSYS", "EBADF"])
def test_a_file_system_without_locks_is_told_apart_from_a_lock_that_is_held(tmp_path, monkeypatch, code):
    """NFS without a lock daemon, Lustre without `-o flock`, a FUSE file system, a directory on NFS."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert files.try_lock(fd)
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            files.try_lock(other)
        os.close(other)

        def fails(*_):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

        monkeypatch.setattr("fcntl.flock", fails)
        assert not files.try_lock(fd)
        monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
        with pytest.raises(OSError, match="input/output error"):
            files.try_lock(fd)
    finally:
        os.close(fd)


def test_a_folder_whose_file_system_cannot_sync_it_is_written_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.atomic_write(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
