"""train/metrics.py: the record and the line of a step."""

import json
import math
from pathlib import Path

import pytest

from earthshine.train.metrics import MetricsFile, expert_load, heldout_line, samples_digest, step_line

STEP = {
    "kind": "step",
    "step": 7,
    "loss": 3.41234,
    "grad_norm": 0.8123,
    "lr": 2e-4,
    "tokens_per_second": 41234.0,
    "mfu": 0.381,
    "memory_gib": 1.5,
}


def test_the_line_says_everything() -> None:
    line = step_line(STEP | {"worst_expert_load": 1.234}, 2000, 840.0)
    assert line == (
        "step    7/2000   0.4%  loss 3.4123  |g| 0.812  lr 2.00e-04  41.23k tok/s  mfu 38.1%  1.50GiB"
        "  load 1.23  eta 14m00s"
    )
    assert "load" not in step_line(STEP, 2000, 0.0)


def test_the_held_out_line() -> None:
    record = {"step": 3, "loss": 2.5, "stderr": 0.01, "bits_per_byte": 1.2, "tokens": 1234}
    assert heldout_line(record).startswith(
        "held-out at step 3: loss 2.5000 +- 0.0100 nats per token, 1.2000 bits per byte"
    )


def test_expert_load_is_share_and_worst_ratio() -> None:
    shares, worst = expert_load({1: [4, 4, 4, 4], 3: [8, 4, 4, 0]})
    assert shares == {"1": [0.25] * 4, "3": [0.5, 0.25, 0.25, 0.0]}
    assert worst == 2.0
    assert expert_load({0: [0, 12]})[1] == 2.0


def test_the_digest_tells_samples_and_their_order() -> None:
    ids = ((0, 0, 1), (0, 0, 2))
    assert samples_digest(ids) == samples_digest(list(ids)) != samples_digest(ids[::-1])


def filled(path: Path) -> MetricsFile:
    metrics = MetricsFile(path)
    metrics.append({"kind": "heldout", "step": 0, "loss": 9.0})
    for step in (1, 2, 3):
        metrics.append({"kind": "step", "step": step, "loss": 1 / step})
    metrics.append({"kind": "heldout", "step": 2, "loss": 8.0})
    return metrics


def test_what_came_after_a_checkpoint_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = filled(tmp_path / "metrics.jsonl")
    assert metrics.loss_at(3) == 1 / 3
    metrics.truncate_after(2)
    assert [(r["kind"], r["step"]) for r in metrics.read()] == [
        ("heldout", 0),
        ("step", 1),
        ("step", 2),
        ("heldout", 2),
    ]
    assert (
        metrics.loss_at(2) == 0.5
        and math.isnan(metrics.loss_at(3))
        and metrics.heldout_at(2) == {"kind": "heldout", "step": 2, "loss": 8.0}
    )
    assert metrics.heldout_at(1) is None
    assert capsys.readouterr().err == ""


def test_a_broken_line_and_lost_steps_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = filled(tmp_path / "metrics.jsonl")
    metrics.path.write_text(metrics.path.read_text()[:-30])
    metrics.truncate_after(3)
    err = capsys.readouterr().err
    assert "has a broken line" in err
    metrics.truncate_after(5)
    assert "holds 3 of the 5 steps done" in capsys.readouterr().err


def test_what_is_not_even_text_is_a_broken_line(tmp_path: Path) -> None:
    metrics = filled(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(metrics.path.read_bytes()[:-30] + b"\xff\x00")
    assert len(list(metrics.read())) == 4


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.truncate_after(0)
    metrics.sync()
    assert list(metrics.read()) == [] and math.isnan(metrics.loss_at(0))


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "step", "step": 1, "loss": 1.0, "mfu": math.inf})
    assert json.loads(metrics.path.read_text())["mfu"] is None
