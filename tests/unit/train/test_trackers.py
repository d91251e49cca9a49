"""train/trackers.py."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from earthshine.errors import MissingDependencyError
from earthshine.train import trackers
from earthshine.train.job import TrainJob
from earthshine.train.loop import fit


def test_numbers_become_scalars_and_the_rest_is_left_out() -> None:
    record = {
        "kind": "step",
        "step": 3,
        "loss": 1.5,
        "samples": "abc",
        "update_rms": {"muon": 0.2},
        "load": {"1": [0.5]},
    }
    assert trackers._scalars(record, "step") == [("step/loss", 1.5), ("step/update_rms/muon", 0.2)]


def test_no_tracker_is_silent(tmp_path: Path) -> None:
    tracker = trackers.make_tracker("none", tmp_path, 1)
    tracker.record({"kind": "step", "step": 1})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra_before_anything_is_made(
    make_job: Callable[..., TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"earthshine\[track\]"):
        fit(make_job(tracker="tensorboard"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Writer:
    """Stands in for tensorboard's SummaryWriter, which the development set-up need not have."""

    made: list["Writer"] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        """As the real one."""

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_told_each_record(
    make_job: Callable[..., TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(trackers, "require_tracker", lambda _: None)
    monkeypatch.setattr("earthshine.train.loop.require_tracker", lambda _: None)
    Writer.made.clear()
    job = make_job(tracker="tensorboard")
    fit(job, tmp_path / "run", stop_after=2)
    fit(job, tmp_path / "run", stop_after=4)
    first, second = Writer.made
    assert first.folder == str(tmp_path / "run" / "tensorboard")
    assert (first.purge_step, second.purge_step) == (1, 3) and first.closed and second.closed
    names = {name for name, _, _ in first.scalars}
    assert {"step/loss", "step/lr", "step/update_rms/muon", "heldout/bits_per_byte"} <= names
    assert {step for name, _, step in second.scalars if name == "step/loss"} == {3, 4}


@pytest.mark.parametrize("fails", ["add_scalar", "flush", "close"])
def test_a_tracker_that_fails_ends_no_run(
    make_job: Callable[..., TrainJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("Failing", (Writer,), {fails: full})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("earthshine.train.loop.require_tracker", lambda _: None)
    assert fit(make_job(tracker="tensorboard", num_steps=2), tmp_path / "run").finished
    assert capsys.readouterr().err.count("tensorboard gets no more records (OSError: [Errno 28]") == 1
