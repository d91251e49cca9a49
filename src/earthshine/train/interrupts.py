"""SIGTERM and SIGINT as a request to stop after the step."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """While entered, the first SIGTERM or SIGINT only sets `name`; a second one ends the process at once.

    Signals can only be handled from the main thread; in another one nothing is changed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # os.write: what is interrupted may be in the middle of writing to the buffered stderr.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"{self.name}: saving and stopping as soon as this step is done\n".encode(),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.name)
