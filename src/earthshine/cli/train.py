"""`earthshine train`."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from earthshine.cli.options import json_text, print_json, print_outcome, shell_quoted
from earthshine.config import encode, load_json, override
from earthshine.console import log
from earthshine.errors import ConfigError, nearest

DESCRIPTION = """Run a job, or resume it: the same command does both.

A job is a recipe's name (`earthshine ls recipes`) or a JSON file; key=value changes a field of it. The run folder gets
config.json, plan.json, env.json, metrics.jsonl and checkpoints. SIGTERM, SIGINT and SIGHUP save, and exit with 75."""
EXAMPLES = (
    (
        "steps, tokens, parameters, FLOPs, memory: before anything runs",
        "earthshine train tiny --data data/docs --dry-run",
    ),
    (
        "a recipe with fields changed; `earthshine show tiny_moe --json` has them all",
        "earthshine train tiny_moe --data data/docs num_steps=50 balance.loss=switch balance.scope=step",
    ),
    ("reproduce or continue a run from its folder", "earthshine train runs/a/config.json --run runs/a"),
)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Options:
    job: Annotated[Positional[str], arg(metavar="RECIPE|CONFIG.json")]
    """A recipe's name, or the path of a job's JSON file."""

    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[key=value ...]")] = ()
    """Fields of the job to change, as path.to.field=value; values are JSON or plain text."""

    run: str = ""
    """Run folder; empty: runs/ and the job's name."""

    data: UseAppendAction[tuple[Path, ...]] = ()
    """Token shards to train on, may be given again: short for data.sources=[{"path": ...}, ...]."""

    heldout: Path | None = None
    """Token shards to evaluate on: short for heldout.path=..."""

    device: str = "auto"
    """auto, cpu, or cuda[:index]."""

    stop_after: int = 0
    """Save and stop after this many steps of the run, as an interruption would; 0: run to the end."""

    trust: bool = False
    """Read checkpoints that were not made on this machine."""

    allow_config_change: bool = False
    """Go on although the run folder's config is another; the difference is logged."""

    dry_run: bool = False
    """Print the resolved job and all numbers that follow from it, and run nothing."""

    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    job = resolve(options.job, _assignments(options))
    if options.dry_run:
        print_plan(job, options)
        return
    from earthshine.train.loop import fit

    run_dir = Path(options.run or f"runs/{job.name}")
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


def print_plan(job: Any, options: Options) -> None:
    from earthshine.device import choose_compute_dtype, pick_device
    from earthshine.train.derive import derive

    plan = derive(job)
    compute = choose_compute_dtype(job.compute_dtype, pick_device(options.device))
    for warning in plan.warnings:
        log(f"warning: {warning}")
    if options.json:
        print_json({"job": encode(job), "derived": asdict(plan), "gemm_peak_flops": compute.peak_flops})
        return
    print(json_text(encode(job)))
    print(f"\n{plan.table(compute.peak_flops)}")
    print(f"\ncomputing in {str(compute.dtype).removeprefix('torch.')}: {compute.reason}; no run reaches its rate")


def _assignments(options: Options) -> tuple[str, ...]:
    """All changes to the job; what is said by key=value comes last and holds."""
    short: list[str] = []
    if options.data:
        short.append("data.sources=" + json.dumps([{"path": str(path)} for path in options.data]))
    if options.heldout:
        short.append(f"heldout.path={options.heldout}")
    return (*short, *options.overrides)


def resolve(name: str, overrides: tuple[str, ...]) -> Any:
    """The job of that recipe or file, with the overrides applied."""
    from earthshine.recipes.registry import RECIPES
    from earthshine.train.job import TrainJob

    if name.endswith(".json"):
        job = load_json(TrainJob, name)
    elif name in RECIPES:
        job = RECIPES[name]()
    else:
        raise ConfigError(f"recipe '{name}' is not known, nor is it the path of a .json file.{nearest(name, RECIPES)}")
    return override(job, overrides)


def order_arguments(args: Sequence[str]) -> list[str]:
    """Arguments with every key=value moved to the end, where the parser wants them: people put them anywhere."""
    takes_value = ("--run", "--data", "--heldout", "--device", "--stop-after")
    moved = [i for i, a in enumerate(args) if _OVERRIDE.match(a) and (i == 0 or args[i - 1] not in takes_value)]
    return [a for i, a in enumerate(args) if i not in moved] + [args[i] for i in moved]
