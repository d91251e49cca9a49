"""Columns of metrics.jsonl as curves: thinned and smoothed series, their legends, marks, tables and small panels."""

import math
from collections.abc import Callable, Iterable, Sequence

from earthshine.report.content import Drawing, LegendItem, Table, figure_numbers
from earthshine.report.facts import settings
from earthshine.report.figures import MARKER_LIMIT, PANEL, Chart, Mark, Series, draw_chart
from earthshine.report.runs import Run
from earthshine.report.scales import short, thin, whole
from earthshine.report.starts import SHOWN, change_words
from earthshine.report.statistics import moving_mean

Format = Callable[[float], str]
TABLE_ROWS = 12  # of the numbers behind a figure


def lines(run: Run, column: str, color: int, label: str = "", offset: float = 0.0) -> tuple[list[Series], str]:
    """A run's column, plus `offset`, for drawing, and what the caption must say of how it was thinned or smoothed."""
    x, y = run.steps.step, [v + offset for v in run.steps.column(column)]
    if not any(map(math.isfinite, y)):
        return [], ""
    label = label or run.name
    shown = thin(x, y)
    width = smoothing(shown.y)
    if column != "lr" and len(shown.y) > MARKER_LIMIT:  # a learning rate has no noise
        faint = Series(label, shown.x, shown.y, color, "faint", *((shown.low, shown.high) if shown.group > 1 else ()))
        series = [faint, Series(label, shown.x, moving_mean(shown.y, width), color)]
        note = f"bold is the mean over {whole(width * shown.group)} neighboring {run.steps.word}"
    else:
        low_high = (shown.low, shown.high) if shown.group > 1 else ()
        series, note = [Series(label, shown.x, shown.y, color, "line", *low_high)], ""
    if shown.group > 1:
        thinned = (
            f"its {whole(len(y))} {run.steps.word} are drawn as {whole(len(shown.y))} means of {whole(shown.group)} "
            "each, shaded from lowest to highest"
        )
        note = f"{thinned}; {note}" if note else thinned
    num_left_out = len(y) - sum(map(math.isfinite, y))
    if num_left_out:
        note += ("; " if note else "") + f"{whole(num_left_out)} steps have no finite value and are left out"
    return series, note


def smoothing(values: Sequence[float]) -> int:
    """Over how many neighbors a noisy line is averaged."""
    return max(5, len(values) // 40) | 1


def remarks(notes: Iterable[tuple[str, str]]) -> str:
    """Notes of runs as sentences, equal ones once."""
    by_note: dict[str, list[str]] = {}
    for name, note in notes:
        if note:
            by_note.setdefault(note, []).append(name)
    return "".join(f" {', '.join(names)}: {note}." for note, names in by_note.items())


def numbers_table(caption: str, runs: Sequence[Run], columns: Sequence[tuple[str, str, Format]]) -> Table | None:
    """At most TABLE_ROWS evenly spread steps; per run that has it, a column for each (heading, column name, format)."""
    steps = sorted({s for r in runs for s in r.steps.step})
    if not steps:
        return None
    last = len(steps) - 1
    rows_wanted = min(TABLE_ROWS, len(steps))
    chosen = [steps[round(i * last / max(1, rows_wanted - 1))] for i in range(rows_wanted)]
    headers, values = ["Step"], []
    for run in runs:
        for heading, column, form in columns:
            data = dict(zip(run.steps.step, run.steps.column(column), strict=False))
            if any(map(math.isfinite, data.values())):
                headers.append(f"{run.name}{': ' + heading if heading else ''}")
                values.append([form(data.get(s, math.nan)) for s in chosen])
    rows = [[whole(s), *(v[i] for v in values)] for i, s in enumerate(chosen)]
    return figure_numbers(caption, headers, rows) if values else None


def legend(runs: Iterable[tuple[int, Run]], *more: LegendItem) -> tuple[LegendItem, ...]:
    drawn = list(runs)
    changed = [LegendItem("changed mid-run", i, "change") for i, run in drawn if any(s.marked for s in run.starts)]
    return (*(LegendItem(run.name, i) for i, run in drawn), *more, *changed[:1])


def marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    """Vertical lines where a run became, or may have become, another: before the first step of such a start."""
    return tuple(
        Mark(
            s.first_step - 0.5,
            f"{run.name}, from step {whole(s.first_step)}: {change_words(s, SHOWN)}".replace("`", ""),
            i,
        )
        for i, run in enumerate(runs)
        for s in run.starts
        if s.marked
    )


def marks_in_words(runs: Sequence[Run]) -> str:
    """The marks in words, for a drawing's description."""
    return "".join(f" {m.label}." for m in marks(runs))


def first_last(run: Run, column: str, form: Format) -> str:
    values = run.steps.finite(column)
    return f"{run.name} from {form(values[0])} to {form(values[-1])}" if values else ""


def stretches(runs: Sequence[Run], *keys: str) -> list[tuple[tuple[int, int], float]]:
    """(first and last step, value) of a positive number of the runs' configs; equal values that meet are joined."""
    joined: list[tuple[tuple[int, int], float]] = []
    pieces = [(v, max(a, r.steps.step[0]), b) for r in runs if r.steps.step for a, b, v in settings(r, *keys)]
    for value, first, last in sorted(p for p in pieces if isinstance(p[0], int | float) and p[0] > 0):
        if joined and joined[-1][1] == value and first <= joined[-1][0][1] + 1:
            (start, end), _ = joined.pop()
            first, last = start, max(end, last)
        joined.append(((first, last), float(value)))
    return joined


def panel(
    runs: Sequence[Run],
    column: str,
    title: str,
    unit: str,
    ident: str,
    limit: tuple[str, ...] = (),
    **options: bool,
) -> Drawing | None:
    """A small chart of one column of every run, with the field `limit` of the config that bounds it, if in range."""
    series = [s for i, run in enumerate(runs) for s in lines(run, column, i)[0]]
    if not series:
        return None
    values = [v for s in series for v in s.y]
    log = options.pop("may_log", False) and min(values) > 0 and max(values) > 50 * min(values)
    words = "; ".join(filter(None, (first_last(r, column, short) for r in runs)))
    if limit:
        near = [(span, v) for span, v in stretches(runs, *limit) if 0.4 * min(values) <= v <= 2.5 * max(values)]
        series += [Series(f"clipped at {short(v)}", span, (v, v), 0, "reference") for span, v in near]
    chart = Chart(title, f"{title}: {words}.", "step", unit, tuple(series), log_y=log, marks=marks(runs), **options)
    return Drawing(draw_chart(chart, PANEL, 230, ident), title=title)
