"""What a signal asks of a run: to save and stop; and that it cannot be lost by asking twice, or with the terminal."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from earthshine.train.interrupts import Interrupts


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
