"""What the tests of whole runs share: their numbers without place and time, their weights' hash, and a step changed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.checkpoint import run_store
from earthshine.train import loop
from earthshine.train.job import TrainJob

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
