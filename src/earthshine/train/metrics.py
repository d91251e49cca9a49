"""The numbers of each step: a line of JSON for programs, and a human-readable line for the log."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from earthshine.console import human_count, human_seconds, log
from earthshine.files import append_line, atomic_write, to_json
from earthshine.run_folder import DAMAGED, json_lines, read_steps, records


class MetricsFile:
    """`metrics.jsonl` of a run folder: one object per line, of kind "step" or "heldout"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        append_line(self.path, to_json(record))

    def read(self) -> Iterator[dict[str, Any]]:
        """The records; damaged lines are passed over."""
        return records(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop what was logged after `step`, because those steps are about to be done again.

        Damaged lines are moved to a file beside it. A warning names them, and the steps whose numbers are missing.
        """
        remaining, damaged, logged, changed = [], [], 0, False
        for line in json_lines(self.path):
            if line.record is None:
                damaged.append(line)
            elif _after(line.record, step):
                changed = True
            else:
                whole = line.raw if line.raw.endswith(b"\n") else line.raw + b"\n"
                changed |= whole is not line.raw  # the next line would be glued to it
                remaining.append(whole)
                logged += _steps(line.record)
        if damaged:
            beside = self.path.with_name(DAMAGED)
            for line in damaged:
                append_line(beside, line.raw)
            numbers = ", ".join(str(line.number) for line in damaged)
            log(f"warning: {self.path} has damaged lines ({numbers}): moved to {beside.name}; the others stay.")
        if not self.path.exists() and step:
            log(f"warning: {self.path} is missing: the numbers of the {step} steps done are lost.")
        elif logged != step:
            log(f"warning: {self.path} holds {logged} of the {step} steps done; the others' numbers are lost.")
        if damaged or changed:
            atomic_write(self.path, b"".join(remaining))

    def heldout_at(self, step: int) -> dict[str, Any] | None:
        """The held-out record of that step, if there is one."""
        return next((r for r in self.read() if r.get("kind") == "heldout" and r.get("step") == step), None)

    def loss_at(self, step: int) -> float | None:
        """The loss of that step; None when it is not recorded."""
        return read_steps(self.path).get(step, {}).get("loss")

    def sync(self) -> None:
        """Flush what was appended to the disk, so that a checkpoint never outlives the numbers of its steps."""
        if self.path.exists():
            fd = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _after(record: Mapping[str, Any], step: int) -> bool:
    number = record.get("step")
    return isinstance(number, int) and number > step


def _steps(record: Mapping[str, Any]) -> int:
    """How many steps a record stands for: its own and, with `log_every`, those before it that have no line."""
    if record.get("kind") != "step":
        return 0
    number = record.get("steps")
    return number if isinstance(number, int) else 1


def samples_digest(sample_ids: Sequence[tuple[int, ...]]) -> str:
    """sha256 of the ids of a step's samples, in order: two runs saw the same data when these are equal."""
    return hashlib.sha256(json.dumps([list(i) for i in sample_ids]).encode()).hexdigest()


def routing_record(counts: Mapping[int, Sequence[int]], dropped: Mapping[int, int] | None) -> dict[str, Any]:
    """The routing fields of a step's record.

    Args:
        counts: how often each expert was chosen, by layer, before any capacity.
        dropped: choices that found no room, by layer; None where there is no capacity.

    Returns:
        expert_load: each expert's fraction of its layer's choices.
        max_violation: max/mean - 1 of the load of the worst layer, MaxVio of arXiv:2408.15664: 0 is perfect
            balance, E/K - 1 is every token at the same experts.
        dead_experts: how many experts, over all layers, no token chose.
        drop_rate: the fraction of all layers' choices that was dropped; only where there is a capacity.
    """
    record: dict[str, Any] = {
        "expert_load": {
            str(layer): [c / max(sum(of_layer), 1) for c in of_layer] for layer, of_layer in counts.items()
        },
        "max_violation": max(max_violation(of_layer) for of_layer in counts.values()),
        "dead_experts": sum(list(of_layer).count(0) for of_layer in counts.values()),
    }
    if dropped is not None:
        record["drop_rate"] = sum(dropped.values()) / max(sum(map(sum, counts.values())), 1)
    return record


def max_violation(counts: Sequence[int]) -> float:
    """max/mean - 1 of the experts' loads in one layer; 0 where nothing was routed."""
    return max(counts) * len(counts) / sum(counts) - 1 if any(counts) else 0.0


def step_line(record: Mapping[str, Any], num_steps: int, eta_seconds: float) -> str:
    """`step  120/2000   6.0%  loss  3.4120  |g|   0.81  lr 2.00e-04   41.20k tok/s  mfu  38.0%    1.20GiB  eta 14m02s`

    With experts also `maxvio  0.12` and, last, `dead 3` where experts got nothing; with a capacity `drop  1.2%`; with
    QK-Clip `logit  43.2` and, last, `clipped 2` where heads were. Fields have fixed widths, so that lines align.
    """
    step = record["step"]
    parts = [
        f"step {step:{len(str(num_steps))}d}/{num_steps} {step / num_steps:6.1%}",
        f"loss {record['loss']:7.4f}",
        f"|g| {record['grad_norm']:6.2f}",
        f"lr {record['lr']:.2e}",
        f"{human_count(record['tokens_per_second']):>7} tok/s",
        f"mfu {record['mfu']:6.1%}",
        f"{record['memory_gib']:6.2f}GiB",
    ]
    if "max_violation" in record:
        parts.append(f"maxvio {record['max_violation']:5.2f}")
    if "drop_rate" in record:
        parts.append(f"drop {record['drop_rate']:5.1%}")
    if "max_attention_logit" in record:
        parts.append(f"logit {record['max_attention_logit']:5.1f}")
    parts.append(f"eta {human_seconds(eta_seconds):>6}")
    if record.get("dead_experts"):
        parts.append(f"dead {record['dead_experts']}")
    if record.get("heads_clipped"):
        parts.append(f"clipped {record['heads_clipped']}")
    return "  ".join(parts)


def heldout_line(record: Mapping[str, Any]) -> str:
    return (
        f"held-out at step {record['step']}: loss {record['loss']:.4f} +- {record['stderr']:.4f} nats per token, "
        f"{record['bits_per_byte']:.4f} bits per byte{' (lossy)' if record.get('lost') else ''}, "
        f"{record['tokens']:,} tokens"
    )
