"""What a reader can check by: verification, environment, how to reproduce."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from earthshine.config import encode
from earthshine.console import human_bytes
from earthshine.files import to_json
from earthshine.report.content import Bullets, Cell, Code, Element, Link, Section, Table, Text, percent_encoded
from earthshine.report.runs import CheckRow, Run, Verification
from earthshine.report.scales import flops, short, whole

ABSENT = "\u2014"


def verification_section(runs: Sequence[Run]) -> Section:
    """Every check with its measured value beside its tolerance."""
    elements: list[Element] = [_verification_table(run, v) for run in runs for v in run.verifications]
    for run in runs:
        if not run.verifications:
            elements.append(Text(f"{run.name} has no verification result (eval/verify-*.json).", "absent"))
    return Section("verification", "Verification", "Verification", tuple(elements))


def _verification_table(run: Run, v: Verification) -> Table:
    subject = ", ".join(f"{k} `{_plain(value)}`" for k, value in v.subject.items())
    num_ok = sum(r.ok for r in v.rows)
    verdict = "**holds**" if v.ok else "**does not hold**"
    caption = f"{run.name}: check `{v.check}` {verdict} ({num_ok} of {len(v.rows)} rows)" + (
        f"; {subject}" if subject else ""
    )
    notes = any(r.note for r in v.rows)
    rows = tuple(
        (
            row.name,
            _plain(row.measured),
            _plain(row.tolerance),
            _used(row),
            Cell("pass" if row.ok else "FAIL", "good" if row.ok else "bad"),
            *((row.note,) if notes else ()),
        )
        for row in v.rows
    )
    headers = ("Check", "Measured", "Tolerance", "Used", "Result", *(("Note",) if notes else ()))
    return Table(caption, headers, rows, frozenset((1, 2, 3)))


def tolerance_used(row: CheckRow) -> float | None:
    """Measured over tolerance, where both are numbers and less is better."""
    numbers = [v for v in (row.measured, row.tolerance) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < 2 or row.tolerance <= 0 or row.measured < 0 or not math.isfinite(row.measured):
        return None
    used = float(row.measured / row.tolerance)
    return used if row.ok == (used <= 1) else None


def _used(row: CheckRow) -> Cell:
    used = tolerance_used(row)
    if used is None:
        return Cell(ABSENT)
    text = "< 1 %" if used < 0.01 else f"{whole(100 * used)} %"
    return Cell(text, fraction=min(1.0, used), tone="" if row.ok else "bad")


def _plain(value: Any) -> str:
    """A JSON value in a table cell."""
    match value:
        case None:
            return ABSENT
        case bool():
            return "yes" if value else "no"
        case int():
            return whole(value)
        case float():
            return short(value)
        case str():
            return value
        case list() if all(isinstance(v, str | int | float) for v in value):
            return " ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False)


def flatten(data: Any, where: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted path; lists are leaves."""
    if isinstance(data, Mapping) and data:
        leaves: dict[str, Any] = {}
        for key, value in data.items():
            leaves |= flatten(value, f"{where}.{key}" if where else str(key))
        return leaves
    return {where: data}


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The leaves in which configs differ, with each one's value (ABSENT where it has none)."""
    flat = [flatten(c) for c in configs]
    paths = list(dict.fromkeys(path for leaves in flat for path in leaves))
    table = [(path, [leaves.get(path, ABSENT) for leaves in flat]) for path in paths]
    return [(path, values) for path, values in table if any(v != values[0] for v in values)]


def environment_section(runs: Sequence[Run]) -> Section:
    """Where the runs happened; one column where all agree."""
    elements: list[Element] = []
    recorded = [r for r in runs if r.env is not None]
    flat = [flatten(r.env) for r in recorded]
    paths = list(dict.fromkeys(path for leaves in flat for path in leaves))
    same = all(leaves == flat[0] for leaves in flat)
    if recorded:
        columns = flat[:1] if same else flat
        rows = tuple((_env_name(p), *(_env_value(p, leaves.get(p)) for leaves in columns)) for p in paths)
        headers = (
            ("", "all runs" if len(recorded) > 1 else recorded[0].name) if same else ("", *(r.name for r in recorded))
        )
        caption = "Where it ran, as recorded in env.json" + ("." if same else "; the runs differ.")
        if moved := [r.name for r in recorded if any(s.moved for s in r.starts)]:
            caption += f" {_listed(moved)} started there and resumed elsewhere: see What was run."
        elements.append(Table(caption, headers, rows))
    for run in runs:
        if run.env is None:
            elements.append(Text(f"{run.name} has no env.json.", "absent"))
    notes = [(f"{run.name}: {note}", "quiet") for run in runs for note in run.notes]
    if notes:
        elements.append(Text("What the run folders lack, or contain but the report does not show:"))
        elements.append(Bullets(tuple(notes)))  # type: ignore[arg-type]
    return Section("environment", "Environment", "Environment", tuple(elements))


def _env_name(path: str) -> str:
    return path.removeprefix("versions.").replace("_", " ").replace("memory bytes", "memory")


def _env_value(path: str, value: Any) -> str:
    if path.endswith("_bytes") and isinstance(value, int | float):
        return human_bytes(value)
    if path.endswith("_flops") and isinstance(value, int | float):
        return f"{flops(value)}/s"
    return "not installed" if value is None and path.startswith("versions.") else _plain(value)


def exported_models(runs: Sequence[Run], page_folder: Path) -> list[Link]:
    """Links to exported models and their cards: those inside a run folder, or named by a check of the run."""
    folders: dict[Path, Path] = {}
    for run in runs:
        named = [v.subject.get("model") for v in run.verifications if v.check == "huggingface"]
        inside = sorted(p for p in run.path.iterdir() if p.is_dir())
        for folder in (*inside, *(Path(name) for name in named if isinstance(name, str))):
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                folders[folder.resolve()] = folder
    links = []
    for resolved, folder in folders.items():
        href = percent_encoded(os.path.relpath(resolved, page_folder.resolve()).replace(os.sep, "/"))
        links.append(Link(f"Exported model {folder.name}", f"{href}/"))
        if (folder / "README.md").is_file():
            links.append(Link(f"Model card of {folder.name}", f"{href}/README.md"))
    return links


def reproduce_section(runs: Sequence[Run]) -> Section:
    """Commands, what differs between the runs' configs, and the configs in full, all with a copy button."""
    elements: list[Element] = []
    configured = [r for r in runs if r.config is not None]
    if configured:
        commands = [
            f"earthshine train {quote(f'{r.path}/config.json')} --run {quote(f'{r.path}-again')}" for r in configured
        ]
        commands.append("earthshine report " + " ".join(quote(f"{r.path}-again") for r in configured))
        elements.append(Text(_what_the_commands_do(configured)))
        elements.append(Code("\n".join(commands), "sh"))
    if len(configured) > 1:
        elements += _config_diff(configured)
    for run in runs:
        if run.config is None:
            elements.append(Text(f"{run.name} has no config.json, so it cannot be repeated from its folder.", "absent"))
        else:
            text = to_json(encode(run.config), indent=1)
            elements.append(Code(text, "json", f"config.json of {run.name}"))
    return Section("reproduce", "Reproduce", "How to reproduce", tuple(elements))


def _what_the_commands_do(runs: Sequence[Run]) -> str:
    changed = [r.name for r in runs if any(s.another_run for s in r.starts)]
    moved = [r.name for r in runs if any(s.moved for s in r.starts)]
    words = "Each run folder holds its whole job: these commands repeat it, in the environment that is listed below."
    if changed:
        words = (
            "These commands train each run's last config from the first step. They do not repeat "
            f"{_listed(changed)}, whose config changed mid-run: see What was run."
        )
    return words + (f" {_listed(moved)} resumed in another environment: last bits may differ." if moved else "")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _config_diff(runs: Sequence[Run]) -> list[Element]:
    """Each run's config against the first one's, as a diff of its fields."""
    parts = []
    for run in runs[1:]:
        fields = differing([runs[0].config or {}, run.config or {}])
        lines = [f"{mark}{path} = {_json(v)}" for path, values in fields for mark, v in zip("-+", values, strict=True)]
        parts.append("\n".join([f"--- {_one_line(runs[0].name)}", f"+++ {_one_line(run.name)}", *lines]))
        if not lines:
            parts[-1] += "\n(no field differs)"
    return [Text("All that differs between the configs:"), Code("\n".join(parts), "diff")]


def _json(value: Any) -> str:
    return ABSENT if value == ABSENT else json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
