"""The starts of a run: one line per start in starts.jsonl, with what has changed since the steps that were kept.

config.json and plan.json are those of the last start, env.json that of the first. Only starts.jsonl shows that a run
resumed with a different config, on another machine or with another version.
"""

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from earthshine.config import differences, encode, read_json
from earthshine.console import log
from earthshine.files import atomic_write, to_json, write_json
from earthshine.model.config import ModelConfig
from earthshine.run_folder import CONFIG, ENV, ORIGIN, PLAN, START_PARTS, STARTS, start_lines
from earthshine.train.derive import Derived
from earthshine.train.job import TrainJob
from earthshine.train.resume import changes_on_resume, completed

# The parts of an environment that may change the last bits of a step.
PLACE = ("versions", "cpu", "threads", "device", "device_name", "float32_matmul_precision")


def record_start(
    run_dir: Path,
    job: TrainJob,
    derived: Derived,
    model: ModelConfig,
    environment: dict[str, Any],
    *,
    done: int = 0,
    saved: dict[str, Any] | None = None,
    same_data: frozenset[str] = frozenset(),
) -> None:
    """Write config.json and plan.json where they differ, a line of starts.jsonl, and at the first step origin.json and
    env.json. Another environment or plan is logged.

    done: steps kept from earlier starts. saved: the job in the checkpoint after them. same_data: see `resume`.
    """
    plan = json.loads(to_json(asdict(derived) | {"state_bytes": derived.state_bytes, "model": encode(model)}))
    start = new_start(run_dir, job, plan, environment, done, saved, same_data)
    if done:  # before the files that it is compared with are overwritten
        write_start(run_dir, start, finished=done >= job.num_steps)
    for name, content in ((CONFIG, start["config"]), (PLAN, plan)):
        if stored(run_dir / name) != content:
            write_json(run_dir / name, content)
    origin = getattr(job.init, "path", "")
    if origin and not (run_dir / ORIGIN).exists():  # relative to where this start runs; an export may run elsewhere
        write_json(run_dir / ORIGIN, {"path": str(Path(origin).absolute())})
    if not done:
        write_start(run_dir, start, finished=False)
    then = stored(run_dir / ENV) if done else None
    if then is None:
        write_json(run_dir / ENV, (first_environment(run_dir) if done else None) or environment)
        return
    for key in PLACE:
        if then.get(key) != environment.get(key):
            log(
                f"warning: this run began with {key} {then.get(key)}, now it is {environment.get(key)}: "
                f"its numbers may differ in the last bits from those of an uninterrupted run."
            )


def earlier_warnings(run_dir: Path) -> tuple[str, ...]:
    """The warnings of the start before, from plan.json."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tuple(read_json(run_dir / PLAN)["warnings"])
    return ()


def new_start(
    run_dir: Path,
    job: TrainJob,
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    done: int,
    saved: dict[str, Any] | None,
    same_data: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The line of a start after `done` steps, JSON-ready.

    Args:
        plan, environment: what plan.json and env.json would hold. Only the first start keeps the whole environment,
            later ones keep `PLACE` and the host.
        saved: the job in the checkpoint, for a folder written before starts.jsonl existed.
        same_data: which data are the same as before, if stored elsewhere (`changes_on_resume`).

    `changes` are relative to the start that did the last of those steps: lists of {field, from, to} under "config",
    "plan" and "environment". `another_run` names the changed fields of the config that a resume refuses by default:
    with one of them the folder is no longer the run of one config. A derived number that only one of two versions has
    is not a change.
    """
    before = _before(run_dir, done, saved) if done else {}
    now = {"config": encode(job), "plan": dict(plan), "environment": dict(environment) | {"host": platform.node()}}
    place_before, place_now = _place(before.get("environment", {})), _place(now["environment"])
    if done:
        now["environment"] = place_now
    if "host" not in place_before:  # written before it was recorded
        place_now = {key: value for key, value in place_now.items() if key != "host"}
    changes = {
        "config": _changes(completed(before["config"]) if before.get("config") else None, now["config"]),
        "plan": [c for c in _changes(before.get("plan"), now["plan"]) if "(absent)" not in (c["from"], c["to"])],
        "environment": _changes(place_before, place_now),
    }
    refused = changes_on_resume(before["config"], job, done, same_data) if before.get("config") else []
    return {
        "kind": "start",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_step": done + 1,
        **now,
        "changes": changes,
        "another_run": [line.partition(": ")[0] for line in refused],
    }


def write_start(run_dir: Path, start: Mapping[str, Any], *, finished: bool) -> None:
    """Append the line, without the parts that are as in the line before; begin a new file at the first step.

    A finished run that is started again as it was adds nothing. The file is on the disk before config.json and
    plan.json, whose changes it records, are written.
    """
    path = run_dir / STARTS
    earlier = [*start_lines(path)] if start["first_step"] > 1 else []
    last: dict[str, Any] = next((line.record for line in reversed(earlier) if line.record), {})
    if not (finished and all(last.get(part) == start[part] for part in ("config", "plan"))):
        before = _parts(earlier[-1].record or {}) if earlier else {}
        before["environment"] = _place(before.get("environment", {}))
        line = {key: value for key, value in start.items() if key not in START_PARTS or value != before.get(key)}
        lines = [line.raw.removesuffix(b"\n") for line in earlier]
        atomic_write(path, b"\n".join([*lines, to_json(line).encode()]) + b"\n")
    if fields := [change["field"] for change in start["changes"]["plan"]]:
        log(f"{PLAN} changed after step {start['first_step'] - 1}: {', '.join(fields)} (recorded in {STARTS})")


def _before(run_dir: Path, done: int, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Config, plan and environment of the start that did step `done`; for an older folder, what its files hold."""
    starts = [s for s in _starts(run_dir) if isinstance(s.get("first_step"), int) and s["first_step"] <= done]
    if starts:
        return _parts(starts[-1])
    files = {"config": CONFIG, "plan": PLAN, "environment": ENV}
    parts = {part: stored(run_dir / name) or {} for part, name in files.items()}
    return parts | ({"config": saved} if saved else {})


def _parts(start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {part: start[part] for part in START_PARTS if isinstance(start.get(part), dict)}


def _starts(run_dir: Path) -> list[dict[str, Any]]:
    return [line.record for line in start_lines(run_dir / STARTS) if line.record]


def stored(path: Path) -> dict[str, Any] | None:
    """The object in one of a run folder's files; None where it is missing or, with a warning, damaged."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except ValueError as e:
        log(f"warning: {path} is damaged ({e}) and is rewritten.")
        return None
    return content if isinstance(content, dict) else None


def first_environment(run_dir: Path) -> dict[str, Any] | None:
    """The environment of the start that did step 1, as env.json holds it; None where it was not recorded."""
    for start in _starts(run_dir):
        if start.get("first_step") == 1 and isinstance(start.get("environment"), dict):
            return {key: value for key, value in start["environment"].items() if key != "host"}
    return None


def _place(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an environment that may change last bits, and the host where it was recorded."""
    return {key: environment[key] for key in (*PLACE, "host") if key in environment}


def _changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[dict[str, Any]]:
    """[] where the state before is not known."""
    return [{"field": f, "from": old, "to": new} for f, old, new in differences(before, now)] if before else []
