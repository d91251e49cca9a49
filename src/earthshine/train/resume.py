"""What refuses a resume: a run is resumed as the run that it was, or not at all. No torch import.

This file holds the gates that compare configs and data. All gates, in the order in which a start passes them:

    whether the folder is a run's, and free             train.claim.claim
    whether a checkpoint is whole and was made here     checkpoint.run_store.latest, checkpoint.manifest.require_trust
    the config, field by field                          check_config
    the model's architecture                            train.state._same_model
    every tensor's name, shape and dtype                checkpoint.run_store.read_into
    the optimizer's hyper-parameters and parameters     optim.muon.Muon.load_state_dict
    the training data, seed and sequence length         data.loader.Loader.load_state_dict
    the held-out data                                   check_heldout

`--allow-config-change` opens the gates of the config, the hyper-parameters and the held-out data.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from earthshine.config import decode, diff, encode, read_json
from earthshine.console import log
from earthshine.data.usage import fingerprint
from earthshine.errors import ConfigError, DataError
from earthshine.optim.schedule import learning_rate
from earthshine.run_folder import CONFIG, EVAL, HELDOUT_BEFORE, PLAN
from earthshine.train.job import TrainJob


def check_config(
    run_dir: Path,
    job: TrainJob,
    steps_done: int,
    *,
    allow_change: bool,
    saved: dict[str, Any] | None = None,
    same_data: frozenset[str] = frozenset(),
) -> None:
    """Raise ConfigError, with the differences, when the folder belongs to a run with a different config.

    saved: the job in the checkpoint that would be resumed from, which reveals an edited config.json.
    same_data: what the function of that name returns.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return
    try:
        old = read_json(path)
        if not isinstance(old, dict):
            raise ValueError(f"it holds {type(old).__name__}, not an object")
    except ValueError as e:
        raise ConfigError(f"{path} is not the config of a run: {e}. Restore it, or choose another --run.") from e
    changes = changes_on_resume(old, job, steps_done, same_data)
    if saved is not None:
        changes += [line for line in changes_on_resume(saved, job, steps_done, same_data) if line not in changes]
    if not changes:
        return
    listed = "\n".join(f"  {line}" for line in changes)
    if not allow_change:
        raise ConfigError(
            f"{run_dir} was started with a different config (saved -> requested):\n{listed}\n"
            f"Choose another --run, restore the config, or insist with --allow-config-change."
        )
    log(f"warning: resuming with a changed config, as allowed; this run is no longer the run of one config:\n{listed}")


def same_data(run_dir: Path, job: TrainJob, fingerprints: Sequence[str]) -> frozenset[str]:
    """Which of "data" and "heldout" have the fingerprints that the run's had, wherever they are stored now.

    fingerprints: of the sources, in the checkpoint that would be resumed from; without one, those of plan.json.
    """
    recorded: dict[str, list[Any]] = {"data": list(fingerprints), "heldout": []}
    with suppress(OSError, ValueError, KeyError, TypeError):  # a folder written before fingerprints were kept
        plan = read_json(run_dir / PLAN)
        recorded["heldout"] = [plan["heldout_sha256"]]
        recorded["data"] = recorded["data"] or [s["sha256"] for s in plan["sources"]]
    if before := _evaluated_before(run_dir):
        recorded["heldout"] = [before]
    requested = {"data": [s.path for s in job.data.sources], "heldout": [job.heldout.path]}
    return frozenset(
        name for name, paths in requested.items() if paths and [fingerprint(p) for p in paths] == recorded[name]
    )


def check_heldout(run_dir: Path, path: str, sha256: str, *, allow_change: bool) -> None:
    """Raise DataError when the held-out data are not what the run was evaluated on before.

    sha256: the fingerprint of the data at `path`.
    """
    if not allow_change and sha256 != (_evaluated_before(run_dir) or sha256):
        raise DataError(
            f"{path} holds other data than the run was evaluated on before: the losses could not be compared. "
            f"Restore it, or insist with --allow-config-change."
        )


def _evaluated_before(run_dir: Path) -> str:
    """The fingerprint of the data that step 0 was evaluated on; "" where no such result can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(run_dir / EVAL / HELDOUT_BEFORE)["sha256"])
    return ""


# Prefixes of the fields that may change on resume; TrainJob's docstring says why.
_MAY_CHANGE = ("name", "tracker", "checkpoint", "heldout.every_steps", "recompute", "log_every")


def changes_on_resume(
    old: dict[str, Any], job: TrainJob, steps_done: int, same_data: frozenset[str] = frozenset()
) -> list[str]:
    """The differences between a run's saved config and `job` that would make it another run, as 'path: old -> new'.

    Args:
        old: the encoded job of the run folder. A field that was added since then had its default.
        steps_done: steps of the checkpoint that would be resumed from.
        same_data: "data" and "heldout" where the data are the same, if stored elsewhere.
    """
    if not isinstance(old, dict):
        raise ConfigError(f"the saved config is a {type(old).__name__}, not that of a run: restore config.json.")
    old = completed(old)
    lines = diff(_with_moved_paths(old, encode(job), same_data), encode(job))
    refused = [line for line in lines if not _allowed(line.partition(": ")[0])]
    only_length = [line.partition(": ")[0] for line in refused] == ["num_steps"]
    before = old.get("num_steps")
    if only_length and isinstance(before, int) and job.num_steps >= steps_done and _same_rates(job, before, steps_done):
        return []
    return refused


def completed(old: dict[str, Any]) -> dict[str, Any]:
    """A saved job, encoded, with the defaults of the fields that were added since it was saved."""
    with suppress(ConfigError):  # a removed field, or not a job at all: the differences will show it
        return dict(encode(decode(TrainJob, old)))
    return old


def _with_moved_paths(old: dict[str, Any], new: dict[str, Any], same_data: frozenset[str]) -> dict[str, Any]:
    """`old` with the paths of `new` where both lead to the same data: spelled differently, or moved."""

    def with_path(then: Any, now: Any, moved: bool) -> Any:
        if not isinstance(then, dict) or not isinstance(now, dict) or not (then.get("path") and now.get("path")):
            return then
        same = moved or Path(then["path"]).resolve() == Path(now["path"]).resolve()
        return {**then, "path": now["path"]} if same else then

    if not all(isinstance(old.get(key), dict) for key in ("init", "heldout", "data")):
        return old  # not a job
    old = {**old, "init": with_path(old["init"], new["init"], False)}
    old["heldout"] = with_path(old["heldout"], new["heldout"], "heldout" in same_data)
    then = old["data"].get("sources")
    if isinstance(then, list) and len(then) == len(new["data"]["sources"]):
        pairs = zip(then, new["data"]["sources"], strict=True)
        old["data"] = {**old["data"], "sources": [with_path(a, b, "data" in same_data) for a, b in pairs]}
    return old


def _allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in _MAY_CHANGE)


def _same_rates(job: TrainJob, old_num_steps: int, steps_done: int) -> bool:
    return all(
        learning_rate(job.schedule, job.optimizer.lr, step, old_num_steps)
        == learning_rate(job.schedule, job.optimizer.lr, step, job.num_steps)
        for step in range(steps_done)
    )
