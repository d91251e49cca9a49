"""Training checkpoints on torch.distributed.checkpoint: atomic, hashed, signed, the last k kept.

A checkpoint appears whole or not at all (`staging`): every file is fsynced, its manifest last. Reading verifies the
manifest and the sha256 of every file before anything is unpickled; a damaged checkpoint is passed over, with a warning,
for the one before it.
"""

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthshine.checkpoint import manifest as manifests
from earthshine.checkpoint.manifest import Manifest
from earthshine.config import encode, read_json
from earthshine.console import human_bytes, log
from earthshine.data.tokenization import Tokenization
from earthshine.errors import CheckpointError, ConfigError
from earthshine.files import free_bytes, require_space, write_json
from earthshine.model.config import ModelConfig
from earthshine.run_folder import CHECKPOINTS, STEP_FOLDERS, checkpoint_folders, step_folder, step_folders
from earthshine.staging import discard, remove_leftovers, staged_directory

MODEL_PREFIX = "model."
_TENSORS = "tensors"
_STATE = "state.json"
_SLACK_BYTES = 1 << 20  # index, manifest and headers beside the tensors
_SPACE_HINT = "Free some space, or lower checkpoint.keep, then run the same command again."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hashes hold and which may be read. `state` is what was saved beside the tensors.

    tokenization: see `manifest.Manifest`.
    """

    folder: Path
    step: int
    model: ModelConfig
    job: dict[str, Any]
    state: dict[str, Any]
    tokenization: Tokenization | None = None


def save(
    run_dir: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    model: ModelConfig,
    job: Mapping[str, Any],
    keep: int,
    tokenization: Tokenization | None = None,
) -> Path:
    """Write `RUN/checkpoints/step-NNNNNN`, then delete all but the newest `keep` (0: keep all). Returns the folder.

    Args:
        tensors: by name; those of the model begin with "model.".
        state: JSON-ready. Floats come back bit for bit.
        model: so that loading never needs the job.
        job: the encoded job, to read and to compare with at a resume.
        tokenization: how the run's texts became ids, for whoever prompts, evaluates or exports its model.

    Raises DiskFullError when there is no room; then no trace of this checkpoint is left.
    """
    final = step_folder(run_dir, step)
    _remove_leftovers(run_dir)
    needed = _bytes_of(tensors)
    require_space(final, needed, _SPACE_HINT)
    with staged_directory(
        final, replace=True
    ) as staging:  # one that exists is damaged, or we would have resumed from it
        _write_tensors(staging / _TENSORS, tensors, final, needed)
        write_json(staging / _STATE, dict(state))
        manifests.write(staging, step=step, model=encode(model), job=dict(job), tokenization=tokenization)
    _discard_old(run_dir, keep, final)
    return final


def check_can_save(run_dir: Path, tensors: Mapping[str, Tensor], *, saves: int, keep: int) -> None:
    """Find out, before there is anything to lose, whether `save` could write a checkpoint of `tensors`.

    saves: how many are planned. Warns when there is room for one but not for all that will be there at once. Leaves
    nothing behind but the signing key. Raises ConfigError for the key, the folder or names in it, DiskFullError.
    """
    manifests.signing_key()
    parent = run_dir / CHECKPOINTS
    for path in (parent, *parent.glob(STEP_FOLDERS)):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file where a checkpoint's folder belongs: move it away.")
    where = parent if parent.exists() else run_dir
    try:
        _remove_leftovers(run_dir)
        with tempfile.TemporaryFile(dir=where):
            free = free_bytes(where)
    except OSError as e:
        raise ConfigError(f"{where} cannot hold checkpoints: {e}. Make it writable, or choose another --run.") from e
    needed = _bytes_of(tensors)
    require_space(parent, needed, _SPACE_HINT)
    present = len(step_folders(run_dir))
    most = min(present + saves, keep + 1) if keep else present + saves  # the oldest goes when the newest is complete
    if free < needed * (most - present):
        log(
            f"warning: {most} checkpoints of {human_bytes(needed)} will be in {parent} at once; {human_bytes(free)} "
            f"are free there, enough for {free // needed} more. Free some space, or lower checkpoint.keep."
        )


def latest(path: Path, *, trust: bool = False) -> Checkpoint | None:
    """The newest valid checkpoint of a run folder, or of its checkpoints/, or that checkpoint; None if there is none.

    A damaged one is skipped with a logged warning. Raises CheckpointError when all are damaged, or when the newest
    sound one was not made here and `trust` is not set.
    """
    problems = []
    for folder in checkpoint_folders(Path(path)):
        try:
            manifest = manifests.read(folder)
            if folder.parent.name == CHECKPOINTS and folder != step_folder(folder.parent.parent, manifest.step):
                raise CheckpointError(f"its manifest is of step {manifest.step}: the folder was renamed.")
            manifests.check_files(manifest)
        except CheckpointError as e:
            problems.append(str(e))
            log(f"warning: checkpoint {folder.name} is damaged and is skipped: {e}")
            continue
        manifests.require_trust(manifest, trust)
        return _open(manifest)
    if problems:
        raise CheckpointError(
            f"{path} has no valid checkpoint: {' '.join(problems)} Delete {CHECKPOINTS}/ there to begin again."
        )
    return None


def read_into(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], optional: Collection[str] = ()) -> set[str]:
    """Fill `tensors` in place.

    optional: names that either side may lack, or hold in another shape or dtype. Those left out for such a reason are
    returned.
    Raises CheckpointError unless all other names, shapes and dtypes are those of the checkpoint.
    """
    saved = _metadata(checkpoint.folder)
    _check_names(checkpoint.folder, set(saved).difference(optional), set(tensors).difference(optional))
    filled = {}
    for name, tensor in tensors.items():
        shape, dtype = saved.get(name, (None, None))
        if shape == tuple(tensor.shape) and dtype == tensor.dtype:
            filled[name] = tensor
        elif name not in optional:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} was saved as {dtype} {list(shape or ())}, "
                f"this job has it as {tensor.dtype} {list(tensor.shape)}."
            )
    _read_tensors(checkpoint.folder, filled)
    return {name for name in optional if name not in filled and (name in saved or name in tensors)}


def read_tensors(checkpoint: Checkpoint, prefix: str = "") -> dict[str, Tensor]:
    """New tensors on the CPU: those whose names begin with `prefix`."""
    saved = _metadata(checkpoint.folder)
    tensors = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in saved.items() if n.startswith(prefix)}
    _read_tensors(checkpoint.folder, tensors)
    return tensors


def load_model_state(path: str | Path, *, trust: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of the latest valid checkpoint of a run folder, or of that checkpoint folder; tensors on the CPU.

    Raises CheckpointError when there is none, all are damaged, or it was not made here and `trust` is not set.
    """
    checkpoint = latest(Path(path), trust=trust)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run folder with {CHECKPOINTS}/step-*, or one of those."
        )
    tensors = read_tensors(checkpoint, MODEL_PREFIX)
    return checkpoint.model, {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in tensors.items()}


def tidy(run_dir: Path, *, keep: int, newest: Path) -> None:
    """Delete what a save that was killed, at any moment, would have left for the next one to delete.

    newest: the checkpoint that is resumed from. Where a damaged one is newer, none is deleted.
    """
    _remove_leftovers(run_dir)
    if step_folders(run_dir)[0] == newest:
        _discard_old(run_dir, keep, newest)


def _discard_old(run_dir: Path, keep: int, newest: Path) -> None:
    for old in step_folders(run_dir)[keep:] if keep else ():
        if old != newest:
            discard(old)


def _remove_leftovers(run_dir: Path) -> None:
    remove_leftovers(run_dir / CHECKPOINTS, STEP_FOLDERS)


def _open(manifest: Manifest) -> Checkpoint:
    state = read_json(manifest.folder / _STATE)
    return Checkpoint(manifest.folder, manifest.step, manifest.model, manifest.job, state, manifest.tokenization)


@contextmanager
def _single_process() -> Iterator[None]:
    """torch.distributed.checkpoint warns when there is no process group; one process is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], final: Path, needed: int) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    try:
        with _single_process():
            save_distributed(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=True)
    except (CheckpointException, RuntimeError) as e:  # how torch's zip writer says that a write was cut short
        require_space(final, needed, _SPACE_HINT)
        raise CheckpointError(f"{final} could not be written: {e}") from e


def _read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

    try:
        with _single_process():
            load_distributed(dict(tensors), storage_reader=FileSystemReader(folder / _TENSORS), no_dist=True)
    except CheckpointException as e:
        raise CheckpointError(f"{folder} could not be read although its hashes hold: {e}") from e


def _metadata(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each saved tensor. Unpickles the index: only for folders whose hashes hold."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = FileSystemReader(folder / _TENSORS).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _check_names(folder: Path, saved: set[str], wanted: set[str]) -> None:
    for names, what in ((wanted - saved, "has no"), (saved - wanted, "has the unknown")):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise CheckpointError(
                f"{folder} {what} tensor{'s' if len(names) > 1 else ''} {shown} ({len(names)} in total)."
            )


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """What a checkpoint of these tensors takes on the disk, at most."""
    return sum(t.nbytes for t in tensors.values()) + _SLACK_BYTES
