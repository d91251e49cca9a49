"""`write_report`: run folders in, one self-contained HTML page out, with the same in Markdown and JSON beside it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from earthshine.errors import ConfigError, DiskFullError
from earthshine.files import atomic_write, to_json
from earthshine.report import evidence, experts, facts, results, training
from earthshine.report.content import Report, Section, clean, to_markdown
from earthshine.report.markup import to_html
from earthshine.report.results import Comparison, comparisons
from earthshine.report.runs import COLUMNS, WORST_LOAD, Heldout, Run, read_runs
from earthshine.report.scales import thin
from earthshine.report.statistics import BAR, Difference, ratio
from earthshine.report.verdict import verdict
from earthshine.run_folder import REPORT

FORMAT = 1  # of report.json
_FILE_SUFFIXES = {".json", ".md", ".htm", ".pdf", ".txt", ".png", ".svg", ".csv"}  # meant as a file, not as a folder


def write_report(runs: Sequence[Path | str], out: Path | str | None = None, title: str = "") -> Path:
    """Write report.html, report.md and report.json about one or more run folders; returns the HTML file.

    Args:
        runs: run folders; differences between runs are against the first.
        out: a folder, or a file name ending in .html; by default the first run's folder. Earlier reports are replaced.
        title: of the page; by default made from the runs' names.

    The files are a function of the run folders: the same folders give the same bytes. Raises ConfigError for a path
    that is not a run folder and where `out` cannot be written, DataError for a damaged file, DiskFullError.
    """
    loaded = read_runs(runs)
    page = _page_path([run.path for run in loaded], None if out is None else Path(out))
    compared = comparisons(loaded)
    report = build(loaded, compared, page, title)
    data = to_json(_clean(machine_readable(loaded, compared, report)), indent=1)
    files = {".html": to_html(report), ".md": to_markdown(report), ".json": data + "\n"}
    try:
        for suffix, text in files.items():
            atomic_write(page.with_suffix(suffix), text)
    except DiskFullError:
        raise
    except OSError as e:
        raise ConfigError(f"out={page} cannot be written: {e.strerror}. Choose another place with --out.") from e
    return page


def _page_path(runs: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        return runs[0] / REPORT
    if out.suffix == ".html":
        if out.is_dir():
            raise ConfigError(f"out={out} is a folder; give another name for the page, or a folder without .html.")
        return out
    if (out.exists() and not out.is_dir()) or (out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir()):
        raise ConfigError(
            f"out={out} is a file that is not .html: give the page a name ending in .html, or a folder. "
            f"Its .md and .json are written beside it."
        )
    return out / REPORT


def build(runs: Sequence[Run], compared: Sequence[Comparison], page: Path, title: str = "") -> Report:
    """The whole content of the report at `page`, in the order of the page."""
    what_was_run = Section(
        "runs", "Runs", "What was run", (facts.what_was_run(runs), *facts.starts(runs), *facts.unknown_properties(runs))
    )
    sections = (
        results.summary(runs, compared, evidence.exported_models(runs, page.parent)),
        training.curves_section(runs),
        evidence.reproduce_section(runs),
        what_was_run,
        results.heldout_section(runs, compared),
        training.dynamics_section(runs),
        experts.experts_section(runs),
        training.update_section(runs),
        evidence.verification_section(runs),
        results.samples_section(runs),
        evidence.environment_section(runs),
    )
    return Report(title or _default_title(runs), verdict(runs, compared), sections, page.stem)


def _default_title(runs: Sequence[Run]) -> str:
    names = [r.name for r in runs]
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} and {len(names) - 1} other runs"


def machine_readable(runs: Sequence[Run], compared: Sequence[Comparison], report: Report) -> dict[str, Any]:
    """The content of report.json: what was read, compared and judged, with series thinned as they are drawn."""
    return {
        "format": FORMAT,
        "title": clean(report.title),
        "verdict": clean(report.verdict.replace("**", "")),
        "runs": [_run_json(run) for run in runs],
        "comparisons": [_comparison_json(c) for c in compared],
        "bar_in_standard_errors": BAR,
    }


def _run_json(run: Run) -> dict[str, Any]:
    before, after = results.evaluations(run)
    series = {}
    for name in (*COLUMNS, WORST_LOAD, *(c for c in run.steps.columns if c.startswith("update_rms."))):
        if run.steps.finite(name):
            shown = thin(run.steps.step, run.steps.column(name))
            series[name] = {"step": shown.x, "value": shown.y, "steps_averaged": shown.group}
    loads = {"first": run.steps.first_load, "last": run.steps.last_load}
    return {
        "name": run.name,
        "folder": str(run.path),
        "config": run.config,
        "plan": run.plan,
        "environment": run.env,
        "starts": [asdict(start) for start in run.starts],
        "steps": run.steps.step[-1] if run.steps.step else 0,
        "heldout": {"before": _heldout_json(before), "after": _heldout_json(after)},
        "heldout_during": [_heldout_json(h) for h in run.heldout_during],
        "series": series,
        "expert_load": {k: {"step": v[0], "relative_load": v[1]} for k, v in loads.items() if v},
        "verifications": [asdict(v) for v in run.verifications],
        "samples": {
            "before": asdict(run.samples_before) if run.samples_before else None,
            "after": asdict(run.samples_after) if run.samples_after else None,
        },
        "notes": run.notes,
    }


def _heldout_json(h: Heldout | None) -> dict[str, Any] | None:
    if h is None:
        return None
    numbers = {k: v for k, v in asdict(h).items() if k not in ("sequences", "identity")}
    return {**numbers, "num_sequences": len(h.sequences)}


def _comparison_json(c: Comparison) -> dict[str, Any]:
    sentence = results.verdict_sentence(c).replace("**", "")
    if not isinstance(c.outcome, Difference):
        return {"label": c.label, "sentence": sentence, "compared": False}
    return {
        "label": c.label,
        "sentence": sentence,
        "compared": True,
        **asdict(c.outcome),
        "standard_errors_from_zero": ratio(c.outcome),
        "exceeds_bar": c.outcome.verdict in ("lower", "higher"),
    }


def _clean(value: Any) -> Any:
    """The same value with every text in it cleaned."""
    match value:
        case str():
            return clean(value)
        case dict():
            return {clean(str(k)): _clean(v) for k, v in value.items()}
        case list() | tuple():
            return [_clean(v) for v in value]
    return value
