"""starts.jsonl: a run that resumed with another config, elsewhere or by another version is told as it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from earthshine.checkpoint.export import export
from earthshine.config import encode
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.report.facts import compute_done
from earthshine.report.page import write_report
from earthshine.report.runs import read_run
from earthshine.report.starts import change_words
from earthshine.run_folder import json_lines, start_lines
from earthshine.train import loop
from earthshine.train.derive import derive
from earthshine.train.job import CheckpointConfig, FromHuggingFace, HeldoutConfig, TrainJob, model_config
from earthshine.train.loop import fit
from earthshine.train.starts import record_start
from earthshine.verify.checkpoints import verify_checkpoint

JobMaker = Callable[..., TrainJob]


def starts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def fields(start: dict[str, Any], part: str) -> dict[str, tuple[Any, Any]]:
    return {change["field"]: (change["from"], change["to"]) for change in start["changes"][part]}


@pytest.fixture
def job(make_job: JobMaker) -> TrainJob:
    constant = ScheduleConfig(kind="constant")
    return make_job(schedule=constant, heldout=HeldoutConfig(), checkpoint=CheckpointConfig(every_steps=2, keep=0))


def test_a_changed_config_is_told(job: TrainJob, tmp_path: Path) -> None:
    """Old value and new, from which step on, and what followed: config.json alone would say that it always was so."""
    other = replace(
        job,
        optimizer=replace(job.optimizer, lr=5e-2, weight_decay=0.0, ns_steps=2),
        checkpoint=CheckpointConfig(every_steps=3, keep=0),
    )
    fit(job, tmp_path, device="cpu", stop_after=4)
    fit(other, tmp_path, device="cpu", allow_config_change=True)
    first, second = starts(tmp_path)
    assert first["first_step"] == 1 and first["config"] == encode(job) and not any(first["changes"].values())
    assert second["first_step"] == 5 and second["config"] == encode(other)
    assert fields(second, "config") == {
        "optimizer.lr": (5e-3, 5e-2),
        "optimizer.weight_decay": (0.1, 0.0),
        "optimizer.ns_steps": (0, 2),
        "checkpoint.every_steps": (2, 3),
    }
    assert second["another_run"] == ["optimizer.lr", "optimizer.ns_steps", "optimizer.weight_decay"]
    flops = [s["plan"]["newton_schulz_flops_per_step"] for s in (first, second)]
    assert fields(second, "plan")["newton_schulz_flops_per_step"] == tuple(flops) and flops[0] > flops[1]
    assert second["plan"] == json.loads((tmp_path / "plan.json").read_text())
    page = write_report([tmp_path])
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert "From step 5 config:" in text and "0.005 from step 1, 0.05 from step 5" in text
        assert "these commands repeat it" not in text and "do not repeat micro" in text
    told = json.loads(page.with_suffix(".json").read_text())["runs"][0]
    assert [s["first_step"] for s in told["starts"]] == [1, 5]
    assert {"field": "optimizer.lr", "before": 0.005, "now": 0.05} in told["starts"][1]["config"]
    assert page.read_text().count('class="c0 mark"') > 3  # in the curves
    assert compute_done(read_run(tmp_path), "newton_schulz") == 4 * flops[0] + 2 * flops[1]
    export(tmp_path, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| Changed mid-run | From step 5 config: `checkpoint.every_steps` 2" in card
    export(tmp_path / "checkpoints" / "step-000004", tmp_path / "hf4")  # from before the change
    assert "Changed mid-run" not in (tmp_path / "hf4" / "README.md").read_text()


def test_a_run_that_was_only_interrupted_repeats(job: TrainJob, tmp_path: Path) -> None:
    """What may change on resume is told, and does not make it another run. A finished run adds nothing."""
    fit(job, tmp_path, device="cpu", stop_after=3)
    plan = (tmp_path / "plan.json").stat().st_mtime_ns
    fit(job, tmp_path, device="cpu", stop_after=4)
    assert (tmp_path / "plan.json").stat().st_mtime_ns == plan  # not written again
    longer = replace(job, num_steps=8)
    fit(longer, tmp_path, device="cpu")
    fit(longer, tmp_path, device="cpu")
    assert [s["first_step"] for s in starts(tmp_path)] == [1, 4, 5]
    last = starts(tmp_path)[-1]
    assert fields(last, "config") == {"num_steps": (6, 8)} and last["another_run"] == []
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert "these commands repeat it" in text and "From step 5 config: `num_steps` 6" in text


def test_another_environment_is_told(job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(job, tmp_path, device="cpu", stop_after=3)
    environment = loop.environment

    def elsewhere(device: Any) -> dict[str, Any]:
        place = environment(device)
        return place | {"threads": 64, "versions": place["versions"] | {"torch": "9.9"}, "memory_bytes": 1}

    monkeypatch.setattr(loop, "environment", elsewhere)
    fit(job, tmp_path, device="cpu")
    second = starts(tmp_path)[1]
    assert {name: to for name, (_, to) in fields(second, "environment").items()} == {
        "threads": 64,
        "versions.torch": "9.9",
    }
    assert second["environment"]["threads"] == 64 and second["changes"]["config"] == []
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert "From step 4 environment: `threads`" in text
    assert "micro resumed in another environment: last bits may differ" in text


def test_steps_that_are_done_again_count_as_the_last_start_did_them(job: TrainJob, tmp_path: Path) -> None:
    """Of two starts after step 4, the first of which left no checkpoint, the second one is the run's."""
    tried = replace(job, clip_grad_norm=0.5)
    fit(job, tmp_path, device="cpu", stop_after=4)
    fit(tried, tmp_path, device="cpu", stop_after=6, allow_config_change=True)
    for folder in (tmp_path / "checkpoints").glob("step-000006*"):
        folder.rename(tmp_path / "gone")
    fit(replace(job, clip_grad_norm=0.25), tmp_path, device="cpu", allow_config_change=True)
    assert [s["first_step"] for s in starts(tmp_path)] == [1, 5, 5]
    assert fields(starts(tmp_path)[2], "config") == {"clip_grad_norm": (1.0, 0.25)}  # against the steps that were kept
    text = write_report([tmp_path]).with_suffix(".md").read_text()
    assert "`clip_grad_norm` 1.0 \u2192 0.25" in text and "0.5" not in change_words(read_run(tmp_path).starts[1])


def test_a_run_that_begins_anew_has_no_past(job: TrainJob, tmp_path: Path) -> None:
    """Without a checkpoint no step is kept: neither is what was told of it."""
    fit(job, tmp_path, device="cpu", stop_after=2)
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    fit(replace(job, clip_grad_norm=0.25), tmp_path, device="cpu", stop_after=2, allow_config_change=True)
    (only,) = starts(tmp_path)
    assert only["first_step"] == 1 and only["config"]["clip_grad_norm"] == 0.25 and not any(only["changes"].values())


def test_a_folder_of_before_there_were_starts(job: TrainJob, tmp_path: Path) -> None:
    fit(job, tmp_path, device="cpu", stop_after=3)
    (tmp_path / "starts.jsonl").unlink()
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"parameters": 1}))  # as another version counted
    fit(replace(job, optimizer=OptimizerConfig(lr=1.0, ns_dtype="float32")), tmp_path, allow_config_change=True)
    (only,) = starts(tmp_path)
    assert only["first_step"] == 4 and fields(only, "config") == {"optimizer.lr": (5e-3, 1.0)}
    assert fields(only, "plan")["parameters"] == (1, plan["parameters"])
    assert "From step 4 config: `optimizer.lr` 0.005" in write_report([tmp_path]).with_suffix(".md").read_text()


def test_damaged_files_of_the_folder_are_written_anew(
    job: TrainJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the plan says follows from the config, and where the run began is in its first start."""
    fit(job, tmp_path, device="cpu", stop_after=3)
    whole = {name: (tmp_path / name).read_bytes() for name in ("plan.json", "env.json")}
    for name in whole:
        (tmp_path / name).write_bytes(whole[name][:-20])
    capsys.readouterr()
    fit(job, tmp_path, device="cpu")
    err = capsys.readouterr().err
    for name, text in whole.items():
        assert json.loads((tmp_path / name).read_bytes()) == json.loads(text)
        assert f"{name} is damaged" in err
    assert not any(starts(tmp_path)[1]["changes"].values())


def test_an_infinite_option_resumes(job: TrainJob, tmp_path: Path) -> None:
    """JSON has no infinity: config, checkpoint and starts keep it as text."""
    schatten = replace(job, optimizer=replace(job.optimizer, norm="schatten", schatten_p=float("inf")))
    fit(schatten, tmp_path, device="cpu", stop_after=2)
    fit(schatten, tmp_path, device="cpu", stop_after=3)
    for path in tmp_path.rglob("*.json*"):
        assert "Infinity" not in path.read_text()
    assert starts(tmp_path)[1]["changes"]["config"] == []


def test_a_replay_does_not_pass_by_what_is_lost(job: TrainJob, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(job, run, device="cpu", stop_after=4)
    assert verify_checkpoint(run, replay=True)["ok"]
    (run / "metrics.jsonl").unlink()
    proof = verify_checkpoint(run, replay=True)
    bad = [r for r in proof["rows"] if not r["ok"]]
    assert [r["measured"] for r in bad] == [2, 2, 2, 2] and "2 of which metrics.jsonl has lost" in bad[0]["note"]


def test_a_start_of_another_shape_stops_neither_resume_nor_report(job: TrainJob, tmp_path: Path) -> None:
    fit(job, tmp_path / "run", device="cpu", stop_after=2)
    odd = {"first_step": 1, "config": 3, "plan": [4], "environment": "here"}
    (tmp_path / "run/starts.jsonl").write_text(json.dumps(odd) + "\n")
    fit(job, tmp_path / "run", device="cpu", stop_after=4)
    changes = {"config": [{"field": "optimizer.lr", "from": "fast", "to": 0.1}]}
    (tmp_path / "run/starts.jsonl").write_text(json.dumps({"first_step": 3, "changes": changes}) + "\n")
    assert "fast from step 1" in write_report([tmp_path / "run"]).with_suffix(".md").read_text()


def test_another_place_is_reported_and_the_first_one_kept(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    record_start(tmp_path, job, derive(job), model_config(job), {"threads": 2, "cpu": "a"})
    record_start(tmp_path, job, derive(job), model_config(job), {"threads": 2, "cpu": "a"}, done=1)
    assert capsys.readouterr().err == ""
    record_start(tmp_path, job, derive(job), model_config(job), {"threads": 4, "cpu": "a"}, done=1)
    assert "this run began with threads 2, now it is 4" in capsys.readouterr().err
    assert '"threads": 2' in (tmp_path / "env.json").read_text()


def test_where_the_weights_began_is_kept_whole(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is meant from the folder of the first start; a later start may be from another."""
    scratch = make_job()
    model, warm = model_config(scratch), replace(scratch, init=FromHuggingFace(path="models/a"))
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    record_start(other, scratch, derive(scratch), model, {})
    assert not (other / "origin.json").exists()
    record_start(run, warm, derive(scratch), model, {})
    monkeypatch.chdir(other)
    record_start(run, warm, derive(scratch), model, {})
    assert json.loads((run / "origin.json").read_text()) == {"path": str(tmp_path / "models" / "a")}


def test_a_start_holds_only_what_differs_from_the_one_before(job: TrainJob, tmp_path: Path) -> None:
    """Many short starts stay small; whoever reads them has each one whole. After a damaged line one is whole again."""
    constant = replace(job, num_steps=8)
    for step in range(1, 5):
        fit(constant, tmp_path, device="cpu", stop_after=step)
    path = tmp_path / "starts.jsonl"
    sizes = [len(line) for line in path.read_bytes().splitlines()]
    assert sizes[0] > 3000 and all(size < 200 for size in sizes[1:])
    fit(replace(constant, log_every=2), tmp_path, device="cpu", stop_after=5)
    last = starts(tmp_path)[-1]
    assert last["config"]["log_every"] == 2 and not {"plan", "environment"} & set(last)
    assert fields(last, "config") == {"log_every": (1, 2)}
    whole = [line.record for line in start_lines(path)]
    assert [s and s["config"]["log_every"] for s in whole] == [1, 1, 1, 1, 2]
    assert all(s and s["plan"] == json.loads((tmp_path / "plan.json").read_text()) for s in whole)
    path.write_bytes(path.read_bytes()[:-20] + b"\n")
    fit(constant, tmp_path, device="cpu", stop_after=6)
    assert starts_after_damage(path)["config"] == encode(constant) and "plan" in starts_after_damage(path)


def starts_after_damage(path: Path) -> dict[str, Any]:
    *_, damaged, last = json_lines(path)
    assert damaged.record is None and last.record is not None
    return last.record
