"""What would fail only after hours is found at the start: saves that cannot work, data read too often."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from whole_runs import JobMaker

from earthshine.checkpoint import run_store
from earthshine.checkpoint.manifest import key_path
from earthshine.config import encode
from earthshine.data.config import DataConfig
from earthshine.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    OutputExistsError,
)
from earthshine.files import write_json
from earthshine.model.config import ModelConfig
from earthshine.report.page import write_report
from earthshine.train import loop
from earthshine.train.derive import derive
from earthshine.train.job import CheckpointConfig, FromCheckpoint, FromHuggingFace, HeldoutConfig, Scratch
from earthshine.train.loop import fit


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: pytest.fail("a step was begun"))


@pytest.mark.usefixtures("no_step")
def test_no_place_for_the_key(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "blocked"))
    with pytest.raises(ConfigError, match=r"checkpoint.key, can be neither read nor made.*Set XDG_CONFIG_HOME"):
        fit(make_job(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_step")
def test_a_user_without_a_home(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match=r"no home folder\. Set XDG_CONFIG_HOME"):
        fit(make_job(), tmp_path / "run")


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000004"])
def test_a_name_that_is_taken_by_a_file(make_job: JobMaker, tmp_path: Path, name: str) -> None:
    job, folder = make_job(), tmp_path / "run"
    write_json(folder / "config.json", encode(job))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("in the way")
    with pytest.raises(ConfigError, match=rf"{name} is a file where a checkpoint's folder belongs"):
        fit(job, folder)


@pytest.mark.usefixtures("no_step")
def test_a_folder_that_cannot_be_written_to(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_store.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"run cannot hold checkpoints: .*Permission denied"):
        fit(make_job(), tmp_path / "run")


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=num_bytes, f_frsize=1, f_blocks=1))


@pytest.mark.usefixtures("no_step")
def test_no_room_for_one_checkpoint(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(DiskFullError, match=r"checkpoints needs 1.* MiB, but 1000 B are free there"):
        fit(make_job(checkpoint=CheckpointConfig(every_steps=0)), tmp_path / "run")


@pytest.mark.parametrize(
    ("every", "keep", "there", "most"), [(2, 2, 0, 3), (3, 5, 0, 2), (0, 1, 0, 0), (1, 0, 0, 6), (2, 1, 3, 0)]
)
def test_room_for_one_checkpoint_and_not_for_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: int,
    keep: int,
    there: int,
    most: int,
) -> None:
    """most: how many will lie there at once; 0 where there is room for them."""
    for step in range(1, there + 1):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    free(monkeypatch, 3 << 19)
    run_store.check_can_save(tmp_path, {}, saves=1 + (5 // every if every else 0), keep=keep)
    err = capsys.readouterr().err
    assert (f"{most} checkpoints of 1.0 MiB will be in" in err) == bool(most)
    assert bool(err) == bool(most)
    assert key_path().exists()


def test_a_run_that_is_done_needs_no_room(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(heldout=HeldoutConfig())
    fit(job, tmp_path)
    free(monkeypatch, 0)
    assert fit(job, tmp_path).finished


def test_epochs_are_planned_and_told(
    make_job: JobMaker,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job(heldout=HeldoutConfig(), num_steps=100, checkpoint=CheckpointConfig(every_steps=0))
    tokens = json.loads((shards / "index.json").read_text())["tokens"]
    epochs = 100 * 4 / ((tokens - 1) // 16)
    plan = derive(job)
    (use,) = plan.sources
    assert (use.path, use.tokens, use.epochs) == (str(shards), tokens, epochs)
    assert f"{epochs:.2f}" in next(line for line in plan.table().splitlines() if "epochs of" in line)
    assert [f"are read {epochs:.1f} times (epochs)" in w for w in plan.warnings] == [True]
    fit(job, tmp_path, stop_after=2)
    assert "(epochs): beyond about 4" in capsys.readouterr().err
    fit(job, tmp_path, stop_after=4)
    assert "warning" not in capsys.readouterr().err
    assert json.loads((tmp_path / "plan.json").read_text())["sources"][0]["epochs"] == epochs
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert f"| Epochs | {epochs * 4 / 100:.2f} |" in text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": None}, ConfigError),
        ({"seq_len": 2000}, ConfigError),
        ({"device": "gpu"}, ConfigError),
        ({"init": FromHuggingFace(path="nowhere")}, ConfigError),
        ({"init": FromCheckpoint(path="nowhere")}, ConfigError),
        ({"vocab": 32}, DataError),
        ({"heldout": HeldoutConfig(path="nowhere")}, DataError),
    ],
    ids=lambda p: str(p),
)
def test_what_cannot_start_leaves_no_folder(
    change: dict[str, Any],
    error: type[Exception],
    make_job: JobMaker,
    tmp_path: Path,
    micro_model: Callable[[bool], ModelConfig],
) -> None:
    changes, device = dict(change), change.get("device", "cpu")
    changes.pop("device", None)
    if "data" in changes:
        changes["data"] = DataConfig()
    if "vocab" in changes:
        changes["init"] = Scratch(model=replace(micro_model(False), vocab_size=changes.pop("vocab")))
    with pytest.raises(error):
        fit(make_job(**changes), tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_nothing_is_compiled(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match="compile=true needs a C\\+\\+ compiler, and 'no-such-compiler' was not found"
    ):
        fit(make_job(compile=True), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_a_run_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        fit(make_job(), tmp_path)


def test_many_processes_are_refused(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        fit(make_job(), tmp_path)
