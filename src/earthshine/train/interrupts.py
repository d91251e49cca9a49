"""SIGTERM, SIGINT and SIGHUP as a request to stop after the step."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HANGUP = signal.SIGHUP


class Interrupts:
    """While entered, the first SIGTERM or SIGINT only sets `name`; a second one ends the process at once.

    SIGHUP sets it too, however often it comes: a terminal that is closed sends it twice, and a system that shuts down
    sends it beside SIGTERM. Where it is ignored (`nohup`) it stays ignored.

    Signals can only be handled from the main thread; in another one nothing is changed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            heeded = _SIGNALS if signal.getsignal(_HANGUP) == signal.SIG_IGN else (*_SIGNALS, _HANGUP)
            self._before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.name)
        self.name = self.name or signal.Signals(number).name
        if number != _HANGUP:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if again or sys.__stderr__ is None:
            return
        # os.write: what is interrupted may be in the middle of writing to the buffered stderr.
        with suppress(OSError, ValueError):  # a closed pipe, or a terminal that is gone
            text = f"{self.name}: will save and stop when this step is done\n"
            os.write(sys.__stderr__.fileno(), text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return bool(self.name)
