"""`earthshine train`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from earthshine.cli.arguments import REPEATED, Positional
from earthshine.cli.options import json_text, print_json, print_outcome, shell_quoted
from earthshine.config import diff, encode, load_json, not_defaults, override
from earthshine.console import log
from earthshine.errors import ConfigError, nearest
from earthshine.run_folder import CONFIG, is_run, run_of

if TYPE_CHECKING:
    from earthshine.train.job import TrainJob

DESCRIPTION = """Run a job, or resume it: the same command does both.

A job is the name of a recipe (`earthshine ls recipes`) or a JSON file; key=value changes one of its fields. The run
folder gets config.json, plan.json, env.json, metrics.jsonl and checkpoints. SIGTERM, SIGINT and SIGHUP save and exit
with 75."""
EXAMPLES = (
    (
        "steps, tokens, parameters, FLOPs and memory, before anything runs",
        "earthshine train tiny --data data/docs --dry-run",
    ),
    (
        "a recipe with other values; `earthshine show tiny_moe --json` has every field",
        "earthshine train tiny_moe --data data/docs num_steps=50 balance.loss=switch balance.scope=step",
    ),
    ("reproduce or resume a run from its folder", "earthshine train runs/a/config.json --run runs/a"),
)


@dataclass(frozen=True)
class Options:
    job: Annotated[str, Positional("RECIPE|CONFIG.json")]
    """Name of a recipe, or path of a job's JSON file."""

    overrides: Annotated[tuple[str, ...], Positional("key=value")] = ()
    """Fields of the job to change, as path.to.field=value; a value is JSON or plain text."""

    run: Annotated[str, "DIR"] = ""
    """Run folder; by default runs/ and the job's name."""

    data: Annotated[tuple[Path, ...], "DIR", REPEATED] = ()
    """Token shards to train on, from `earthshine prepare`; may be given again. Short for data.sources=[{"path": DIR},
    ...]."""

    heldout: Annotated[Path | None, "DIR"] = None
    """Token shards to evaluate on. Short for heldout.path=DIR."""

    device: Annotated[str, "auto|cpu|cuda[:N]"] = "auto"
    """Where to train."""

    stop_after: int = 0
    """Save and stop after this step, as an interruption would; 0: run to the end."""

    trust: bool = False
    """Read checkpoints that were not made on this machine."""

    allow_config_change: bool = False
    """Resume although the run folder has another config; the difference is logged."""

    dry_run: bool = False
    """Print what follows from the job and which of its fields differ from the defaults; run nothing."""

    json: bool = False
    """Print JSON; with --dry-run, every resolved value."""


def run(options: Options) -> None:
    job, note = resolve(options.job, _assignments(options))
    if note:
        log(note)
    if options.dry_run:
        print_plan(job, note, options)
        return
    from earthshine.train.loop import fit

    run_dir = Path(options.run or f"runs/{job.name}")
    if not job.data.sources:
        raise ConfigError(
            "data.sources=[] names nothing to train on: add --data DIR, a folder of token shards (earthshine prepare)."
        )
    summary = fit(
        job,
        run_dir,
        device=options.device,
        trust=options.trust,
        allow_config_change=options.allow_config_change,
        stop_after=options.stop_after or None,
    )
    if options.json:
        print_outcome(json_text({k: str(v) if isinstance(v, Path) else v for k, v in asdict(summary).items()}))
    else:
        print_outcome(f"{run_dir}\nnext: earthshine report {shell_quoted(run_dir)}")


def print_plan(job: "TrainJob", note: str, options: Options) -> None:
    """What `--dry-run` prints. note: of the vocabulary, as `resolve` gives it."""
    from earthshine.device import choose_compute_dtype, pick_device
    from earthshine.train.derive import derive

    plan = derive(job)
    compute = choose_compute_dtype(job.compute_dtype, pick_device(options.device))
    for warning in plan.warnings:
        log(f"warning: {warning}")
    if not job.data.sources:
        log("warning: data.sources=[] names nothing to train on yet: add --data DIR.")
    elif not plan.sources:
        log("warning: the token shards cannot be read here, or hold no whole sequence: epochs are unknown.")
    if options.json:
        notes = [note] if note else []
        result = {"job": encode(job), "notes": notes, "derived": asdict(plan), "gemm_peak_flops": compute.peak_flops}
        print_json(result)
        return
    print(plan.table(compute.peak_flops))
    print(f"\ncomputing in {str(compute.dtype).removeprefix('torch.')}: {compute.reason}")
    print(f"\n{_changes(job, options.job)}")


def _changes(job: "TrainJob", name: str) -> str:
    """What the job has that its recipe has not; of a JSON file, what it has that is not a default."""
    from earthshine.recipes.registry import RECIPES

    if name in RECIPES:
        lines = diff(encode(RECIPES[name]()), encode(job))
        title = f"changes to the recipe {name} (earthshine show {name} prints it)"
    else:
        lines = [f"{path}: {json.dumps(value)}" for path, value in not_defaults(job)]
        title = f"fields of {name} that are not defaults"
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else f"{title}: none"


def _assignments(options: Options) -> tuple[str, ...]:
    """All changes to the job; key=value comes last and wins."""
    short: list[str] = []
    if options.data:
        short.append("data.sources=" + json.dumps([{"path": str(path)} for path in options.data]))
    if options.heldout:
        short.append(f"heldout.path={options.heldout}")
    return (*short, *options.overrides)


def resolve(name: str, overrides: tuple[str, ...]) -> "tuple[TrainJob, str]":
    """The job of that recipe or file with the overrides applied; and a line when a recipe's vocabulary was enlarged."""
    from earthshine.recipes.registry import RECIPES
    from earthshine.train.job import TrainJob
    from earthshine.train.vocabulary import fit_vocabulary

    if name.endswith(".json"):
        return override(load_json(TrainJob, name), overrides), ""
    if is_run(Path(name)):
        folder = run_of(Path(name))
        again = f"earthshine train {shell_quoted(folder / CONFIG)} --run {shell_quoted(folder)}"
        raise ConfigError(f"{name} is a run, not a job: resume it with {again}")
    if name not in RECIPES:
        raise ConfigError(f"recipe '{name}' is not known, nor is it the path of a .json file.{nearest(name, RECIPES)}")
    return fit_vocabulary(override(RECIPES[name](), overrides), overrides)
