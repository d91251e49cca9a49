"""Reading run folders, strictly: everything the report knows comes from here.

An absent file becomes None or empty, and the page says so; a damaged file is a DataError that names it.
"""

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from earthshine.console import log
from earthshine.errors import ConfigError, DataError
from earthshine.report.starts import Start, read_starts
from earthshine.run_folder import (
    CONFIG,
    ENV,
    EVAL,
    HELDOUT_AFTER,
    HELDOUT_BEFORE,
    METRICS,
    PLAN,
    SAMPLES_AFTER,
    SAMPLES_BEFORE,
    STARTS,
    json_lines,
)

_EVALUATIONS = f"{HELDOUT_BEFORE}, {HELDOUT_AFTER}, {SAMPLES_BEFORE}, {SAMPLES_AFTER} and verify-*.json"
# Columns of the step lines of metrics.jsonl that are numbers.
ROUTING = ("balance", "balance_loss", "z_loss", "max_violation", "dead_experts", "drop_rate")
SPEED = ("tokens_per_second", "mfu", "memory_gib")
MAX_LOGIT, HEADS_CLIPPED = "max_attention_logit", "heads_clipped"  # of QK-Clip
COLUMNS = (
    "loss", "grad_norm", "lr", "tokens", "total_tokens", "seconds", *SPEED, *ROUTING, MAX_LOGIT, HEADS_CLIPPED,
)  # fmt: skip
UPDATE_RMS = "update_rms."
WORST_LOAD, MEDIAN_LOAD = "load.worst", "load.median"  # the most loaded expert: of the worst layer, the middle one
LAYER_LOAD = "load.layer."  # of each


@dataclass
class Steps:
    """The step lines of metrics.jsonl as columns of equal length; NaN where a line has no finite number.

    Loads are multiples of the fair share: 1 when every expert of a layer receives the same number of tokens.
    """

    step: "array[int]" = field(default_factory=lambda: array("q"))
    stands_for: "array[int]" = field(default_factory=lambda: array("q"))  # steps up to this one, with `log_every`
    samples: "array[int]" = field(default_factory=lambda: array("Q"))  # head of the hash of the sample ids; 0: none
    columns: "dict[str, array[float]]" = field(default_factory=dict)
    first_load: tuple[int, dict[int, list[float]]] | None = None
    last_load: tuple[int, dict[int, list[float]]] | None = None

    def __len__(self) -> int:
        return len(self.step)

    def add(self, name: str, value: float) -> None:
        """Set column `name` of the step appended last."""
        column = self.columns.setdefault(name, array("d"))
        column.extend([math.nan] * (len(self.step) - 1 - len(column)))
        column.append(value)

    def column(self, name: str) -> "array[float]":
        """A whole column, empty when no line had it."""
        column = self.columns.get(name, array("d"))
        if column:
            column.extend([math.nan] * (len(self.step) - len(column)))
        return column

    @property
    def word(self) -> str:
        """What one line stands for, in the plural, for captions."""
        return "steps" if sum(self.stands_for) == len(self) else "logged steps"

    def finite(self, name: str) -> list[float]:
        return [v for v in self.column(name) if math.isfinite(v)]


@dataclass(frozen=True)
class Heldout:
    """A held-out evaluation. Losses are in nats per token; `sequences` are (loss, target tokens) in file order."""

    loss: float
    stderr: float
    bits_per_byte: float
    tokens: int = 0
    bytes: float = 0.0
    step: int | None = None
    sequences: tuple[tuple[float, int], ...] = ()
    identity: tuple[str, ...] = ()  # the window length, the hash of the text, and the masks, where the file gives them
    lossy: bool = False  # bits per byte are over bytes that the tokenizer could not spell


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str


@dataclass(frozen=True)
class Samples:
    label: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class CheckRow:
    """One measured value beside its tolerance; either may be text where it is not a number."""

    name: str
    measured: Any
    tolerance: Any
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Verification:
    file: str
    check: str
    subject: dict[str, Any]
    ok: bool
    rows: tuple[CheckRow, ...]


@dataclass
class Run:
    """One run folder. `notes` name what was absent, cut off or not understood."""

    path: Path
    name: str
    config: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    env: dict[str, Any] | None = None
    starts: list[Start] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    heldout_during: list[Heldout] = field(default_factory=list)
    before: Heldout | None = None
    after: Heldout | None = None
    samples_before: Samples | None = None
    samples_after: Samples | None = None
    verifications: list[Verification] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Any] | None:
        """The encoded ModelConfig, which training writes into the plan."""
        model = (self.plan or {}).get("model")
        return model if isinstance(model, dict) else None


def read_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Read run folders; runs of the same name also get the name of their folder.

    Raises ConfigError when there is none, one is given twice or is not a run folder; DataError for a damaged file.
    """
    if not paths:
        raise ConfigError("report needs at least one run folder: earthshine report RUN...")
    folders = [Path(p) for p in paths]
    for i, folder in enumerate(folders):
        if folder.resolve() in [f.resolve() for f in folders[:i]]:
            raise ConfigError(f"run folder {folder} is given twice; name each run once.")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        for i, run in enumerate(runs):
            run.name = f"{run.name} ({run.path.name})"
            run.name += f" #{i + 1}" if run.name in [r.name for r in runs[:i]] else ""
    return runs


def read_run(path: Path | str) -> Run:
    """Read one run folder. Raises ConfigError when `path` is not one, DataError for a damaged file."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"run folder {path} {what}; give a folder that `earthshine train` wrote.")
    if not (path / CONFIG).exists() and not (path / METRICS).exists():
        raise ConfigError(
            f"{path} is not a run folder: it has neither config.json nor metrics.jsonl; "
            "give a folder that `earthshine train` wrote."
        )
    run = Run(path=path, name=path.resolve().name)
    for name in (CONFIG, PLAN, ENV):
        if (path / name).exists():
            setattr(run, Path(name).stem, _load_object(path / name))
        else:
            run.notes.append(f"{name} is absent.")
    run.name = str((run.config or {}).get("name") or run.name)
    run.starts, damaged = read_starts(path / STARTS)
    if damaged:
        run.notes.append(f"{STARTS} is damaged in line {', '.join(map(str, damaged))} (not a JSON object); left out.")
    _read_metrics(path / METRICS, run)
    _read_evaluations(path / EVAL, run)
    return run


def _load_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} is not readable JSON: {e}. Restore it, or remove it to report without it.") from e
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not a JSON object. Restore it, or remove it.")
    return data


def _number(data: dict[str, Any], key: str, where: str) -> float:
    """A finite number, or DataError."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {key}={value!r} must be a finite number.")
    return float(value)


def _loose_number(data: dict[str, Any], key: str, where: str) -> float:
    """A number, NaN when it is absent, null or not finite (a diverged step); DataError for anything else."""
    value = data.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {key}={value!r} must be a number.")
    return float(value) if math.isfinite(value) else math.nan


def _read_metrics(path: Path, run: Run) -> None:
    """The step and held-out lines. Damaged lines are left out, with a note."""
    if not path.exists():
        run.notes.append("metrics.jsonl is absent: no training step was recorded.")
        return
    unknown: set[str] = set()
    damaged: list[int] = []
    for line in json_lines(path):
        data, where = line.record, f"{path} line {line.number}"
        if line.cut_off:
            run.notes.append("the last line of metrics.jsonl is cut off (the run is being written); left out.")
        elif data is None:
            damaged.append(line.number)
        elif data.get("kind") == "step":
            _add_step(run.steps, data, where)
        elif data.get("kind") == "heldout":
            run.heldout_during.append(_heldout(data, where))
        else:
            unknown.add(repr(data.get("kind")))
    if damaged:
        lines = f"line{'s' if len(damaged) > 1 else ''} {', '.join(map(str, damaged))}"
        run.notes.append(f"metrics.jsonl is damaged in {lines} (not a JSON object); left out.")
        log(f"warning: {path} is damaged in {lines}: left out of the report.")
    if unknown:
        run.notes.append(f"metrics.jsonl has lines of a kind that is not shown here: {', '.join(sorted(unknown))}.")
    if not len(run.steps):
        run.notes.append("metrics.jsonl has no training step.")


def _add_step(steps: Steps, data: dict[str, Any], where: str) -> None:
    step = data.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise DataError(f"{where}: step={step!r} must be an integer.")
    if steps.step and step <= steps.step[-1]:
        raise DataError(f"{where}: step {step} comes after step {steps.step[-1]}; steps must increase.")
    count = data.get("steps", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"{where}: steps={count!r} must be a positive integer: how many steps the line stands for.")
    steps.step.append(step)
    steps.stands_for.append(count)
    steps.samples.append(_hash_head(data.get("samples"), where))
    for name in COLUMNS:
        if name in data:
            steps.add(name, _loose_number(data, name, where))
    update_rms = data.get("update_rms") or {}
    if not isinstance(update_rms, dict):
        raise DataError(f"{where}: update_rms={update_rms!r} must be an object, algorithm -> number.")
    for algorithm in update_rms:
        steps.add(UPDATE_RMS + algorithm, _loose_number(update_rms, algorithm, f"{where}: update_rms"))
    if data.get("expert_load"):
        load = _relative_load(data["expert_load"], where)
        worst_of_layer = {layer: max(multiples) for layer, multiples in load.items()}
        for layer, worst in worst_of_layer.items():
            steps.add(f"{LAYER_LOAD}{layer}", worst)
        ordered = sorted(worst_of_layer.values())
        steps.add(WORST_LOAD, ordered[-1])
        steps.add(MEDIAN_LOAD, ordered[len(ordered) // 2])
        steps.first_load = steps.first_load or (step, load)
        steps.last_load = (step, load)


def _hash_head(value: Any, where: str) -> int:
    if value is None:
        return 0
    try:
        return int(value[:16], 16)
    except (TypeError, ValueError) as e:
        raise DataError(f"{where}: samples={str(value)[:60]!r} must be a hash in hex.") from e


def _relative_load(raw: Any, where: str) -> dict[int, list[float]]:
    """{"3": [fraction per expert]} as {layer: [multiple of the fair share per expert]}."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expert_load={raw!r} must be an object, layer -> fractions.")
    load = {}
    for layer, fractions in raw.items():
        try:
            total = math.fsum(fractions)
            valid = layer.isdecimal() and math.isfinite(total) and min(fractions) >= 0
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise DataError(f"{where}: expert_load[{layer!r}]={str(fractions)[:60]} must be fractions per expert.")
        load[int(layer)] = [len(fractions) * f / total if total else 0.0 for f in fractions]
    return dict(sorted(load.items()))


def _heldout(data: dict[str, Any], where: str) -> Heldout:
    losses, tokens = data.get("sequence_losses") or [], data.get("sequence_tokens") or []
    if not isinstance(losses, list) or not isinstance(tokens, list) or len(losses) != len(tokens):
        raise DataError(f"{where}: sequence_losses and sequence_tokens must be lists of the same length.")
    for i, (nats, count) in enumerate(zip(losses, tokens, strict=True)):
        _number({"sequence_losses": nats}, "sequence_losses", f"{where}[{i}]")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DataError(f"{where}: sequence_tokens[{i}]={count!r} must be a positive integer.")
    heldout = Heldout(
        loss=_number(data, "loss", where),
        stderr=math.nan if len(losses) == 1 else _loose_number(data, "stderr", where),  # none over one sequence
        bits_per_byte=_loose_number(data, "bits_per_byte", where),
        tokens=int(_number(data, "tokens", where)) if "tokens" in data else 0,
        bytes=_number(data, "bytes", where) if "bytes" in data else 0.0,
        step=int(_number(data, "step", where)) if "step" in data else None,
        sequences=tuple(zip(map(float, losses), tokens, strict=True)),
        identity=tuple(str(data[k]) for k in ("seq_len", "sha256", "document_attention") if k in data),
        lossy=bool(data.get("lost")),
    )
    if losses:
        mean = math.fsum(loss * n for loss, n in heldout.sequences) / sum(tokens)
        # The same sum in another order and precision: far looser than rounding, far tighter than a mix-up.
        if abs(mean - heldout.loss) > 1e-3 * max(1.0, abs(heldout.loss)):
            raise DataError(f"{where}: loss={heldout.loss} is not the token mean of sequence_losses, {mean:.6g}.")
    return heldout


def _read_evaluations(folder: Path, run: Run) -> None:
    for path in sorted(folder.glob("*.json")):
        data = _load_object(path)
        stem = path.stem
        if path.name in (HELDOUT_BEFORE, HELDOUT_AFTER):
            setattr(run, stem.removeprefix("heldout-"), _heldout(data, str(path)))
        elif path.name in (SAMPLES_BEFORE, SAMPLES_AFTER):
            setattr(run, stem.replace("-", "_"), _samples(data, str(path)))
        elif stem.startswith("verify"):
            run.verifications.append(_verification(data, path))
        else:
            run.notes.append(f"eval/{path.name} is not shown: it is none of {_EVALUATIONS}.")


def _samples(data: dict[str, Any], where: str) -> Samples:
    samples = data.get("samples")
    if not isinstance(samples, list):
        raise DataError(f"{where}: samples={samples!r} must be a list of {{prompt, text}}.")
    for i, s in enumerate(samples):
        if not isinstance(s, dict) or not isinstance(s.get("prompt"), str) or not isinstance(s.get("text"), str):
            raise DataError(f"{where}: samples[{i}] must be an object with the texts 'prompt' and 'text'.")
    return Samples(str(data.get("label", "")), tuple(Sample(s["prompt"], s["text"]) for s in samples))


def _verification(data: dict[str, Any], path: Path) -> Verification:
    rows, subject = data.get("rows"), data.get("subject", {})
    if not isinstance(rows, list) or not isinstance(data.get("ok"), bool):
        raise DataError(f"{path}: a verification needs 'ok' (true or false) and 'rows' (a list).")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or "name" not in row or not isinstance(row.get("ok"), bool):
            raise DataError(f"{path}: rows[{i}] needs 'name', 'measured', 'tolerance' and 'ok' (true or false).")
        numbers = [v for v in (row.get("measured"), row.get("tolerance")) if isinstance(v, float)]
        if row["ok"] and not all(map(math.isfinite, numbers)):
            raise DataError(f"{path}: rows[{i}] says ok=true of numbers that are not finite; run the check again.")
    if data["ok"] and not all(row["ok"] for row in rows):
        raise DataError(f"{path}: says ok=true but has a row that does not hold; run the verification again.")
    return Verification(
        file=f"eval/{path.name}",
        check=str(data.get("check", path.stem)),
        subject=subject if isinstance(subject, dict) else {"subject": subject},
        ok=data["ok"],
        rows=tuple(
            CheckRow(str(r["name"]), r.get("measured"), r.get("tolerance"), r["ok"], str(r.get("note") or ""))
            for r in rows
        ),
    )
