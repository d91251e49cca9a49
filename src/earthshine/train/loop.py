"""`fit`: train a job to its last step, resuming if the run folder has a checkpoint."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from earthshine.checkpoint import run_store
from earthshine.checkpoint.run_store import Checkpoint
from earthshine.config import encode, parse_object
from earthshine.console import log
from earthshine.data.heldout import check_beside_training
from earthshine.data.loader import SampleId
from earthshine.device import (
    DTYPES,
    ComputeChoice,
    Readings,
    Stopwatch,
    choose_compute_dtype,
    environment,
    gemm_peak,
    make_matmuls_repeatable,
    peak_memory_bytes,
    read,
)
from earthshine.device import pick_device as pick_device_by_name
from earthshine.errors import ConfigError, DataError, InterruptedRunError, TrainingDivergedError
from earthshine.evaluate.perplexity import heldout_loss
from earthshine.files import expand_home, write_json
from earthshine.optim.groups import describe
from earthshine.optim.schedule import learning_rate
from earthshine.run_folder import EVAL, HELDOUT_AFTER, HELDOUT_BEFORE, METRICS, step_folder
from earthshine.train.claim import claim, remove_leftovers
from earthshine.train.derive import Derived, derive
from earthshine.train.interrupts import Interrupts
from earthshine.train.job import TrainJob
from earthshine.train.metrics import MetricsFile, heldout_line, routing_record, samples_digest, step_line
from earthshine.train.resume import check_config, check_heldout, same_data
from earthshine.train.starts import earlier_warnings, record_start
from earthshine.train.state import TrainState, build_state
from earthshine.train.step import Objective, StepResult, train_step
from earthshine.train.trackers import NoTracker, Tracker, make_tracker, require_tracker

_ETA_STEPS = 20


@dataclass(frozen=True)
class RunSummary:
    """Where a call of `fit` ended. Held-out results are those of `evaluate.perplexity.heldout_loss`; {} for none.

    loss: of the last step; None where metrics.jsonl lacks it, which is logged.
    """

    run_dir: Path
    step: int
    num_steps: int
    total_tokens: int
    loss: float | None
    heldout_before: dict[str, Any]
    heldout_after: dict[str, Any]
    checkpoint: Path | None

    @property
    def finished(self) -> bool:
        return self.step == self.num_steps


def fit(
    job: TrainJob,
    run_dir: str | Path | None = None,
    *,
    device: str = "auto",
    trust: bool = False,
    allow_config_change: bool = False,
    stop_after: int | None = None,
) -> RunSummary:
    """Train `job` in a run folder; a run that is not finished there is resumed, bit for bit.

    Args:
        run_dir: "runs/" and the job's name when None.
        trust: read checkpoints that were not made by this user on this machine.
        allow_config_change: resume although the folder's config differs.
        stop_after: save and return after this step, as if the run had been interrupted there; None for the end.

    Raises ConfigError for a job that cannot run, or a folder of another config; DataError, WeightsError,
    CheckpointError and DiskFullError for files; TrainingDivergedError, which names the last good checkpoint, for a loss
    or gradient that is not finite; InterruptedRunError after SIGTERM, SIGINT or SIGHUP, when the run is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training runs in one process; start it without torchrun."
        )
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after={stop_after} must be at least 1.")
    require_tracker(job.tracker)
    folder = Path("runs") / job.name if run_dir is None else Path(expand_home(str(run_dir)))
    where = pick_device_by_name(device)
    # Signals are heeded from here on: hashing data and reading a checkpoint can take minutes, too.
    with claim(folder), _reproducible(where, job.seed), Interrupts() as interrupts:
        point = _resume_point(job, folder, trust=trust, allow_config_change=allow_config_change)
        run = _build(job, folder, where, point, trust=trust, allow_config_change=allow_config_change)
        _prepare_folder(run, point)
        _announce(run, point)
        with closing(make_tracker(job.tracker, folder, run.state.step + 1)) as run.tracker:
            return _loop(run, interrupts, min(stop_after or job.num_steps, job.num_steps))


@contextmanager
def _reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded, with deterministic kernels; the caller's random state and settings come back afterwards.

    Strictly, not `warn_only`: torch's attention kernels are deterministic in the backward pass only then. Every
    operation of a step has a deterministic form (tests/unit/train/test_step.py).
    """
    import torch.utils.deterministic as deterministic

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    accelerators = [] if device.type == "cpu" else [device]
    if not make_matmuls_repeatable(device):
        log(
            "warning: the accelerator was in use before training began: if cuBLAS had read its settings by then, a "
            "resumed run may differ in the last bits. Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
        )
    with torch.random.fork_rng(devices=accelerators):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _ResumePoint:
    """Where a start begins. checkpoint: None for the first step. same_data: see `resume.same_data`.

    warned: the warnings of the start before.
    """

    checkpoint: Checkpoint | None
    same_data: frozenset[str]
    warned: tuple[str, ...]


def _resume_point(job: TrainJob, folder: Path, *, trust: bool, allow_config_change: bool) -> _ResumePoint:
    """The latest valid checkpoint, if this job may be resumed from it (`train.resume`)."""
    checkpoint = run_store.latest(folder, trust=trust)
    done, saved = (checkpoint.step, checkpoint.job) if checkpoint else (0, None)
    same = same_data(folder, job, checkpoint.state["loader"]["fingerprints"] if checkpoint else ())
    check_config(folder, job, done, allow_change=allow_config_change, saved=saved, same_data=same)
    return _ResumePoint(checkpoint, same, earlier_warnings(folder) if checkpoint else ())


class _Done(NamedTuple):
    """A step whose numbers are not recorded yet."""

    result: StepResult
    samples: tuple[SampleId, ...]
    stopwatch: Stopwatch


@dataclass
class _Run:
    """What a call of `fit` works with."""

    job: TrainJob
    folder: Path
    derived: Derived
    compute: ComputeChoice
    state: TrainState
    metrics: MetricsFile
    saved: Path | None = None  # the newest checkpoint
    tracker: Tracker = field(default_factory=NoTracker)
    unrecorded: list[_Done] = field(default_factory=list)  # steps since the last record
    doubted_peak: bool = False
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_ETA_STEPS))  # per step


def _build(
    job: TrainJob, folder: Path, device: torch.device, point: _ResumePoint, *, trust: bool, allow_config_change: bool
) -> _Run:
    """Model, optimizer and data at the resume point. Nothing is written: what cannot be trained or saved fails now."""
    checkpoint = point.checkpoint
    derived = derive(job, model=checkpoint.model if checkpoint else None)
    compute = _compute(job, device, checkpoint)
    state = build_state(job, device, compute.dtype, checkpoint, trust=trust, allow_config_change=allow_config_change)
    if job.heldout.path:
        sha256 = check_beside_training(job.heldout.path, state.loader)
        check_heldout(folder, job.heldout.path, sha256, allow_change=allow_config_change or checkpoint is None)
    if state.step < job.num_steps:
        every = job.checkpoint.every_steps
        saves = 1 + ((job.num_steps - 1) // every - state.step // every if every else 0)
        run_store.check_can_save(folder, state.tensors(), saves=saves, keep=job.checkpoint.keep)
    metrics, saved = MetricsFile(folder / METRICS), checkpoint.folder if checkpoint else None
    return _Run(job, folder, derived, compute, state, metrics, saved)


def _prepare_folder(run: _Run, point: _ResumePoint) -> None:
    """Record the start, and remove what does not belong to the steps that are kept."""
    job, folder, checkpoint, done = run.job, run.folder, point.checkpoint, run.state.step
    place = environment(run.state.device) | run.state.resolved_dtypes
    place |= {"compute_reason": run.compute.reason, "peak_flops": run.compute.peak_flops}
    record_start(
        folder,
        job,
        run.derived,
        run.state.model.config,
        place,
        done=done,
        saved=checkpoint.job if checkpoint else None,
        same_data=point.same_data,
    )
    remove_leftovers(folder)
    if checkpoint:
        run_store.tidy(folder, keep=job.checkpoint.keep, newest=checkpoint.folder)
        run.metrics.truncate_after(done)
    else:  # nothing is kept, not even the evaluation before step 1: weights or data may have changed since
        run.metrics.path.unlink(missing_ok=True)
        (folder / EVAL / HELDOUT_BEFORE).unlink(missing_ok=True)
    if done < job.num_steps:  # a run that was lengthened has not reached its end
        (folder / EVAL / HELDOUT_AFTER).unlink(missing_ok=True)


def _announce(run: _Run, point: _ResumePoint) -> None:
    """Log what will be trained: at the first start all of it, later only what is new."""
    job, state, done = run.job, run.state, run.state.step
    if point.checkpoint is None:
        groups = describe(state.optimizer, state.model)
        log(f"{run.derived.table(run.compute.peak_flops)}\n\n{groups}\n")
    if done < job.num_steps:
        for warning in run.derived.warnings:
            if warning not in point.warned:
                log(f"warning: {warning}")
        log(
            f"computing in {state.resolved_dtypes['compute_dtype']} ({run.compute.reason}), "
            f"Newton-Schulz in {state.resolved_dtypes['ns_dtype']}"
        )
        if point.checkpoint:
            log(f"resuming from {point.checkpoint.folder}")
    else:
        log(f"all {done} steps are done in {run.folder}")


def _compute(job: TrainJob, device: torch.device, checkpoint: Checkpoint | None) -> ComputeChoice:
    """The compute dtype: what the run began with where the job leaves it open, because a measurement can change."""
    if checkpoint is None or job.compute_dtype != "auto":
        return choose_compute_dtype(job.compute_dtype, device)
    dtype = DTYPES[checkpoint.state["choices"]["compute_dtype"]]
    return ComputeChoice(dtype, "as at the first start", gemm_peak(device, dtype))


def _loop(run: _Run, interrupts: Interrupts, last_step: int) -> RunSummary:
    job, state = run.job, run.state
    if not interrupts.requested:
        _evaluate_if_due(run)
    while state.step < last_step and not interrupts.requested:
        _step(run)
        every = job.checkpoint.every_steps
        if state.step == last_step or interrupts.requested or (every and state.step % every == 0):
            _save(run)
        if not interrupts.requested:
            _evaluate_if_due(run)
    if interrupts.requested and not _complete(run):
        if run.saved != step_folder(run.folder, state.step):
            _save(run)
        raise InterruptedRunError(
            f"{interrupts.name} after step {state.step} of {job.num_steps}: saved in {run.saved}. "
            f"Run the same command to resume."
        )
    evals = run.folder / EVAL
    return RunSummary(
        run_dir=run.folder,
        step=state.step,
        num_steps=job.num_steps,
        total_tokens=state.total_tokens,
        loss=run.metrics.loss_at(state.step),
        heldout_before=_read_result(evals / HELDOUT_BEFORE),
        heldout_after=_read_result(evals / HELDOUT_AFTER),
        checkpoint=run.saved,
    )


def _read_result(path: Path) -> dict[str, Any]:
    """A held-out result; {} where there is none or, with a warning, none that can be read."""
    if not path.exists():
        return {}
    try:
        return parse_object(path.read_bytes(), path, "It is left out.")
    except ConfigError as e:
        log(f"warning: {e}")
        return {}


def _complete(run: _Run) -> bool:
    at_end = run.state.step == run.job.num_steps
    return at_end and (not run.job.heldout.path or run.metrics.heldout_at(run.state.step) is not None)


def _step(run: _Run) -> None:
    """One step and, every `log_every` steps, its line and record."""
    job, state, stopwatch = run.job, run.state, Stopwatch(run.state.device)
    try:
        with stopwatch:
            lr = learning_rate(job.schedule, job.optimizer.lr, state.step, job.num_steps)
            batch = state.loader.next_step()
            micro = job.sequences_per_micro_batch
            result = train_step(state, batch, lr=lr, micro_batch=micro, clip=job.clip_grad_norm)
            if state.step < job.num_steps:
                state.loader.read_ahead()  # an accelerator is still computing
    except TrainingDivergedError as e:
        _record(run, routing=False)  # the steps before; the model's counts are already those of this one
        raise _diverged(run, str(e)) from e
    except DataError:
        _record(run, routing=False)
        raise
    run.unrecorded.append(_Done(result, batch.sample_ids, stopwatch))
    if state.step % job.log_every == 0:
        _record(run)


def _record(run: _Run, *, routing: bool = True) -> None:
    """Line and record of the steps since the last: the one place where their numbers are waited for, all at once.

    Losses, norms, logits and routing are those of the last of these steps; tokens, times and samples are of all.
    routing: whether the model still has the counts of that step.
    """
    if not run.unrecorded:
        return
    job, state, peak = run.job, run.state, run.compute.peak_flops
    done, run.unrecorded = run.unrecorded, []
    results = [step.result for step in done]
    sample_ids = [i for step in done for i in step.samples]
    last = results[-1]
    counts, dropped = (state.model.expert_counts(), state.model.dropped_counts()) if routing else ({}, {})
    routed = Readings(*counts.values(), *dropped.values())
    read(*(readings for result in results for readings in result.readings), routed, state.optimizer.measure())
    try:
        for result in results:
            result.require_finite()
    except TrainingDivergedError as e:
        raise _diverged(run, str(e)) from e
    seconds, tokens = sum(step.stopwatch.seconds for step in done), sum(result.num_targets for result in results)
    computing = sum(result.forward_backward_seconds for result in results)
    record: dict[str, Any] = {
        "kind": "step",
        "step": state.step,
        **({"steps": len(results)} if len(results) > 1 else {}),
        "loss": last.objective.loss,
        "grad_norm": last.grad_norm,
        "lr": state.optimizer.param_groups[0]["lr"],
        "tokens": tokens,
        "total_tokens": state.total_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": run.derived.forward_backward_flops_per_step * len(results) / computing / peak,
        "memory_gib": peak_memory_bytes(state.device) / 2**30,
        "update_rms": dict(state.optimizer.last_stats["update_rms"]),
        "samples": samples_digest(sample_ids),
    }
    if counts:
        whole = [[int(n) for n in values] for values in routed.values]
        loads = dict(zip(counts, whole[: len(counts)], strict=True))
        lost = {layer: n for layer, (n,) in zip(dropped, whole[len(counts) :], strict=True)}
        record |= routing_record(loads, lost if job.capacity.factor else None)
    if state.model.config.is_moe:
        record |= _balance(job, last.objective)
    if last.clipped_logits is not None:
        (record["max_attention_logit"],), (heads_clipped,) = last.clipped_logits.values
        record["heads_clipped"] = int(heads_clipped)
    run.metrics.append(record)
    run.tracker.record(record)
    if record["mfu"] > 1 and not run.doubted_peak:
        run.doubted_peak = True
        log(
            f"warning: mfu is above 100%: step {state.step} ran at more FLOP/s than the GEMM peak measured at "
            f"start-up, {peak / 1e9:,.0f} GFLOP/s; mfu is the ratio of the two"
        )
    run.seconds.append(seconds / len(results))
    eta = sum(run.seconds) / len(run.seconds) * (job.num_steps - state.step)
    log(step_line(record, job.num_steps, eta))


def _balance(job: TrainJob, objective: Objective) -> dict[str, float]:
    """What a step's record says of the losses that keep experts balanced."""
    record: dict[str, float] = {}
    if job.balance.loss != "none":
        record |= {"balance_loss": objective.balance_loss, "balance": objective.balance}
    if job.balance.z_coefficient:
        record["z_loss"] = objective.z_loss
    return record


def _save(run: _Run) -> None:
    _record(run)  # every step before a checkpoint is recorded, and finite
    state = run.state
    try:
        state.check_finite()
    except TrainingDivergedError as e:
        raise _diverged(run, str(e)) from e
    run.metrics.sync()
    run.saved = run_store.save(
        run.folder,
        step=state.step,
        tensors=state.tensors(),
        state=state.metadata(),
        model=state.model.config,
        job=encode(run.job),
        keep=run.job.checkpoint.keep,
        tokenization=state.loader.tokenization,
    )
    log(f"saved {run.saved}")


def _diverged(run: _Run, what: str) -> TrainingDivergedError:
    if run.saved is None:
        advice = "There is no checkpoint yet. Lower optimizer.lr or warm up longer, and start again."
    else:
        advice = (
            f"The last good checkpoint is {run.saved}: start a new run from it with "
            f'init={{"kind": "checkpoint", "path": "{run.saved}"}} and a lower optimizer.lr or clip_grad_norm.'
        )
    return TrainingDivergedError(f"training diverged: {what} Nothing was saved since. {advice}")


def _evaluate_if_due(run: _Run) -> None:
    """The held-out evaluation of this step, unless none is due or it was done before an interruption."""
    job, step = run.job, run.state.step
    every = job.heldout.every_steps
    due = step in (0, job.num_steps) or (every and step % every == 0)
    if not (job.heldout.path and due) or run.metrics.heldout_at(step) is not None:
        return
    _record(run)
    try:
        result = heldout_loss(
            run.state.model,
            job.heldout.path,
            seq_len=job.seq_len,
            max_sequences=job.heldout.max_sequences,
            batch=job.sequences_per_micro_batch,
            document_attention=job.data.document_attention,
        )
    except TrainingDivergedError as e:
        raise _diverged(run, str(e)) from e
    for at, name in ((0, HELDOUT_BEFORE), (job.num_steps, HELDOUT_AFTER)):
        if step == at:
            write_json(run.folder / EVAL / name, result)
    record = {"kind": "heldout", "step": step}
    record |= {key: result[key] for key in ("loss", "stderr", "bits_per_byte", "tokens", "lost")}
    run.metrics.append(record)
    run.tracker.record(record)
    log(heldout_line(record))
