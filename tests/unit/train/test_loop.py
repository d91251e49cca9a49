"""train/loop.py: whole runs on a tiny model, how they end, and how they resume."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.checkpoint import run_store
from earthshine.checkpoint.hf import save_model
from earthshine.config import encode
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import TokenShards
from earthshine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRunError,
    OutputExistsError,
    TrainingDivergedError,
)
from earthshine.model.config import BalanceConfig, CapacityConfig, ModelConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train import loop
from earthshine.train.interrupts import Interrupts
from earthshine.train.job import FromCheckpoint, FromHuggingFace, HeldoutConfig, Scratch, TrainJob
from earthshine.train.loop import fit

JobMaker = Callable[..., TrainJob]
# What may differ between two runs of the same job: when and where they ran.
PLACE = {"seconds", "tokens_per_second", "mfu", "memory_gib"}


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in PLACE} for line in lines]


def fingerprint(run_dir: Path) -> str:
    """sha256 of the names and bytes of the latest checkpoint's parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(run_store.load_model_state(run_dir)[1].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_run_folder_is_complete(make_job: JobMaker, tmp_path: Path) -> None:
    summary = fit(make_job(moe=True), tmp_path / "run")
    assert summary.finished and (summary.step, summary.num_steps) == (6, 6)
    present = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")}
    assert present == {"config.json", "plan.json", "env.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "eval"}
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"] and summary.checkpoint == tmp_path / "run" / "checkpoints" / kept[1]
    found = records(tmp_path / "run")
    assert [r["step"] for r in found if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in found if r["kind"] == "heldout"] == [0, 3, 6]
    step = found[1]
    assert set(step["expert_load"]) == {"1"} and sum(step["expert_load"]["1"]) == pytest.approx(1)
    assert step["max_violation"] == pytest.approx(4 * max(step["expert_load"]["1"]) - 1)
    assert step["dead_experts"] == step["expert_load"]["1"].count(0.0)
    assert step["balance"] >= 0.9 and step["balance_loss"] == pytest.approx(1e-3 * step["balance"])
    assert not {"drop_rate", "z_loss"} & set(step)  # there is neither
    assert set(step["update_rms"]) == {"muon", "adamw"}
    assert summary.total_tokens == found[-2]["total_tokens"] == sum(r["tokens"] for r in found if r["kind"] == "step")
    assert summary.loss == found[-2]["loss"]
    assert summary.heldout_after["loss"] == found[-1]["loss"] < summary.heldout_before["loss"] == found[0]["loss"]


def test_a_dense_run_says_nothing_of_experts(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(), tmp_path, stop_after=1)
    (step,) = (r for r in records(tmp_path) if r["kind"] == "step")
    routing = {"expert_load", "max_violation", "dead_experts", "drop_rate", "balance", "balance_loss", "z_loss"}
    assert not routing & set(step)


def test_what_is_dropped_and_added_is_logged(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the room that is needed: at least half of all choices find none."""
    balance = BalanceConfig(loss="none", z_coefficient=1e-3)
    fit(make_job(True, balance=balance, capacity=CapacityConfig(factor=0.5), num_steps=2), tmp_path)
    step = records(tmp_path)[1]
    assert 0.5 <= step["drop_rate"] < 1 and step["z_loss"] > 0 and "balance" not in step
    err = capsys.readouterr().err
    assert f"maxvio {step['max_violation']:5.2f}  drop {step['drop_rate']:5.1%}" in err
    assert "warning" not in err


def test_a_capacity_that_never_drops_is_warned_of_once_and_changes_nothing(
    make_job: JobMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(True, capacity=CapacityConfig(factor=2.0))
    fit(job, tmp_path / "full", stop_after=3)
    assert "warning: capacity.factor=2 can never drop a token" in capsys.readouterr().err
    fit(job, tmp_path / "full")
    assert "warning" not in capsys.readouterr().err
    fit(make_job(True), tmp_path / "dropless")
    full, dropless = records(tmp_path / "full"), records(tmp_path / "dropless")
    assert [r["drop_rate"] for r in full if r["kind"] == "step"] == [0.0] * 6
    for one, other in zip(full, dropless, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # padded and grouped products, six Muon steps


def test_recomputation_may_begin_in_the_middle_and_changes_no_bit(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(True), tmp_path / "whole")
    fit(make_job(True), tmp_path / "cut", stop_after=3)
    fit(make_job(True, recompute="block"), tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "stop"), [("dense", 3), ("moe", 1), ("moe", 5), ("moonlight", 3)])
def test_a_run_that_stopped_and_went_on_is_the_run_that_did_not(
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


def test_the_caller_s_random_state_and_settings_come_back(make_job: JobMaker, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(make_job(num_steps=2), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


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


def test_held_out_text_is_attended_to_as_in_training(make_job: JobMaker, tmp_path: Path, heldout: Path) -> None:
    separate = make_job(num_steps=2)
    data = replace(separate.data, document_attention=False)
    apart, across = (fit(replace(separate, data=d), tmp_path / str(d.document_attention), stop_after=1).heldout_before
                     for d in (separate.data, data))  # fmt: skip
    assert across["tokens"] == 4 * 16 > apart["tokens"]
    assert across["loss"] != apart["loss"]
    assert across["sha256"] == apart["sha256"] == TokenShards(heldout).fingerprint


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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
def test_a_compiled_run_goes_on_as_the_run_that_did_not_stop(make_job: JobMaker, tmp_path: Path) -> None:
    job = make_job(True, compile=True, heldout=HeldoutConfig())
    fit(job, tmp_path / "whole")
    fit(job, tmp_path / "cut", stop_after=3)
    fit(job, tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


def test_a_folder_that_is_not_a_run_is_refused(make_job: JobMaker, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        fit(make_job(), tmp_path)


def test_many_processes_are_refused(make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        fit(make_job(), tmp_path)


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Any], None]) -> None:
    """Call `action(run)` when step `step` (from 1) is about to be done."""
    original = loop._step

    def wrapped(run: Any) -> None:
        if run.state.step + 1 == step:
            action(run)
        original(run)

    monkeypatch.setattr(loop, "_step", wrapped)


def poison(run: Any) -> None:
    with torch.no_grad():
        run.state.model.final_norm.weight.fill_(float("nan"))


@pytest.mark.parametrize(
    ("step", "message"),
    [(2, "There is no checkpoint yet"), (4, "The last good checkpoint is .*step-000002: start a new run")],
)
def test_divergence_names_the_last_good_checkpoint(
    step: int, message: str, make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, step, poison)
    with pytest.raises(TrainingDivergedError, match=f"the loss of step {step} is nan.*{message}"):
        fit(make_job(), tmp_path)
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "step"] == list(range(1, step))


def test_parameters_that_are_not_finite_are_never_saved(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update can overflow after a finite loss and gradient."""
    original = loop.train_step

    def overflow(state: Any, *args: Any, **options: Any) -> Any:
        result = original(state, *args, **options)
        if state.step == 4:
            with torch.no_grad():
                state.model.final_norm.weight.fill_(float("inf"))
        return result

    monkeypatch.setattr(loop, "train_step", overflow)
    with pytest.raises(TrainingDivergedError, match=r"final_norm.weight is not finite.*last good .*step-000002"):
        fit(make_job(), tmp_path)


def test_a_moment_that_is_not_finite_is_never_saved(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's second moment at infinity divides every later update by infinity: the parameter would just stop."""

    def overflow(run: Any) -> None:
        run.state.optimizer.state[run.state.model.final_norm.weight]["exp_avg_sq"].fill_(float("inf"))

    before_step(monkeypatch, 4, overflow)
    with pytest.raises(TrainingDivergedError, match=r"final_norm.weight.exp_avg_sq is not .*last good .*step-000002"):
        fit(make_job(), tmp_path)


def test_divergence_found_by_the_evaluation_names_the_last_good_checkpoint(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.heldout_loss

    def poisoned(model: Transformer, *args: Any, **options: Any) -> dict[str, Any]:
        if (tmp_path / "checkpoints").exists():
            with torch.no_grad():
                model.final_norm.weight.fill_(float("nan"))
        return evaluate(model, *args, **options)

    monkeypatch.setattr(loop, "heldout_loss", poisoned)
    with pytest.raises(TrainingDivergedError, match=r"held-out loss .* is nan.*The last good .*step-000002"):
        fit(make_job(), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    number: signal.Signals, make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(moe=True)
    fit(job, tmp_path / "whole")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(
            InterruptedRunError, match=rf"{number.name} after step 3 of 6: saved in .*step-000003.*same command"
        ):
            fit(job, tmp_path / "run")
    assert InterruptedRunError.exit_code == 75
    assert signal.getsignal(number) is handler
    assert fit(job, tmp_path / "run").finished
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_signal_before_the_first_step_saves_step_zero(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop._evaluate_if_due

    def interrupted(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate_if_due", interrupted)
        with pytest.raises(InterruptedRunError, match="after step 0 of 6"):
            fit(make_job(), tmp_path / "run")
    assert fit(make_job(), tmp_path / "run").finished


def test_a_signal_while_the_run_is_opened_is_an_interruption(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_job(), tmp_path, stop_after=2)
    build = loop.build_state

    def slow(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return build(*args, **options)

    monkeypatch.setattr(loop, "build_state", slow)
    with pytest.raises(InterruptedRunError, match=r"SIGINT after step 2 of 6: saved in .*step-000002"):
        fit(make_job(), tmp_path)


def test_the_first_signal_asks_and_gives_the_second_its_default_back() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested and interrupts.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


def test_a_warm_start_takes_weights_and_nothing_else(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(), tmp_path / "first")
    job = make_job(init=FromCheckpoint(path=str(tmp_path / "first")), num_steps=2)
    summary = fit(job, tmp_path / "second")
    first = json.loads((tmp_path / "first" / "eval" / "heldout-after.json").read_text())
    assert summary.heldout_before["loss"] == first["loss"]
    assert records(tmp_path / "second")[1]["samples"] == records(tmp_path / "first")[1]["samples"]


def test_a_warm_start_from_hugging_face_goes_on_without_it(
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


def test_frozen_parameters_stay_and_are_saved(make_job: JobMaker, tmp_path: Path) -> None:
    """Router-only warm-up: everything else keeps its bits."""
    everything = ("embed.*", "head.*", "*norm*", "*.attn.*", "*.ffn.*", "*.experts.*", "*.shared*")
    job = make_job(moe=True, optimizer=OptimizerConfig(lr=5e-3, ns_dtype="float32", freeze=everything), num_steps=2)
    fit(job, tmp_path)
    assert isinstance(job.init, Scratch)
    model = Transformer(job.init.model)
    initialize(model, job.seed)
    after = run_store.load_model_state(tmp_path)[1]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, after[name])]
    assert changed == ["blocks.1.moe.router.weight"]


def test_without_held_out_data_nothing_is_evaluated(make_job: JobMaker, tmp_path: Path) -> None:
    summary = fit(make_job(heldout=HeldoutConfig(), num_steps=2), tmp_path)
    assert summary.heldout_before == summary.heldout_after == {} and not (tmp_path / "eval").exists()


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
