"""Carries out a plan offline: every target tensor is streamed into a Hugging Face directory."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from earthshine.checkpoint.accounting import check_tied_copies
from earthshine.checkpoint.hf import SPARE_BYTES, write_model
from earthshine.checkpoint.safetensors_store import row_blocks
from earthshine.checkpoint.safetensors_writer import OutputTensor
from earthshine.checkpoint.tokenizer_class import warn_of_ids_beyond
from earthshine.config import read_json
from earthshine.console import log, progress
from earthshine.errors import WeightsError
from earthshine.files import require_space, sha256_file, write_json
from earthshine.run_folder import UPCYCLING
from earthshine.staging import require_absent, staged_directory, staging_path
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.plan import Target, UpcyclePlan, plan_upcycle
from earthshine.upcycle.tensor_rules import TensorRule

KEEP_BYTES = 256 << 20  # a source no larger than this is held while all its targets are written, and so read once


def upcycle(
    dense_dir: str | Path,
    out_dir: str | Path,
    options: UpcycleConfig | None = None,
    *,
    after_shard: Callable[[Path], None] = lambda path: None,
) -> UpcyclePlan:
    """Convert a dense Hugging Face directory into an MoE that computes the same function.

    Memory is that of one source matrix at most. `out_dir` appears when it is complete; the same call resumes a killed
    conversion at the last complete file. Returns the plan with its ledger.

    Args:
        after_shard: called with the path of each weight file once it is on the disk.
    Raises ConfigError or OutputExistsError for the request, WeightsError for the source, DiskFullError.
    """
    out_dir = Path(out_dir)
    require_absent(out_dir)
    plan = plan_upcycle(dense_dir, options)
    warn_of_ids_beyond(plan.files, plan.target_config.vocab_size, dense_dir)
    if plan.reading is not None and plan.reading.before != plan.reading.after:
        log(plan.reading.sentence + ".")
    _check_space(plan, out_dir)
    check_tied_copies(plan.store, plan.unused)
    resume = plan.resume_key()
    with (
        staged_directory(out_dir, resume=resume) as staging,
        progress(f"upcycle to {out_dir}", plan.num_bytes, "B") as bar,
    ):
        records = write_model(
            staging,
            plan.target_config,
            _output_tensors(plan),
            plan.files,
            max_shard_bytes=max(1, int(plan.options.max_shard_gib * 2**30)),
            on_bytes=bar.advance,
            after_shard=after_shard,
        )
        if plan.source_files() != resume["source_files"]:
            raise WeightsError(f"{dense_dir} was changed while it was converted: nothing was kept; convert it again.")
        files = {name: asdict(record) for name, record in sorted(records.items())}
        write_json(staging / UPCYCLING, plan.to_json() | {"files": files})
    return plan


def _output_tensors(plan: UpcyclePlan) -> list[OutputTensor]:
    reader = TargetReader(plan)
    return [OutputTensor(t.entry.hf, t.dtype, t.entry.shape, partial(reader.rows, t)) for t in plan.targets]


class TargetReader:
    """Makes the rows of the targets. Those with equal rules follow each other and share what was read."""

    def __init__(self, plan: UpcyclePlan) -> None:
        self._store = plan.store
        self._cache: list[Tensor] = []
        self._cached_rule: TensorRule | None = None
        rules = list(dict.fromkeys(t.rule for t in plan.targets))
        self._next_rule = dict(zip(rules, rules[1:], strict=False))

    def rows(self, target: Target) -> Iterator[Tensor]:
        """The rows of one target in order."""
        if target.rule == self._cached_rule:
            yield from self._cache
            return
        self._cache, self._cached_rule = [], None
        if target.rule in self._next_rule:
            self._read_ahead(self._next_rule[target.rule])
        keep = target.num_bytes <= KEEP_BYTES
        for rows in row_blocks(target.entry.shape, target.dtype.itemsize):
            block = target.rule.read(self._store, rows)
            if keep:
                self._cache.append(block)
            yield block
        if keep:
            self._cached_rule = target.rule

    def _read_ahead(self, rule: TensorRule) -> None:
        """While the disk takes this rule's targets, let it fetch the next one's source."""
        for name in rule.sources:
            if self._store.info(name).num_bytes <= KEEP_BYTES:
                self._store.read_ahead(name)


def _check_space(plan: UpcyclePlan, out_dir: Path) -> None:
    """Raises DiskFullError, before anything is written, when the output cannot fit; counts what a killed one left."""
    staging = staging_path(out_dir)
    present = sum(p.stat().st_size for p in staging.iterdir() if p.is_file()) if staging.is_dir() else 0
    hint = "Free some space, or choose another folder, fewer experts or fewer layers."
    require_space(out_dir, plan.num_bytes + SPARE_BYTES - present, hint)


def check_upcycled_files(directory: str | Path) -> int:
    """Hash every file that the earthshine.json of an upcycled directory lists; returns how many there are.

    Raises WeightsError where that is missing, and for a file that is missing or has other contents.
    """
    path = Path(directory) / UPCYCLING
    try:
        files = read_json(path)["files"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"{path} is not a readable record of an upcycling: {type(e).__name__} {e}.") from e
    for name, record in files.items():
        file = path.parent / name
        if not file.is_file() or file.stat().st_size != record["bytes"] or sha256_file(file) != record["sha256"]:
            raise WeightsError(f"{file} is missing or differs from {UPCYCLING}: the directory was changed or damaged.")
    return len(files)
