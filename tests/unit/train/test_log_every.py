"""train/loop.py with `log_every`: what a line stands for, and that a run is the same run however often it is logged."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import before_step, fingerprint, poison

from earthshine.checkpoint import run_store
from earthshine.data.loader import Loader
from earthshine.errors import ConfigError, DataError, InterruptedRunError, TrainingDivergedError
from earthshine.train import loop
from earthshine.train.job import CheckpointConfig, HeldoutConfig, TrainJob
from earthshine.train.loop import fit
from earthshine.train.metrics import MetricsFile, samples_digest
from earthshine.train.state import build_state
from earthshine.verify.checkpoints import verify_checkpoint

JobMaker = Callable[..., TrainJob]
OF_ITS_OWN_STEP = ("loss", "grad_norm", "lr", "total_tokens", "update_rms", "expert_load", "max_violation", "balance")
QUIET: dict[str, Any] = {"checkpoint": CheckpointConfig(every_steps=0), "heldout": HeldoutConfig()}


def steps(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def test_a_line_is_of_its_step_and_of_all_since_the_line_before(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_job(True, **QUIET), tmp_path / "each")
    capsys.readouterr()
    fit(make_job(True, **QUIET, log_every=4), tmp_path / "fourth")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("step ")] == [
        "4/6",
        "6/6",
    ]
    each, (fourth, last) = steps(tmp_path / "each"), steps(tmp_path / "fourth")
    assert (fourth["step"], fourth["steps"], last["step"], last["steps"]) == (4, 4, 6, 2)
    assert not any("steps" in record for record in each)
    for record in (fourth, last):
        assert set(record) - {"steps"} == set(each[0])
        assert {k: record[k] for k in OF_ITS_OWN_STEP} == {k: each[record["step"] - 1][k] for k in OF_ITS_OWN_STEP}
        assert record["tokens_per_second"] == record["tokens"] / record["seconds"]
    assert fourth["tokens"] == sum(record["tokens"] for record in each[:4])
    assert last["tokens"] == sum(record["tokens"] for record in each[4:])
    loader = build_state(
        make_job(True), torch.device("cpu"), torch.float32, None, trust=False, allow_config_change=False
    ).loader
    ids = [i for _ in range(4) for i in loader.next_step().sample_ids]
    assert fourth["samples"] == samples_digest(ids)
    assert fingerprint(tmp_path / "fourth") == fingerprint(tmp_path / "each")


def test_there_is_a_line_before_every_checkpoint_and_evaluation(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints at 2, 4, 6 and evaluations at 0, 3, 6; the run may be logged otherwise when it resumes."""
    fit(make_job(), tmp_path / "whole")
    fit(make_job(log_every=100), tmp_path / "run", stop_after=5)
    assert [(r["step"], r.get("steps", 1)) for r in steps(tmp_path / "run")] == [(2, 2), (3, 1), (4, 1), (5, 1)]
    fit(make_job(log_every=3), tmp_path / "run")
    assert [r["step"] for r in steps(tmp_path / "run")] == [2, 3, 4, 5, 6]
    assert "warning" not in capsys.readouterr().err
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_between_two_lines_loses_no_number(
    number: signal.Signals, make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(**QUIET, log_every=4)
    fit(job, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(InterruptedRunError, match="after step 2 of 6: saved"):
            fit(job, tmp_path / "run")
    assert [(r["step"], r["steps"]) for r in steps(tmp_path / "run")] == [(2, 2)]
    fit(job, tmp_path / "run")
    assert [(r["step"], r["steps"]) for r in steps(tmp_path / "run")] == [(2, 2), (4, 2), (6, 2)]
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_loss_that_is_not_finite_between_two_lines_is_refused(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 4, poison)
    with pytest.raises(TrainingDivergedError, match=r"the loss of step 4 is nan.*step-000002"):
        fit(make_job(log_every=6, checkpoint=CheckpointConfig(every_steps=2, keep=0)), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_the_steps_before_a_divergence_are_recorded(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where it is found in the step itself: of the steps since the last line there is one more."""
    fit(make_job(True, **QUIET, log_every=2), tmp_path / "whole")
    before_step(monkeypatch, 5, poison)
    with pytest.raises(TrainingDivergedError, match="the loss of step 5 is nan"):
        fit(make_job(True, **QUIET, log_every=6), tmp_path / "run")
    (line,), whole = steps(tmp_path / "run"), steps(tmp_path / "whole")[1]
    assert (line["step"], line["steps"]) == (4, 4) and line["total_tokens"] == whole["total_tokens"]
    known = ("loss", "grad_norm", "lr", "update_rms", "balance")
    assert [line[k] for k in known] == [whole[k] for k in known]
    assert "expert_load" not in line and line["tokens_per_second"] == line["tokens"] / line["seconds"]


def test_a_replay_is_logged_as_the_run_was(make_job: JobMaker, tmp_path: Path) -> None:
    """From checkpoint 4 to 6 with a line per step, although the folder's config says otherwise since."""
    fit(make_job(), tmp_path / "run")
    fit(make_job(log_every=7), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["log_every"] == 7
    proof = verify_checkpoint(tmp_path / "run", replay=True)
    assert proof["ok"] and any(row.get("note") == "2 steps" for row in proof["rows"])


@pytest.mark.parametrize("value", [0, -1])
def test_it_is_at_least_one(value: int, make_job: JobMaker) -> None:
    with pytest.raises(ConfigError, match=f"log_every={value} must be at least 1"):
        make_job(log_every=value)


def test_what_is_missing_of_the_steps_done_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "step", "step": 5, "steps": 5, "loss": 1.0})
    metrics.append({"kind": "step", "step": 6, "loss": 1.0})
    metrics.truncate_after(6)
    assert capsys.readouterr().err == ""
    metrics.truncate_after(8)
    assert "holds 6 of the 8 steps done" in capsys.readouterr().err


def test_a_step_is_read_while_the_one_before_is_computed(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the launch of a step and before its numbers are waited for; never beyond the last step."""
    events: list[str] = []
    fit(make_job(**QUIET, log_every=2), tmp_path / "whole")

    def told(module: Any, name: str, event: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            events.append(event)
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapped)

    told(loop.TrainState, "metadata", "save")
    told(loop, "train_step", "train")
    told(loop, "read", "wait")
    told(Loader, "_read", "load")
    fit(make_job(**QUIET, log_every=2, num_steps=6), tmp_path / "run", stop_after=4)
    assert events == ["load", *["train", "load", "train", "load", "wait"] * 2, "save"]
    events.clear()
    fit(make_job(**QUIET, log_every=2), tmp_path / "run")
    assert events == ["load", "train", "load", "train", "wait", "save"]
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
    assert [r["samples"] for r in steps(tmp_path / "run")] == [r["samples"] for r in steps(tmp_path / "whole")]


def test_data_that_goes_away_is_reported_by_the_step_that_needs_it(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before is recorded and, where a checkpoint is due, saved."""
    original = Loader._read

    def gone(self: Loader) -> Any:
        if self._steps == 4:
            raise DataError("shard-00000.bin went away")
        return original(self)

    monkeypatch.setattr(Loader, "_read", gone)
    with pytest.raises(DataError, match="went away"):
        fit(make_job(checkpoint=CheckpointConfig(every_steps=4)), tmp_path / "each")
    assert [r["step"] for r in steps(tmp_path / "each")] == [1, 2, 3, 4]
    assert run_store.latest(tmp_path / "each") is not None
    with pytest.raises(DataError, match="went away"):
        fit(make_job(**QUIET, log_every=6), tmp_path / "once")
    assert [(r["step"], r["steps"]) for r in steps(tmp_path / "once")] == [(4, 4)]
