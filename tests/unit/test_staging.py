"""A directory is visible complete or not at all."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from earthshine.errors import ConfigError, DiskFullError, OutputExistsError
from earthshine.staging import remove_leftovers, staged_directory, staging_path


def test_appears_only_when_complete(tmp_path):
    out = tmp_path / "new" / "out"
    with staged_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("resume", [None, {"job": 1}])
def test_an_error_leaves_nothing(tmp_path, resume):
    with pytest.raises(ValueError, match="bad"), staged_directory(tmp_path / "out", resume=resume) as staging:
        (staging / "a").write_text("1")
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_what_can_be_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_directory(out, resume={"job": 1}) as staging:
        (staging / "a").write_text("1")
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="job: 1 -> 2"), staged_directory(out, resume={"job": 2}):
        pass
    assert (staging_path(out) / "a").is_file(), "other work's refusal destroyed it"
    with staged_directory(out, resume={"job": 1}) as staging:
        assert (staging / "a").read_text() == "1"
    assert [p.name for p in out.iterdir()] == ["a"]


def test_what_is_resumed_has_no_temporary_files(tmp_path):
    """A kill inside `atomic_write` leaves one; it would be in the finished directory for good."""
    staging = staging_path(tmp_path / "out")
    staging.mkdir()
    (staging / "resume.json").write_text('{"job": 1}')
    (staging / "a").write_text("1")
    (staging / ".config.json.x1y2.tmp").write_text("half")
    with staged_directory(tmp_path / "out", resume={"job": 1}):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_without_a_key_leftovers_are_not_trusted(tmp_path):
    out = tmp_path / "out"
    (staging_path(out) / "sub").mkdir(parents=True)
    (staging_path(out) / "half").write_text("x")
    with staged_directory(out, resume={"job": 1}) as staging:
        assert list(staging.iterdir()) == [staging / "resume.json"]
    assert not list(out.iterdir())


def test_an_existing_output_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists"), staged_directory(tmp_path / "out"):
        pass


def test_one_who_owns_the_folder_replaces_what_is_there(tmp_path):
    """A checkpoint that is damaged: it stays until the new one is whole, and no lock of its own is needed."""
    out = tmp_path / "step-000001"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(ValueError, match="bad"), staged_directory(out, replace=True) as staging:
        raise ValueError("bad")
    assert (out / "old").exists()
    with staged_directory(out, replace=True) as staging:
        (staging / "new").write_text("2")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("killed_at", ["before the discard", "in the discard", "after the discard"])
def test_a_kill_while_replacing_leaves_no_half_directory_under_the_name(tmp_path, monkeypatch, killed_at):
    class Killed(BaseException):
        """At which nothing is cleaned up."""

    def killed(*_, **__):
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a dead process removes nothing
        raise Killed

    out = tmp_path / "step-000001"
    out.mkdir()
    (out / "old").write_text("1")
    rename = Path.rename
    if killed_at == "before the discard":
        monkeypatch.setattr(Path, "rename", killed)
    elif killed_at == "in the discard":
        monkeypatch.setattr("shutil.rmtree", killed)
    else:
        monkeypatch.setattr(Path, "rename", lambda a, b: killed() if a == staging_path(out) else rename(a, b))
    with pytest.raises(Killed), staged_directory(out, replace=True) as staging:
        (staging / "new").write_text("2")
    monkeypatch.undo()
    left = [p.name for p in out.iterdir()] if out.exists() else None
    assert left == (["old"] if killed_at == "before the discard" else None)
    (tmp_path / "step-000002").mkdir()
    remove_leftovers(tmp_path, "step-*")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"] * (left is not None) + ["step-000002"]


def test_a_link_without_a_target_is_an_output_that_exists(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="exists"), staged_directory(tmp_path / "out"):
        pass


def test_a_full_disk_names_the_output(tmp_path):
    with pytest.raises(DiskFullError, match="out could not be written"), staged_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_two_writers_exclude_each_other(tmp_path):
    out = tmp_path / "out"
    staging_path(out).mkdir()
    fd = os.open(staging_path(out), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process"), staged_directory(out):
        pass
    os.close(fd)
    with staged_directory(out):
        pass


@pytest.mark.parametrize("ended", ["complete", "failed"])
def test_a_writer_that_ends_between_the_look_and_the_lock(tmp_path, monkeypatch, ended):
    """The lock is then on what is no longer the hidden directory."""
    out = tmp_path / "out"

    def locked_after(*_):
        staging_path(out).rename(out) if ended == "complete" else staging_path(out).rmdir()

    monkeypatch.setattr("earthshine.staging.take_lock", locked_after)
    message = "out exists" if ended == "complete" else "run the same command again"
    with pytest.raises(ConfigError, match=message), staged_directory(out):
        raise AssertionError("two at once")
    assert out.exists() == (ended == "complete")


def test_without_locks_the_work_is_done_and_reported(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr("fcntl.flock", fails)
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"
    assert "has no locks" in capsys.readouterr().err
