"""Adapters that show a run elsewhere, in addition to `metrics.jsonl`, which is always written."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from earthshine.console import log
from earthshine.errors import MissingDependencyError
from earthshine.run_folder import METRICS, TENSORBOARD


class Tracker(Protocol):
    """Receives each record that goes to `metrics.jsonl`."""

    def record(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """`tracker="none"`."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardTracker:
    """Scalars `kind/name` in `RUN/tensorboard`; after a resume the steps done again replace those of before.

    A write that fails turns it off, with a warning; it never stops the run.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run_dir / TENSORBOARD
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=first_step)

    def record(self, record: Mapping[str, Any]) -> None:
        def write() -> None:
            for name, value in _scalars(record, record["kind"]):
                self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()

        self._try(write)

    def close(self) -> None:
        self._try(lambda: self._writer.close())

    def _try(self, write: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            write()
        except Exception as e:  # a full disk, a folder that is gone, and whatever its thread passes on
            self._writer = None
            log(f"warning: {self._folder} gets no more records ({type(e).__name__}: {e}); {METRICS} has them all.")


def _scalars(value: Mapping[str, Any], where: str) -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            scalars += _scalars(item, f"{where}/{key}")
        elif isinstance(item, int | float) and not isinstance(item, bool) and key != "step":
            scalars.append((f"{where}/{key}", float(item)))
    return scalars


def require_tracker(kind: str) -> None:
    """Raise MissingDependencyError when the package of the tracker that a job names is not installed."""
    if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError(
            'tracker="tensorboard" needs the package tensorboard: pip install "earthshine[track]".'
        )


def make_tracker(kind: str, run_dir: Path, first_step: int) -> Tracker:
    """The tracker that a job names."""
    return TensorBoardTracker(run_dir, first_step) if kind == "tensorboard" else NoTracker()
