"""train/claim.py: one run and one process per folder; and what a killed one left."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from earthshine.config import encode
from earthshine.errors import ConfigError, DataError, OutputExistsError
from earthshine.files import write_json
from earthshine.report.runs import read_run
from earthshine.train import claim as claim_module
from earthshine.train.claim import claim
from earthshine.train.job import CheckpointConfig, HeldoutConfig, TrainJob
from earthshine.train.loop import fit

JobMaker = Callable[..., TrainJob]


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    with claim(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another process is training in"), claim(tmp_path / "run"):
            pass
        (tmp_path / "run" / "config.json").write_text("{}")
    with claim(tmp_path / "run"):  # free again, and as it was
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "config.json"]


def test_a_new_folder_goes_again_when_nothing_came_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"), claim(tmp_path / "runs" / "mine" / "a"):
        raise ValueError("no data")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="no data"), claim(tmp_path / "runs" / "mine" / "a"):
        (tmp_path / "runs" / "b").mkdir()  # another run began
        raise ValueError("no data")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["runs", "runs/b"]


def test_an_empty_folder_is_used_and_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"), claim(tmp_path):
        raise ValueError("no data")
    assert tmp_path.exists()


def test_what_is_not_a_run_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"exists and is not a run folder"), claim(tmp_path):
        pass
    with pytest.raises(OutputExistsError, match=r"is a file"), claim(tmp_path / "thesis.txt"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_who_is_kept_out_of_a_new_folder_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that started together, the second must not remove the first one's folder and lock."""

    def other_was_faster(*_: object) -> None:
        raise ConfigError("another process is training")

    monkeypatch.setattr(claim_module, "take_lock", other_was_faster)
    with pytest.raises(ConfigError, match="another process"), claim(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / ".lock").exists()


def test_a_folder_of_a_run_that_was_killed_before_its_config_was_whole_is_used(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.k1ll3d.tmp").write_text("{")
    with claim(tmp_path), pytest.raises(ConfigError, match="another process is training in"), claim(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".config.json.k1ll3d.tmp", ".lock"]


def test_what_a_kill_left_goes_at_the_next_start(tmp_path: Path, make_job: JobMaker) -> None:
    """Also when nothing will be saved any more: files of an unfinished write, and one checkpoint too many."""
    run, job = tmp_path / "run", make_job(num_steps=2, checkpoint=CheckpointConfig(every_steps=1, keep=2))
    fit(job, run, device="cpu")
    checkpoints = sorted(p.name for p in (run / "checkpoints").iterdir())
    shutil.copytree(run / "checkpoints" / "step-000001", run / "checkpoints" / ".step-000000.old")
    (run / "checkpoints" / ".step-000003.tmp" / "tensors").mkdir(parents=True)
    (run / "eval").mkdir(exist_ok=True)
    for name in (".plan.json.x1.tmp", "eval/.heldout-after.json.x2.tmp", ".metrics.jsonl.x3.tmp"):
        (run / name).write_text("{")
    fit(job, run, device="cpu")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == checkpoints == ["step-000001", "step-000002"]
    assert not list(run.rglob("*.tmp"))
    fit(replace(job, checkpoint=CheckpointConfig(every_steps=1, keep=1)), run, device="cpu")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    "text", ["[1]", "{", "[" * 200_000, "\\udc80", "null"], ids=["list", "cut", "deep", "no text", "null"]
)
def test_a_damaged_json_file_of_a_run_is_one_clear_line(
    tmp_path: Path, make_job: JobMaker, heldout: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run, job = tmp_path / "run", make_job(num_steps=2, heldout=HeldoutConfig(path=str(heldout), max_sequences=2))
    fit(job, run, device="cpu")
    for name in ("eval/heldout-before.json", "eval/heldout-after.json", "plan.json", "env.json"):
        (run / name).write_text(text)
    assert fit(job, run, device="cpu").heldout_before == {}
    assert "heldout-before.json" in capsys.readouterr().err
    (run / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json is not the config of a run: .* Restore it"):
        fit(job, run, device="cpu")


@pytest.mark.parametrize("name", ["starts.jsonl", "metrics.jsonl", "plan.json"])
def test_a_folder_under_the_name_of_a_file_is_one_clear_line(tmp_path: Path, make_job: JobMaker, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=rf"{name} is a folder where a file of the run belongs: move it away"):
        fit(make_job(), tmp_path / "run")
    if name.endswith("jsonl"):
        with pytest.raises(DataError, match=rf"{name} cannot be read: Is a directory"):
            read_run(tmp_path / "run")


def test_a_file_under_the_name_of_a_folder_is_one_clear_line(tmp_path: Path, make_job: JobMaker) -> None:
    write_json(tmp_path / "config.json", encode(make_job()))
    (tmp_path / "eval").write_text("mine")
    with pytest.raises(OutputExistsError, match="eval is a file where a folder of the run belongs"):
        fit(make_job(), tmp_path)
