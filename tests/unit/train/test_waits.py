"""How often a training step waits for an accelerator, for which the meta device stands: once when it is logged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.device import ComputeChoice, Readings, Stopwatch
from earthshine.errors import TrainingDivergedError
from earthshine.model.config import ModelConfig
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.optim.config import OptimizerConfig
from earthshine.train import loop
from earthshine.train.derive import derive
from earthshine.train.job import Scratch, TrainJob
from earthshine.train.metrics import MetricsFile
from earthshine.train.state import build_state
from earthshine.train.step import Objective, StepResult, train_step

JobMaker = Callable[..., TrainJob]
META = torch.device("meta")
SWITCH = BalanceConfig(loss="switch", scope="step", z_coefficient=1e-3)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"moe": True, "balance": SWITCH},
    "capacity": {"moe": True, "capacity": CapacityConfig(factor=1.0)},
    "recompute": {"moe": True, "recompute": "block"},
    "normuon": {"moe": True, "optimizer": OptimizerConfig(lr=5e-3, ns_dtype="float32", normuon_beta2=0.95)},
    "adamw": {"moe": True, "optimizer": OptimizerConfig(lr=5e-3, algorithm="adamw")},
    "qk clip": {"optimizer": OptimizerConfig(lr=5e-3, ns_dtype="float32", qk_clip_threshold=1.0)},
    "moonlight": {"optimizer": OptimizerConfig(lr=5e-3, ns_dtype="float32", qk_clip_threshold=1.0)},
}


def started(job: TrainJob, folder: Path) -> Any:
    """A run of `fit` before its first step, on the meta device."""
    state = build_state(job, META, torch.bfloat16, None, trust=False, allow_config_change=False)
    metrics = MetricsFile(folder / "metrics.jsonl")
    compute = ComputeChoice(torch.bfloat16, "test", peak_flops=1e12)
    return loop._Run(job, folder, derive(job), compute, state, metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_and_its_record_is_one_transfer(
    kind: str, make_job: JobMaker, moonlight_model: ModelConfig, tmp_path: Path, waits: Any
) -> None:
    changes = KINDS[kind] | ({"init": Scratch(model=moonlight_model)} if kind == "moonlight" else {})
    run = started(make_job(**changes, log_every=3), tmp_path)
    with waits:
        for _ in range(2):
            loop._step(run)
        assert waits.transfers == 0 and len(run.unrecorded) == 2
        loop._step(run)
        assert waits.transfers == 1 and not run.unrecorded
        assert not waits.uploads
    (record,) = run.metrics.read()
    assert (record["step"], record["steps"], record["grad_norm"]) == (3, 3, 1.0)
    assert ("expert_load" in record) == (kind not in ("dense", "qk clip"))


def result(step: int, loss: float = 1.0, norm: float = 1.0) -> StepResult:
    sums = Readings(torch.tensor([loss, 0.0, 0.0]))
    return StepResult(
        step, Objective(sums, 1, 1, 1, 0, BalanceConfig()), 1, Readings(torch.tensor(norm)), Stopwatch(META)
    )


@pytest.mark.parametrize(("bad", "name"), [({"loss": math.inf}, "loss"), ({"norm": math.nan}, "gradient norm")])
def test_what_is_not_finite_is_found_by_the_next_record_and_never_saved(
    bad: dict[str, float], name: str, make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator's step is not read before its update; also where the steps after it are finite again."""
    monkeypatch.setattr(loop.run_store, "save", lambda *args, **options: pytest.fail("saved"))
    for finish in (loop._record, loop._save):
        run = started(make_job(log_every=10), tmp_path)
        with torch.device("cpu"):
            done = (result(1), result(2, **bad), result(3))
            run.unrecorded = [loop._Done(each, (), Stopwatch(META)) for each in done]
        run.state.step = 3
        with pytest.raises(TrainingDivergedError, match=f"the {name} of step 2 is (inf|nan).*Nothing was saved since"):
            finish(run)
        assert not run.metrics.path.exists()


def test_a_step_on_an_accelerator_is_updated_before_it_is_read(make_job: JobMaker, waits: Any) -> None:
    state = build_state(make_job(), META, torch.bfloat16, None, trust=False, allow_config_change=False)
    with waits:
        done = train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=2, clip=1.0)
        assert waits.transfers == 0
        assert (state.step, done.step, done.grad_norm) == (1, 1, 1.0)
        assert json.dumps(done.objective.loss) and waits.transfers == 2  # by itself each is a transfer
        done.require_finite()
        assert waits.transfers == 2
