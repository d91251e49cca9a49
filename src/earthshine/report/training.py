"""How training went: loss curves, learning rate, gradients and speed, update size."""

import math
from collections.abc import Callable, Iterable, Sequence

from earthshine.report.content import Drawing, Element, Figure, LegendItem, Section, Table, Text, figure_numbers
from earthshine.report.facts import same_samples, settings
from earthshine.report.figures import (
    HALF,
    HEAT_BINS,
    MARKER_LIMIT,
    MAX_HEAT_COLUMNS,
    NARROW,
    PANEL,
    WIDE,
    Chart,
    Mark,
    Series,
    draw_chart,
    draw_heat,
)
from earthshine.report.runs import MEDIAN_LOAD, UPDATE_RMS, WORST_LOAD, Run
from earthshine.report.scales import fixed, short, thin, whole
from earthshine.report.starts import SHOWN, change_words
from earthshine.report.statistics import moving_mean

Format = Callable[[float], str]
TABLE_ROWS = 12  # of the numbers behind a figure


def lines(run: Run, column: str, color: int, label: str = "") -> tuple[list[Series], str]:
    """A run's column for drawing, and what the caption must say about how it was thinned or smoothed ("" if not)."""
    x, y = run.steps.step, run.steps.column(column)
    if not any(map(math.isfinite, y)):
        return [], ""
    label = label or run.name
    shown = thin(x, y)
    width = _width(shown.y)
    if column != "lr" and len(shown.y) > MARKER_LIMIT:  # a learning rate has no noise
        faint = Series(label, shown.x, shown.y, color, "faint", *((shown.low, shown.high) if shown.group > 1 else ()))
        series = [faint, Series(label, shown.x, moving_mean(shown.y, width), color)]
        note = f"bold is the mean over {whole(width * shown.group)} neighbouring {run.steps.word}"
    else:
        low_high = (shown.low, shown.high) if shown.group > 1 else ()
        series, note = [Series(label, shown.x, shown.y, color, "line", *low_high)], ""
    if shown.group > 1:
        thinned = (
            f"its {whole(len(y))} {run.steps.word} are drawn as {whole(len(shown.y))} means of {whole(shown.group)} "
            "each, shaded from their lowest to their highest"
        )
        note = f"{thinned}; {note}" if note else thinned
    lost = len(y) - sum(map(math.isfinite, y))
    if lost:
        note += ("; " if note else "") + f"{whole(lost)} steps have no finite value and are left out"
    return series, note


def _width(values: Sequence[float]) -> int:
    """Over how many neighbours a noisy line is averaged."""
    return max(5, len(values) // 40) | 1


def _remarks(notes: Iterable[tuple[str, str]]) -> str:
    """Notes of runs as sentences, equal ones once."""
    by_note: dict[str, list[str]] = {}
    for name, note in notes:
        if note:
            by_note.setdefault(note, []).append(name)
    return "".join(f" {', '.join(names)}: {note}." for note, names in by_note.items())


def _table(caption: str, runs: Sequence[Run], columns: Sequence[tuple[str, str, Format]]) -> Table | None:
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


def _legend(runs: Iterable[tuple[int, Run]], *more: LegendItem) -> tuple[LegendItem, ...]:
    drawn = list(runs)
    changed = [LegendItem("changed mid-run", i, "change") for i, run in drawn if any(s.marked for s in run.starts)]
    return (*(LegendItem(run.name, i) for i, run in drawn), *more, *changed[:1])


def _marks(runs: Sequence[Run]) -> tuple[Mark, ...]:
    """Where a run became, or may have become, another: before the first step of that start."""
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


def _marks_in_words(runs: Sequence[Run]) -> str:
    """The marks in words, for a drawing's description."""
    return "".join(f" {m.label}." for m in _marks(runs))


def _first_last(run: Run, column: str, form: Format) -> str:
    values = run.steps.finite(column)
    return f"{run.name} from {form(values[0])} to {form(values[-1])}" if values else ""


def curves_section(runs: Sequence[Run]) -> Section:
    """Training loss of every run over one pair of axes, with the held-out losses measured on the way."""
    series: list[Series] = []
    notes, drawn, heldout = [], [], False
    for i, run in enumerate(runs):
        curve, note = lines(run, "loss", i)
        if curve:
            drawn.append((i, run))
        series += curve
        notes.append((run.name, note))
        points = _heldout_points(run)
        if points:
            heldout = True
            shift = 11 * (i - (len(runs) - 1) / 2)  # side by side, where runs have the same loss at the same step
            xs, ys = zip(*points, strict=True)
            series.append(Series(f"{run.name} held-out", xs, ys, i, "points", shift=shift))
    elements: list[Element] = []
    if series:
        words = "; ".join(filter(None, (_first_last(r, "loss", fixed) for r in runs)))
        chart = Chart(
            "Training loss by step",
            f"Training loss: {words}.{_marks_in_words(runs)}",
            "step",
            "nats per token",
            tuple(series),
            marks=_marks(runs),
        )
        wide, narrow = draw_chart(chart, WIDE, 380, "fig-loss-w"), draw_chart(chart, NARROW, 300, "fig-loss-n")
        caption = "Training loss of each step's own batch, which is why it jumps from step to step."
        more = []
        if heldout:
            caption += " Large hollow marks are held-out losses; their errors follow below."
            more = [LegendItem("held-out loss", 0, "point")]
        table = _table("Training loss, nats per token", runs, [("", "loss", fixed)])
        elements.append(
            Figure(
                "Training loss by step",
                caption + _remarks(notes),
                (Drawing(wide, narrow),),
                _legend(drawn, *more),
                table,
            )
        )
    for run in runs:
        if not run.steps.finite("loss"):
            elements.append(Text(f"{run.name} has no training loss (metrics.jsonl).", "absent"))
    for run in runs[1:]:
        sentence = same_samples(runs[0], run)
        if sentence:
            elements.append(Text(sentence))
    return Section("curves", "Loss", "Loss curves", tuple(elements))


def _heldout_points(run: Run) -> list[tuple[int, float]]:
    """(step, loss): those measured during training; before and after where there are none."""
    if run.heldout_during:
        evaluations = [(h.step, h) for h in run.heldout_during]
    else:
        last = run.steps.step[-1] if run.steps.step else None
        evaluations = [(0 if run.before else None, run.before), (last, run.after)]  # type: ignore[list-item]
    return [(step, h.loss) for step, h in evaluations if h is not None and step is not None]


def _stretches(runs: Sequence[Run], *keys: str) -> list[tuple[tuple[int, int], float]]:
    """(first and last step, value) of a number of the configs above 0, for all runs: equal ones that meet are one."""
    stretches: list[tuple[tuple[int, int], float]] = []
    pieces = [(v, max(a, r.steps.step[0]), b) for r in runs if r.steps.step for a, b, v in settings(r, *keys)]
    for value, first, last in sorted(p for p in pieces if isinstance(p[0], int | float) and p[0] > 0):
        if stretches and stretches[-1][1] == value and first <= stretches[-1][0][1] + 1:
            (start, end), _ = stretches.pop()
            first, last = start, max(end, last)
        stretches.append(((first, last), float(value)))
    return stretches


def _panel(runs: Sequence[Run], column: str, title: str, unit: str, ident: str, **options: bool) -> Drawing | None:
    """A small chart of one column of every run."""
    series = [s for i, run in enumerate(runs) for s in lines(run, column, i)[0]]
    if not series:
        return None
    values = [v for s in series for v in s.y]
    log = options.pop("may_log", False) and min(values) > 0 and max(values) > 50 * min(values)
    words = "; ".join(filter(None, (_first_last(r, column, short) for r in runs)))
    if column == "grad_norm":
        limits = _stretches(runs, "clip_grad_norm")
        inside = [(span, v) for span, v in limits if 0.4 * min(values) <= v <= 2.5 * max(values)]
        series += [Series(f"clipped at {short(v)}", span, (v, v), 0, "reference") for span, v in inside]
    chart = Chart(title, f"{title}: {words}.", "step", unit, tuple(series), log_y=log, marks=_marks(runs), **options)
    return Drawing(draw_chart(chart, PANEL, 230, ident), title=title)


def dynamics_section(runs: Sequence[Run]) -> Section:
    """Learning rate, gradient norm and speed as small multiples."""
    panels = (
        _panel(runs, "lr", "Learning rate", "peak times schedule", "fig-lr", from_zero=True),
        _panel(runs, "grad_norm", "Gradient norm", "global, before clipping", "fig-grad", may_log=True, from_zero=True),
        _panel(runs, "tokens_per_second", "Speed", "tokens per second", "fig-speed", from_zero=True),
    )
    elements: list[Element] = []
    if any(panels):
        caption = "One panel per quantity, over the same steps."
        if limits := sorted({short(v) for _, v in _stretches(runs, "clip_grad_norm")}):
            caption += f" Gradients are clipped to a norm of {' or '.join(limits)} (dashed, where in range)."
        drawn = [(i, r) for i, r in enumerate(runs) if len(r.steps)]
        caption += _remarks((r.name, lines(r, "grad_norm", 0)[1]) for _, r in drawn)
        columns = [("learning rate", "lr", short), ("gradient norm", "grad_norm", short)]
        table = _table("Learning rate and gradient norm", runs, columns)
        title = "Step by step"
        elements.append(Figure(title, caption, tuple(p for p in panels if p), _legend(drawn), table))
    names = zip(panels, ("learning rate", "gradient norm", "tokens per second"), strict=True)
    absent = [what for panel, what in names if panel is None]
    if absent:
        elements.append(Text(f"No run recorded its {', '.join(absent)}.", "absent"))
    return Section("dynamics", "Dynamics", "Learning rate, gradients, speed", tuple(elements))


def experts_section(runs: Sequence[Run]) -> Section:
    """Who received the tokens: heat maps at the first and the last step, and MaxVio over the steps."""
    elements: list[Element] = []
    sparse = [(i, r) for i, r in enumerate(runs) if r.steps.finite(WORST_LOAD)]
    for i, run in sparse:
        first, last = run.steps.first_load, run.steps.last_load
        assert first and last  # as the worst load comes from them
        elements.append(_heat_figure(run, i, first, last))
    if sparse:
        elements += [_load_figure(runs, sparse), *_balance_figure(runs, sparse)]
    without = [r.name for r in runs if not r.steps.finite(WORST_LOAD)]
    if without:
        plural = "have" if len(without) > 1 else "has"
        names = ", ".join(without)
        elements.append(Text(f"{names} {plural} no expert load in metrics.jsonl (a dense model has none).", "absent"))
    return Section("experts", "Experts", "Expert load", tuple(elements))


HeatState = tuple[int, dict[int, list[float]]]


def _heat_figure(run: Run, index: int, first: HeatState, last: HeatState) -> Figure:
    drawings = []
    for word, (step, load) in (("First", first), ("Last", last))[: 1 if first[0] == last[0] else 2]:
        title = f"{run.name}, {word.lower()} step ({whole(step)})"
        words = f"Load of {len(load)} layers as multiples of the fair share, {_extremes(load)}."
        wide, narrow = (draw_heat(title, words, load, w, f"fig-heat-{index}-{word}-{w}") for w in (HALF, NARROW))
        drawings.append(Drawing(wide, narrow, f"{word} step ({whole(step)})"))
    num_experts = max(map(len, last[1].values()))
    caption = (
        "How many tokens chose each expert of each layer, as a multiple of its fair share (1 = perfectly balanced)."
    )
    if num_experts > MAX_HEAT_COLUMNS:
        group = math.ceil(num_experts / MAX_HEAT_COLUMNS)
        caption += f" A column stands for {group} neighbouring experts and shows the one farthest from its fair share."
    unused = sum(v <= 0 for row in last[1].values() for v in row)
    if unused:
        caption += f" At the last step {whole(unused)} experts received no token (grey)."
    names = ("\u2264 \u00bc", "", "\u00bd", "", "1", "", "2", "", "\u2265 4")
    legend = tuple(LegendItem(names[b], b, "band") for b in range(HEAT_BINS))
    if unused:
        legend = (LegendItem("0", -1, "band"), *legend)
    rows = [
        [str(layer), *(fixed(f(row), 2) for row in (first[1].get(layer, [math.nan]), load) for f in (min, max))]
        for layer, load in last[1].items()
    ]
    headers = ("Layer", "first step: least", "first step: most", "last step: least", "last step: most")
    table = figure_numbers("Least and most loaded expert of each layer, multiples of the fair share", headers, rows)
    return Figure(f"Expert load of {run.name}", caption, tuple(drawings), legend, table)


def _extremes(load: dict[int, list[float]]) -> str:
    """The least and the most loaded expert, for a drawing's description; the table behind it has every layer."""
    cells = [(value, layer, expert) for layer, row in load.items() for expert, value in enumerate(row)]
    (least, l0, e0), (most, l1, e1) = min(cells), max(cells)
    return f"from {fixed(least, 2)} (layer {l0}, expert {e0}) to {fixed(most, 2)} (layer {l1}, expert {e1})"


def _load_figure(runs: Sequence[Run], sparse: Sequence[tuple[int, Run]]) -> Figure:
    series, notes = [], []
    for i, run in sparse:
        curve, note = lines(run, WORST_LOAD, i, f"{run.name}, worst layer")
        series += curve
        notes.append((run.name, note))
        if run.steps.last_load and len(run.steps.last_load[1]) > 1:  # of a single layer, the middle is the worst
            shown = thin(run.steps.step, run.steps.column(MEDIAN_LOAD))
            smooth = moving_mean(shown.y, _width(shown.y)) if len(shown.y) > MARKER_LIMIT else shown.y
            series.append(Series(f"{run.name}, middle layer", shown.x, smooth, i, "dashed"))
    words = "; ".join(_first_last(r, WORST_LOAD, lambda v: fixed(v, 2)) for _, r in sparse)
    title = "Most loaded expert over the steps"
    chart = Chart(title, f"Worst layer: {words}.", "step", "load / fair share", tuple(series), marks=_marks(runs))
    wide, narrow = draw_chart(chart, WIDE, 260, "fig-load-w"), draw_chart(chart, NARROW, 250, "fig-load-n")
    caption = "The tokens of the most chosen expert over the mean of its layer, in the worst layer of each step."
    more: tuple[LegendItem, ...] = ()
    if any(s.kind == "dashed" for s in series):
        caption, more = f"{caption} Dashed: in the middle layer.", (LegendItem("middle layer", 0, "reference"),)
    table = _table(title, runs, [("worst layer", WORST_LOAD, lambda v: fixed(v, 3))])
    return Figure(title, caption + _remarks(notes), (Drawing(wide, narrow),), _legend(sparse, *more), table)


_BALANCE = (  # column, title, unit, what the caption says of it
    (
        "balance",
        "Balance loss",
        "1 = uniform",
        "The balance loss, before its coefficient, is the mean over the layers.",
    ),
    ("drop_rate", "Dropped", "fraction of choices", "Choices are dropped where an expert's capacity is full."),
    ("dead_experts", "Dead experts", "number", "Dead experts received no token in the step, over all layers."),
)


def _balance_figure(runs: Sequence[Run], sparse: Sequence[tuple[int, Run]]) -> list[Figure]:
    """A panel for each quantity of _BALANCE that any run has above 0; no figure when there is none."""
    some = [q for q in _BALANCE if any(v > 0 for r in runs for v in r.steps.finite(q[0]))]
    if not some:
        return []
    panels = [
        _panel(runs, column, title, unit, f"fig-{column}", from_zero=column != "balance")
        for column, title, unit, _ in some
    ]
    caption = " ".join(words for *_, words in some)
    caption += _remarks((r.name, lines(r, some[0][0], 0)[1]) for r in runs)
    table = _table("Expert balancing", runs, [(title.lower(), column, short) for column, title, *_ in some])
    return [Figure("Balance by step", caption, tuple(p for p in panels if p), _legend(sparse), table)]


def update_section(runs: Sequence[Run]) -> Section:
    """Root mean square of the parameters' updates, one panel per algorithm."""
    algorithms = sorted({c.removeprefix(UPDATE_RMS) for r in runs for c in r.steps.columns if c.startswith(UPDATE_RMS)})
    elements: list[Element] = []
    panels, nominal_drawn = [], False
    for algorithm in reversed(algorithms):
        column = UPDATE_RMS + algorithm
        series = [s for i, run in enumerate(runs) for s in lines(run, column, i)[0]]
        if not series:
            continue
        name = {"muon": "Muon", "adamw": "AdamW"}.get(algorithm, algorithm)
        references = [] if algorithm != "muon" else _nominal(runs)
        nominal_drawn = nominal_drawn or bool(references)
        series += references
        words = "; ".join(filter(None, (_first_last(r, column, short) for r in runs)))
        chart = Chart(
            f"Update RMS, {name}",
            f"{words}.",
            "step",
            "update RMS, before the learning rate",
            tuple(series),
            marks=_marks(runs),
        )
        wide, narrow = (draw_chart(chart, w, 250, f"fig-rms-{algorithm}-{w}") for w in (HALF, NARROW))
        panels.append(Drawing(wide, narrow, f"{name} parameters"))
    if panels:
        drawn = [(i, r) for i, r in enumerate(runs) if any(r.steps.finite(UPDATE_RMS + a) for a in algorithms)]
        more = (LegendItem("nominal Muon update", 0, "reference"),) if nominal_drawn else ()
        columns: list[tuple[str, str, Format]] = [(a, UPDATE_RMS + a, short) for a in reversed(algorithms)]
        table = _table("Root mean square of the updates", runs, columns)
        caption = "Root mean square over all elements of a step's update, before it is multiplied by the learning rate."
        if nominal_drawn:
            caption += _NOMINAL
        caption += _remarks((r.name, lines(r, UPDATE_RMS + algorithms[-1], 0)[1]) for _, r in drawn)
        elements.append(Figure("Update RMS by step", caption, tuple(panels), _legend(drawn, *more), table))
    for run in runs:
        if not any(c.startswith(UPDATE_RMS) for c in run.steps.columns):
            elements.append(Text(f"{run.name} has no update RMS in metrics.jsonl.", "absent"))
    return Section("updates", "Updates", "Size of the updates", tuple(elements))


NS5_RANGE = (0.86, 1.08)  # what five Newton-Schulz steps give of the nominal size, by shape
_NOMINAL = (
    " Dashed is Muon's nominal size (Moonlight: 0.2, about that of an AdamW update). It is nominal: five "
    f"Newton-Schulz steps bring singular values near 1, not to it, and give {NS5_RANGE[0]} to {NS5_RANGE[1]} of it by "
    "the shape of the matrix (shaded); less where a gradient has few directions."
)


def _nominal(runs: Sequence[Run]) -> list[Series]:
    """A dashed line at each nominal update RMS of the runs that have Muon updates, shaded by what NS5 gives of it."""
    column = UPDATE_RMS + "muon"
    having = [r for r in runs if r.steps.finite(column)]
    low, high = NS5_RANGE
    return [
        Series("nominal", span, (t, t), 0, "reference", (low * t, low * t), (high * t, high * t))
        for span, t in _stretches(having, "optimizer", "update_rms")
    ]
