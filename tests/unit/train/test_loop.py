"""train/loop.py: whole runs on a tiny model: what they write, evaluate and start from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_runs import JobMaker, records

from earthshine.checkpoint import run_store
from earthshine.data.shards import TokenShards
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig
from earthshine.train.job import FromCheckpoint, HeldoutConfig, Scratch
from earthshine.train.loop import fit


def test_a_run_folder_is_complete(make_job: JobMaker, tmp_path: Path) -> None:
    summary = fit(make_job(moe=True), tmp_path / "run")
    assert summary.finished and (summary.step, summary.num_steps) == (6, 6)
    present = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")}
    assert present == {"config.json", "plan.json", "env.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "eval"}
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert (
        checkpoints == ["step-000004", "step-000006"]
        and summary.checkpoint == tmp_path / "run" / "checkpoints" / checkpoints[1]
    )
    lines = records(tmp_path / "run")
    assert [r["step"] for r in lines if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines if r["kind"] == "heldout"] == [0, 3, 6]
    step = lines[1]
    assert set(step["expert_load"]) == {"1"} and sum(step["expert_load"]["1"]) == pytest.approx(1)
    assert step["max_violation"] == pytest.approx(4 * max(step["expert_load"]["1"]) - 1)
    assert step["dead_experts"] == step["expert_load"]["1"].count(0.0)
    assert step["balance"] >= 0.9 and step["balance_loss"] == pytest.approx(1e-3 * step["balance"])
    assert not {"drop_rate", "z_loss"} & set(step)  # there is neither
    assert set(step["update_rms"]) == {"muon", "adamw"}
    assert summary.total_tokens == lines[-2]["total_tokens"] == sum(r["tokens"] for r in lines if r["kind"] == "step")
    assert summary.loss == lines[-2]["loss"]
    assert summary.heldout_after["loss"] == lines[-1]["loss"] < summary.heldout_before["loss"] == lines[0]["loss"]


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


def test_the_caller_s_random_state_and_settings_come_back(make_job: JobMaker, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(make_job(num_steps=2), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_held_out_text_is_attended_to_as_in_training(make_job: JobMaker, tmp_path: Path, heldout: Path) -> None:
    separate = make_job(num_steps=2)
    data = replace(separate.data, document_attention=False)
    apart, across = (fit(replace(separate, data=d), tmp_path / str(d.document_attention), stop_after=1).heldout_before
                     for d in (separate.data, data))  # fmt: skip
    assert across["tokens"] == 4 * 16 > apart["tokens"]
    assert across["loss"] != apart["loss"]
    assert across["sha256"] == apart["sha256"] == TokenShards(heldout).fingerprint


def test_a_warm_start_takes_weights_and_nothing_else(make_job: JobMaker, tmp_path: Path) -> None:
    fit(make_job(), tmp_path / "first")
    job = make_job(init=FromCheckpoint(path=str(tmp_path / "first")), num_steps=2)
    summary = fit(job, tmp_path / "second")
    first = json.loads((tmp_path / "first" / "eval" / "heldout-after.json").read_text())
    assert summary.heldout_before["loss"] == first["loss"]
    assert records(tmp_path / "second")[1]["samples"] == records(tmp_path / "first")[1]["samples"]


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
