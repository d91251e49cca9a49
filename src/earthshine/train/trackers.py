"""Adapters that show a run elsewhere. `metrics.jsonl` is always written; a tracker is an addition."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from earthshine.errors import MissingDependencyError


class Tracker(Protocol):
    """Told of each record that goes to `metrics.jsonl`."""

    def record(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """`tracker="none"`."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardTracker:
    """Scalars `kind/name` in `RUN/tensorboard`; after a resume the steps done again replace those of before."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def record(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record, record["kind"]):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(value: Mapping[str, Any], where: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += _scalars(item, f"{where}/{key}")
        elif isinstance(item, int | float) and not isinstance(item, bool) and key != "step":
            found.append((f"{where}/{key}", float(item)))
    return found


def require_tracker(kind: str) -> None:
    """Raise MissingDependencyError when the package of the tracker that a job names is not installed."""
    if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError(
            'tracker="tensorboard" needs the package tensorboard: pip install "earthshine[track]".'
        )


def make_tracker(kind: str, run_dir: Path, first_step: int) -> Tracker:
    """The tracker that a job names."""
    return TensorBoardTracker(run_dir, first_step) if kind == "tensorboard" else NoTracker()
