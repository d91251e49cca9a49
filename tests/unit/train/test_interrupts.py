"""What a signal asks of a run: to save and stop; and that it cannot be lost by asking twice, or with the terminal."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_runs import JobMaker, before_step, fingerprint, records

from earthshine.errors import (
    InterruptedRunError,
)
from earthshine.train import loop
from earthshine.train.interrupts import Interrupts
from earthshine.train.loop import fit


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Whatever a test leaves, the handlers come back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_hangup_is_a_request_however_often_it_comes() -> None:
    with Interrupts() as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.name == "SIGHUP"


@pytest.mark.parametrize("order", [("SIGHUP", "SIGTERM"), ("SIGTERM", "SIGHUP")])
def test_a_hangup_beside_a_termination_is_one_request(order: tuple[str, str]) -> None:
    """A system that shuts down sends both; neither ends the process."""
    with Interrupts() as interrupts:
        for name in order:
            os.kill(os.getpid(), getattr(signal, name))
        assert interrupts.name == order[0]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one means it


def test_nohup_is_heeded() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupts.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_is_taken_where_it_cannot_be_confirmed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, fd: int) -> None:
            self._fd = fd

        def fileno(self) -> int:
            return self._fd

    reader, writer = os.pipe()
    os.close(reader)
    stream: Any
    for stream in (None, Broken(writer)):
        monkeypatch.setattr(sys, "__stderr__", stream)
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            assert interrupts.requested
    os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_command_resumes(
    number: signal.Signals, make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(moe=True)
    fit(job, tmp_path / "whole")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(
            InterruptedRunError, match=rf"{number.name} after step 3 of 6: saved in .*step-000003.*same command"
        ):
            fit(job, tmp_path / "run")
    assert InterruptedRunError.exit_code == 75
    assert signal.getsignal(number) is handler
    assert fit(job, tmp_path / "run").finished
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_signal_before_the_first_step_saves_step_zero(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop._evaluate_if_due

    def interrupted(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate_if_due", interrupted)
        with pytest.raises(InterruptedRunError, match="after step 0 of 6"):
            fit(make_job(), tmp_path / "run")
    assert fit(make_job(), tmp_path / "run").finished


def test_a_signal_while_the_run_is_opened_is_an_interruption(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_job(), tmp_path, stop_after=2)
    build = loop.build_state

    def slow(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return build(*args, **options)

    monkeypatch.setattr(loop, "build_state", slow)
    with pytest.raises(InterruptedRunError, match=r"SIGINT after step 2 of 6: saved in .*step-000002"):
        fit(make_job(), tmp_path)


def test_the_first_signal_asks_and_gives_the_second_its_default_back() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested and interrupts.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
