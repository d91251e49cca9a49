"""train/loop.py: what is asked of an accelerator, and what is said of its speed."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from earthshine.device import ComputeChoice
from earthshine.train import loop
from earthshine.train.job import TrainJob
from earthshine.train.loop import fit

JobMaker = Callable[..., TrainJob]


def test_an_accelerator_is_asked_for_deterministic_kernels_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With warn_only, flash and memory-efficient attention add up their gradients in any order."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with loop._reproducible(torch.device("cuda"), 0):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_mfu_above_one_is_told_without_a_guess(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ComputeChoice(torch.float32, "test", peak_flops=2e3)
    monkeypatch.setattr(loop, "choose_compute_dtype", lambda requested, device: choice)
    fit(make_job(), tmp_path / "run", stop_after=2)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning: mfu" in line]
    assert len(told) == 1 and "the GEMM peak measured at start-up, 0 GFLOP/s" in told[0] and "busy" not in told[0]
