"""Proof that a run's checkpoints are whole, and that a resumed run is the run that was interrupted."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from earthshine.checkpoint import manifest as manifests
from earthshine.checkpoint import run_store
from earthshine.config import decode, parse_object
from earthshine.console import counted, log
from earthshine.errors import CheckpointError, ConfigError
from earthshine.run_folder import CHECKPOINTS, CONFIG, METRICS, checkpoint_folders, read_steps
from earthshine.train.job import TrainJob
from earthshine.train.loop import fit
from earthshine.verify.measure import result, row


def verify_checkpoint(run: str | Path, *, replay: bool = False, trust: bool = False) -> dict[str, Any]:
    """Check every checkpoint of a run folder (or one checkpoint folder).

    Rows, for each checkpoint: whether its manifest and every file's sha256 hold, whether it was made here (or `trust`),
    and the number of values that are not finite. With `replay`, the run is resumed from its second newest checkpoint
    in a scratch copy up to the newest one, and every tensor, loss, learning rate and sample id must be bit-equal.

    Raises CheckpointError when there is none, ConfigError when a replay is asked for and there are not two.
    """
    run = Path(run)
    folders = checkpoint_folders(run)
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint: give a run folder, or one of its checkpoints.")
    rows = [r for folder in folders for r in _rows(folder, trust)]
    if replay and all(r["ok"] for r in rows):
        if len(folders) < 2 or not (run / CONFIG).is_file():
            raise ConfigError(
                f"replay needs a run folder with two checkpoints; {run} has {len(folders)}. Keep more of them."
            )
        rows += _replay(run, folders[0], folders[1], trust)
    return result("checkpoint", {"run": str(run), "checkpoints": [f.name for f in folders]}, rows)


def _rows(folder: Path, trust: bool) -> list[dict[str, Any]]:
    try:
        manifest = manifests.read(folder)
        manifests.check_files(manifest)
    except CheckpointError as e:
        return [row(f"{folder.name}: damaged", 1, 0, str(e))]
    hashes = row(f"{folder.name}: files that differ from the manifest", 0, 0, counted(len(manifest.files), "file"))
    if not (manifest.trusted or trust):
        return [hashes, row(f"{folder.name}: not made here", 1, 0, "not read; --trust if you know where it is from")]
    checkpoint = run_store.latest(folder, trust=trust)
    assert checkpoint is not None
    not_finite = sum(
        int((~t.isfinite()).sum()) for t in run_store.read_tensors(checkpoint).values() if t.is_floating_point()
    )
    return [hashes, row(f"{folder.name}: values that are not finite", not_finite, 0)]


def _replay(run: Path, newest: Path, before: Path, trust: bool) -> list[dict[str, Any]]:
    """Resume from `before` in a copy of the run and compare with what the run itself did."""
    job = decode(TrainJob, parse_object((run / CONFIG).read_bytes(), run / CONFIG))
    manifest = manifests.read(newest)
    # It may have changed since, and only lines that stand for the same steps can be compared.
    job = replace(job, log_every=manifest.job.get("log_every", 1))
    last = manifest.step
    log(f"replaying from {before.name} to {newest.name}")
    with tempfile.TemporaryDirectory(dir=run.parent) as scratch:
        copy = Path(scratch) / "run"
        shutil.copytree(before, copy / CHECKPOINTS / before.name)
        for name in (CONFIG, METRICS):
            if (run / name).exists():
                shutil.copy(run / name, copy / name)
        summary = fit(job, copy, trust=trust, stop_after=last)
        assert summary.checkpoint is not None
        theirs, ours = run_store.latest(newest, trust=trust), run_store.latest(summary.checkpoint, trust=trust)
        assert theirs is not None and ours is not None
        a, b = run_store.read_tensors(theirs), run_store.read_tensors(ours)
        different = [name for name in a if not torch.equal(a[name], b[name])]
        replayed = range(manifests.read(before).step + 1, last + 1)
        lines_a, lines_b = (_step_lines(folder / METRICS, replayed) for folder in (run, copy))
    rows = [
        row(
            "replay: tensors that differ",
            len(different),
            0,
            f"{counted(len(a), 'tensor')} {', '.join(different[:3])}".strip(),
        )
    ]
    lost = len(lines_b.keys() - lines_a.keys())
    note = counted(len(lines_b), "step") + (f", {lost} of which {METRICS} has lost" if lost else "")
    for key in ("loss", "lr", "grad_norm", "samples"):
        unequal = sum(lines_a.get(step, {}).get(key) != line.get(key) for step, line in lines_b.items())
        rows.append(row(f"replay: steps that differ in {key}", unequal, 0, note))
    return rows


def _step_lines(path: Path, steps: range) -> dict[int, dict[str, Any]]:
    return {step: record for step, record in read_steps(path).items() if step in steps}
