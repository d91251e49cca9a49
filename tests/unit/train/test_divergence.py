"""train/loop.py: what is not finite is never saved, and the error names the last good checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import JobMaker, before_step, poison, records

from earthshine.errors import (
    TrainingDivergedError,
)
from earthshine.model.transformer import Transformer
from earthshine.train import loop
from earthshine.train.loop import fit


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
