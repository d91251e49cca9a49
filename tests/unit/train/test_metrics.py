"""train/metrics.py: the record and the line of a step."""

import json
import math
from pathlib import Path

import pytest

from earthshine.train.metrics import MetricsFile, heldout_line, max_violation, routing_record, samples_digest, step_line

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
    line = step_line(STEP, 2000, 840.0)
    said = "step    7/2000   0.4%  loss 3.4123  |g| 0.812  lr 2.00e-04  41.23k tok/s  mfu 38.1%  1.50GiB"
    assert line == said + "  eta 14m00s"
    balanced = step_line(STEP | {"max_violation": 0.1234, "dead_experts": 0}, 2000, 840.0)
    assert balanced == said + "  maxvio 0.12  eta 14m00s"
    routing = {"max_violation": 3.0, "dead_experts": 2, "drop_rate": 0.012}
    assert step_line(STEP | routing, 2000, 840.0) == said + "  maxvio 3.00  drop 1.2%  dead 2  eta 14m00s"


def test_the_held_out_line() -> None:
    record = {"step": 3, "loss": 2.5, "stderr": 0.01, "bits_per_byte": 1.2, "tokens": 1234}
    assert heldout_line(record).startswith(
        "held-out at step 3: loss 2.5000 +- 0.0100 nats per token, 1.2000 bits per byte"
    )


def test_what_is_said_of_a_step_s_routing() -> None:
    record = routing_record({1: [4, 4, 4, 4], 3: [8, 4, 4, 0], 4: [7, 1, 0, 0]}, None)
    assert record["expert_load"]["1"] == [0.25] * 4 and record["expert_load"]["3"] == [0.5, 0.25, 0.25, 0.0]
    assert record["max_violation"] == 7 / 2 - 1  # layer 4, whose mean is 2
    assert record["dead_experts"] == 3
    assert "drop_rate" not in record
    assert routing_record({0: [6, 2], 1: [4, 4]}, {0: 2, 1: 1})["drop_rate"] == 3 / 16


def test_max_violation_ends_at_the_number_of_experts_by_those_of_a_token() -> None:
    assert max_violation([3, 3, 3]) == 0
    assert max_violation([10, 10, 0, 0, 0, 0]) == 6 / 2 - 1
    assert max_violation([0, 0]) == 0


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
    metrics.append({"kind": "step", "step": 1, "loss": 1.0, "mfu": math.inf, "update_rms": {"muon": math.nan}})
    record = json.loads(metrics.path.read_text())
    assert record["mfu"] is None and record["update_rms"] == {"muon": None}
