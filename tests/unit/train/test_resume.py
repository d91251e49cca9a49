"""train/resume.py: what may change between two starts of a run, and what makes it another run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from earthshine.config import decode, encode, override
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import ConfigError, DataError
from earthshine.files import write_json
from earthshine.optim.config import ScheduleConfig
from earthshine.train import loop
from earthshine.train.job import TrainJob
from earthshine.train.loop import fit
from earthshine.train.resume import changes_on_resume, check_config

JobMaker = Callable[..., TrainJob]


def test_changing_what_does_not_touch_the_mathematics_is_allowed(make_job: JobMaker) -> None:
    job = make_job()
    changes = [
        "name=other",
        "tracker=tensorboard",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        "heldout.every_steps=1",
        "recompute=block",
        "log_every=10",
    ]
    assert changes_on_resume(encode(job), override(job, changes), steps_done=3) == []


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "sequences_per_micro_batch=1",
        "optimizer.lr=0.1",
        "optimizer.qk_clip_threshold=100.0",
        "heldout.max_sequences=1",
        "data.document_attention=false",
        "init.model.rope_theta=1.0",
        "compute_dtype=bfloat16",
        "balance.coefficient=0.01",
        "balance.bias_rate=0.01",
        "capacity.factor=1.0",
        "compile=true",
        "num_steps=7",
    ],
)
def test_changing_the_mathematics_is_refused_with_the_difference(change: str, make_job: JobMaker) -> None:
    job = make_job()
    lines = changes_on_resume(encode(job), override(job, [change]), steps_done=4)
    assert len(lines) == 1 and lines[0].startswith(change.partition("=")[0] + ": ")


def test_a_run_may_be_lengthened_where_its_learning_rates_stay(make_job: JobMaker) -> None:
    constant = make_job(schedule=ScheduleConfig(kind="constant", warmup_steps=2))
    assert changes_on_resume(encode(constant), replace(constant, num_steps=60), steps_done=6) == []
    assert changes_on_resume(encode(constant), replace(constant, num_steps=5), steps_done=6)
    wsd = make_job(schedule=ScheduleConfig(kind="wsd", warmup_steps=1, decay_steps=2))
    assert changes_on_resume(encode(wsd), replace(wsd, num_steps=60), steps_done=4) == []
    assert changes_on_resume(encode(wsd), replace(wsd, num_steps=60), steps_done=6)


def test_a_folder_of_another_config_is_refused_with_all_differences(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    write_json(tmp_path / "config.json", encode(job))
    check_config(tmp_path, job, 0, allow_change=False)
    other = replace(job, seed=3, clip_grad_norm=0.5)
    with pytest.raises(
        ConfigError, match=r"(?s)different config.*clip_grad_norm: 1.0 -> 0.5\n  seed: 0 -> 3\n.*--allow-config"
    ):
        check_config(tmp_path, other, 0, allow_change=False)
    check_config(tmp_path, other, 0, allow_change=True)
    assert "seed: 0 -> 3" in capsys.readouterr().err


def test_a_config_that_is_not_json_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not the config of a run"):
        check_config(tmp_path, make_job(), 0, allow_change=True)


@pytest.fixture
def moved(shards: Path, heldout: Path, tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(shards, tmp_path / "moved")), Path(shutil.copytree(heldout, tmp_path / "moved-heldout"))


def at(job: TrainJob, data: Path, heldout: Path) -> TrainJob:
    sources = (SourceConfig(path=str(data)),)
    return replace(job, data=DataConfig(sources=sources), heldout=replace(job.heldout, path=str(heldout)))


@pytest.mark.parametrize("stop_after", [3, None])
def test_moved_data_are_the_same_run(
    make_job: JobMaker,
    moved: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int | None,
) -> None:
    """With a checkpoint and without: a run that was killed before its first save begins again."""
    job, run = make_job(), tmp_path / "run"
    if stop_after:
        fit(job, run, stop_after=stop_after)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_save", lambda run: exec("raise KeyboardInterrupt"))
            with pytest.raises(KeyboardInterrupt):
                fit(job, run)
    assert fit(at(job, *moved), run).finished
    assert json.loads((run / "config.json").read_text())["data"]["sources"][0]["path"] == str(moved[0])


def test_other_data_in_another_place_are_another_run(
    make_job: JobMaker,
    moved: tuple[Path, Path],
    shards: Path,
    heldout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit(make_job(), tmp_path / "run", stop_after=2)
    for data, other in ((heldout, heldout), (shards, shards)):
        with pytest.raises((ConfigError, DataError), match="(data.sources|heldout.path): "):
            fit(at(make_job(), data, other), tmp_path / "run")


def test_another_spelling_of_a_path_is_no_change(
    make_job: JobMaker, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    job = make_job()
    assert changes_on_resume(encode(job), at(job, Path(shards.name), Path(job.heldout.path)), steps_done=2) == []


def test_a_field_that_was_added_since_had_its_default(make_job: JobMaker) -> None:
    job = make_job()
    old = encode(job)
    del old["compile"], old["optimizer"]["weight_decay"], old["init"]["model"]["moe"]
    assert changes_on_resume(old, job, steps_done=2) == []
    assert changes_on_resume(old, replace(job, compile=True), steps_done=2) == ["compile: false -> true"]
    assert changes_on_resume({**encode(job), "gone": 1}, job, steps_done=2) == ['gone: 1 -> "(absent)"']


def test_a_run_that_was_saved_under_old_names_is_the_same_run(make_job: JobMaker) -> None:
    """Also as a job of its own, and where an override uses them."""
    capacity = ["capacity.factor=1.5", "capacity.relative_to=per_token"]
    job = override(make_job(True), ["optimizer.non_matrix=scion", "optimizer.comm_dtype=bfloat16", *capacity])
    older = encode(job)
    for old, new in (("rest", "non_matrix"), ("payload_dtype", "comm_dtype")):
        older["optimizer"][old] = older["optimizer"].pop(new)
    older["capacity"]["meaning"] = older["capacity"].pop("relative_to")
    assert changes_on_resume(older, job, 1) == []
    assert changes_on_resume(older, override(job, ["optimizer.rest=adamw"]), 1) == [
        'optimizer.non_matrix: "scion" -> "adamw"'
    ]
    changes = ["optimizer.rest=scion", "optimizer.payload_dtype=bfloat16", capacity[0], "capacity.meaning=per_token"]
    assert decode(TrainJob, older) == override(make_job(True), changes)
