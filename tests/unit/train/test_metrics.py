"""train/metrics.py: the record and the line of a step."""

import json
import math
from collections.abc import Callable
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
    start = "step    7/2000   0.4%  loss  3.4123  |g|   0.81  lr 2.00e-04   41.23k tok/s  mfu  38.1%    1.50GiB"
    assert line == start + "  eta 14m00s"
    balanced = step_line(STEP | {"max_violation": 0.1234, "dead_experts": 0}, 2000, 840.0)
    assert balanced == start + "  maxvio  0.12  eta 14m00s"
    routing = {"max_violation": 3.0, "dead_experts": 2, "drop_rate": 0.012}
    assert step_line(STEP | routing, 2000, 840.0) == start + "  maxvio  3.00  drop  1.2%  eta 14m00s  dead 2"


def test_the_lines_of_a_run_align() -> None:
    early = {
        "step": 1,
        "loss": 12.5,
        "grad_norm": 118.2,
        "tokens_per_second": 812.4,
        "mfu": 0.0123,
        "max_violation": 11,
    }
    late = {"step": 2000, "tokens_per_second": 1.25e6, "mfu": 1.01, "memory_gib": 79.4, "max_violation": 0.02}
    lines = [step_line(STEP | changes, 2000, eta) for changes, eta in ((early, 0.5), (late, 7500.0))]
    starts = [
        [line.index(word) for word in ("loss", "|g|", "lr", "tok/s", "mfu", "GiB", "maxvio", "eta")] for line in lines
    ]
    assert starts[0] == starts[1] and len(lines[0]) == len(lines[1])


def test_the_held_out_line() -> None:
    record = {"step": 3, "loss": 2.5, "stderr": 0.01, "bits_per_byte": 1.2, "tokens": 1234}
    assert heldout_line(record).startswith(
        "held-out at step 3: loss 2.5000 +- 0.0100 nats per token, 1.2000 bits per byte"
    )
    assert "bits per byte (lossy)" in heldout_line(record | {"lost": "what was not spelled"})


def test_what_is_reported_of_a_step_s_routing() -> None:
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
        and metrics.loss_at(3) is None
        and metrics.heldout_at(2) == {"kind": "heldout", "step": 2, "loss": 8.0}
    )
    assert metrics.heldout_at(1) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [lambda line: b"\0" * len(line), lambda line: line[:20], lambda line: b"\xff\xfe\x00", lambda line: b"[1]"],
    ids=["zeros", "cut", "no text", "no object"],
)
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_damaged_line_costs_no_other(
    damage: Callable[[bytes], bytes], number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is set aside, as it is; what follows survives the resume."""
    metrics = filled(tmp_path / "metrics.jsonl")
    lines = metrics.path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = damage(lines[number - 1].rstrip(b"\n")) + b"\n"
    metrics.path.write_bytes(b"".join(lines))
    metrics.truncate_after(3)
    others = lines[: number - 1] + lines[number:]
    assert metrics.path.read_bytes() == b"".join(others)
    assert len(list(metrics.read())) == 4
    assert (tmp_path / "metrics.damaged").read_bytes() == lines[number - 1]
    err = capsys.readouterr().err
    assert f"warning: {metrics.path} has damaged lines ({number}): moved to metrics.damaged" in err
    assert ("holds 2 of the 3 steps done" in err) == (number == 3)
    metrics.truncate_after(3)
    assert "damaged lines" not in capsys.readouterr().err


def test_a_last_line_without_its_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    metrics = filled(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(metrics.path.read_bytes().rstrip(b"\n"))
    metrics.truncate_after(3)
    metrics.append({"kind": "step", "step": 4, "loss": 0.1})
    assert metrics.loss_at(4) == 0.1 and len(list(metrics.read())) == 6


def test_lost_steps_and_a_lost_file_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = filled(tmp_path / "metrics.jsonl")
    metrics.truncate_after(3)
    assert capsys.readouterr().err == ""
    metrics.truncate_after(5)
    assert "holds 3 of the 5 steps done" in capsys.readouterr().err
    metrics.path.unlink()
    metrics.truncate_after(5)
    assert f"warning: {metrics.path} is missing: the numbers of the 5 steps done are lost" in capsys.readouterr().err
    metrics.truncate_after(0)
    metrics.sync()
    assert capsys.readouterr().err == "" and list(metrics.read()) == [] and metrics.loss_at(0) is None


def test_what_has_no_step_is_kept(tmp_path: Path) -> None:
    """Whoever wrote it: a resume drops only what it will do again."""
    metrics = filled(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "note", "text": "mine"})
    metrics.truncate_after(1)
    assert [r["kind"] for r in metrics.read()] == ["heldout", "step", "note"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "step", "step": 1, "loss": 1.0, "mfu": math.inf, "update_rms": {"muon": math.nan}})
    record = json.loads(metrics.path.read_text())
    assert record["mfu"] is None and record["update_rms"] == {"muon": None}
