"""A directory is visible complete or not at all."""

import errno
import fcntl
import os

import pytest

from earthshine.errors import ConfigError, OutputExistsError
from earthshine.staging import staged_directory, staging_path


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


def test_an_interrupt_leaves_what_can_be_continued(tmp_path):
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


def test_without_locks_the_work_is_done_and_said(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr("fcntl.flock", fails)
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"
    assert "has no locks" in capsys.readouterr().err
