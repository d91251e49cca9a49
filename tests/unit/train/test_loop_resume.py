"""train/loop.py: a resumed run is the run that was interrupted, or it is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_runs import JobMaker, before_step, fingerprint, records

from earthshine.checkpoint import run_store
from earthshine.checkpoint.hf import save_model
from earthshine.config import encode
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
)
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train.job import FromHuggingFace, HeldoutConfig, Scratch
from earthshine.train.loop import fit


def test_recomputation_may_begin_in_the_middle_and_changes_no_bit(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(True), tmp_path / "whole")
    fit(make_job(True), tmp_path / "cut", stop_after=3)
    fit(make_job(True, recompute="block"), tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "stop"), [("dense", 3), ("moe", 1), ("moe", 5), ("moonlight", 3)])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    kind: str, stop: int, make_job: JobMaker, tmp_path: Path, moonlight_model: ModelConfig
) -> None:
    """The router's bias, which no optimizer holds, included."""
    job = make_job(kind == "moe", **({"init": Scratch(model=moonlight_model)} if kind == "moonlight" else {}))
    fit(job, tmp_path / "whole")
    assert not fit(job, tmp_path / "cut", stop_after=stop).finished
    torch.manual_seed(123)  # whatever else the process did
    assert fit(job, tmp_path / "cut").finished
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    biases = [t for name, t in run_store.load_model_state(tmp_path / "cut")[1].items() if name.endswith("bias_E")]
    assert len(biases) == (kind == "moonlight") and all(bias_E.any() for bias_E in biases)


def test_a_finished_run_stays_as_it_is(make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = fit(make_job(), tmp_path)
    capsys.readouterr()
    assert fit(make_job(), tmp_path) == first
    assert "all 6 steps are done" in capsys.readouterr().err


def test_another_config_is_refused_and_can_be_insisted_on(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(), tmp_path, stop_after=2)
    other = make_job(optimizer=OptimizerConfig(lr=5e-3, ns_dtype="float32", weight_decay=0.0))
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay: 0.1 -> 0.0"):
        fit(other, tmp_path)
    assert fit(other, tmp_path, allow_config_change=True).finished
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["weight_decay"] == 0.0


def test_a_config_that_was_edited_in_the_run_folder_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    """`train RUN/config.json --run RUN` is how a run is continued: the checkpoint knows what it was made with."""
    fit(make_job(), tmp_path, stop_after=2)
    other = replace(make_job(), clip_grad_norm=0.0)
    (tmp_path / "config.json").write_text(json.dumps(encode(other)))
    with pytest.raises(ConfigError, match=r"clip_grad_norm: 1.0 -> 0.0"):
        fit(other, tmp_path)


def test_another_model_is_refused_even_so(
    make_job: JobMaker, tmp_path: Path, micro_model: Callable[[bool], ModelConfig]
) -> None:
    fit(make_job(), tmp_path, stop_after=2)
    other = make_job(init=Scratch(model=replace(micro_model(False), intermediate_size=32)))
    with pytest.raises(ConfigError, match=r"holds another model: init.model.intermediate_size: 24 -> 32"):
        fit(other, tmp_path, allow_config_change=True)


def test_other_data_under_the_same_path_is_refused(
    make_job: JobMaker, tmp_path: Path, shards: Path, heldout: Path
) -> None:
    path = tmp_path / "data"
    shutil.copytree(shards, path)
    job = make_job(data=DataConfig(sources=(SourceConfig(path=str(path)),)))
    fit(job, tmp_path / "run", stop_after=2)
    shutil.rmtree(path)
    shutil.copytree(heldout, path)
    with pytest.raises(DataError, match="holds other data"):
        fit(job, tmp_path / "run")


def test_other_held_out_data_under_the_same_path_is_refused(
    make_job: JobMaker, tmp_path: Path, shards: Path, heldout: Path
) -> None:
    """Before and after would be of different texts."""
    path = tmp_path / "heldout"
    shutil.copytree(heldout, path)
    job = make_job(heldout=HeldoutConfig(path=str(path), max_sequences=4))
    fit(job, tmp_path / "run", stop_after=2)
    shutil.rmtree(path)
    shutil.copytree(shards, path)
    with pytest.raises(DataError, match="holds other data than the run was evaluated on before"):
        fit(job, tmp_path / "run")


def test_a_start_over_evaluates_anew(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its first checkpoint, a run may start over from other weights."""
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(make_job(seed=1), tmp_path / "run")
    again = fit(make_job(), tmp_path / "run", allow_config_change=True, stop_after=1)
    assert again.heldout_before == fit(make_job(), tmp_path / "new", stop_after=1).heldout_before


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_job(), tmp_path / "whole")
    fit(make_job(), tmp_path / "run", stop_after=4)
    (tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").write_text("{}")
    fit(make_job(), tmp_path / "run")
    assert "step-000004 is damaged and is skipped" in capsys.readouterr().err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_run_from_elsewhere_needs_trust(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(make_job(), tmp_path / "run", stop_after=2)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="--trust"):
        fit(make_job(), tmp_path / "run")
    assert fit(make_job(), tmp_path / "run", trust=True).finished


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
def test_a_compiled_run_resumes_as_the_run_that_did_not_stop(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job(True, compile=True, heldout=HeldoutConfig())
    fit(job, tmp_path / "whole")
    fit(job, tmp_path / "cut", stop_after=3)
    fit(job, tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


def test_a_warm_start_from_hugging_face_resumes_without_it(
    make_job: JobMaker, tmp_path: Path, micro_model: Callable[[bool], ModelConfig]
) -> None:
    model = Transformer(micro_model(True))
    initialize(model, seed=5)
    save_model(model, model.config, tmp_path / "hf", torch.float32)
    job = make_job(init=FromHuggingFace(path=str(tmp_path / "hf")))
    fit(job, tmp_path / "whole")
    fit(job, tmp_path / "cut", stop_after=2)
    (tmp_path / "hf").rename(tmp_path / "gone")
    fit(job, tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_the_end_of_a_run_that_was_lengthened_is_forgotten(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job(schedule=ScheduleConfig(kind="constant"))
    assert fit(replace(job, num_steps=2), tmp_path).heldout_after
    assert not fit(job, tmp_path, stop_after=3).heldout_after
    assert fit(job, tmp_path).heldout_after


def test_a_longer_constant_run_is_the_long_run(make_job: JobMaker, tmp_path: Path) -> None:
    long = make_job(schedule=ScheduleConfig(kind="constant"), heldout=HeldoutConfig())
    fit(long, tmp_path / "long")
    fit(replace(long, num_steps=4), tmp_path / "run")
    fit(long, tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "long")
    assert records(tmp_path / "run") == records(tmp_path / "long")
