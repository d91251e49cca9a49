"""How tokens were spread over the experts: heat maps, MaxVio by layer and step, balance."""

import math
from collections.abc import Sequence

from earthshine.report.content import Drawing, Element, Figure, LegendItem, Section, Text, figure_numbers
from earthshine.report.curves import first_last, legend, lines, marks, numbers_table, panel, remarks, smoothing
from earthshine.report.figures import (
    HALF,
    HEAT_BINS,
    MARKER_LIMIT,
    MAX_HEAT_COLUMNS,
    NARROW,
    WIDE,
    Chart,
    Multiple,
    Series,
    draw_chart,
    draw_heat,
    draw_multiples,
)
from earthshine.report.runs import LAYER_LOAD, MEDIAN_LOAD, WORST_LOAD, Run
from earthshine.report.scales import fixed, short, thin, whole
from earthshine.report.statistics import moving_mean

MAX_MULTIPLES = 24  # layers drawn of a deeper model
POINTS = 120  # at most, per layer
MAXVIO = "the load of its busiest expert as a multiple of the fair share, minus 1 (arXiv:2408.15664)"


def experts_section(runs: Sequence[Run]) -> Section:
    """Which experts got the tokens: heat maps of the first and the last step, and MaxVio by step."""
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
    multiples, note = _multiples(run, index)
    drawings += multiples
    num_experts = max(map(len, last[1].values()))
    caption = "Tokens routed to each expert of each layer, as a multiple of the fair share (1 = perfectly balanced)."
    if num_experts > MAX_HEAT_COLUMNS:
        group = math.ceil(num_experts / MAX_HEAT_COLUMNS)
        caption += f" A column stands for {group} neighboring experts and shows the one farthest from the fair share."
    unused = sum(v <= 0 for row in last[1].values() for v in row)
    if unused:
        caption += f" At the last step {whole(unused)} experts received no token (gray)."
    caption += note
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


def _multiples(run: Run, index: int) -> tuple[list[Drawing], str]:
    """MaxVio of each layer over the steps, side by side on one scale, and what the caption says of it."""
    assert run.steps.last_load
    layers = list(run.steps.last_load[1])
    columns = {layer: [v - 1 for v in run.steps.column(f"{LAYER_LOAD}{layer}")] for layer in layers}
    curves = {layer: thin(run.steps.step, column, POINTS) for layer, column in columns.items()}
    curves = {layer: curve for layer, curve in curves.items() if len(curve.y) > 1}
    if not curves:
        return [], ""
    drawn = list(curves)
    worst = max(curves, key=lambda layer: curves[layer].y[-1])
    if len(drawn) > MAX_MULTIPLES:
        even = {drawn[round(i * (len(drawn) - 1) / (MAX_MULTIPLES - 2))] for i in range(MAX_MULTIPLES - 1)}
        drawn = sorted(even | {worst})
    rows = [Multiple(f"layer {layer}", curves[layer].x, curves[layer].y, index) for layer in drawn]
    words = f"MaxVio of {len(rows)} layers; at the end highest in layer {worst}, {fixed(curves[worst].y[-1], 2)}."
    title = "MaxVio by layer"
    wide, narrow = (draw_multiples(title, words, rows, w, f"fig-maxvio-{index}-{w}") for w in (WIDE, NARROW))
    note = f" MaxVio of a layer: {MAXVIO}. All layers are on one scale, each with its last value."
    if len(drawn) < len(curves):
        note += f" {len(drawn)} of {len(curves)} layers are drawn, the one that ends highest among them."
    if (group := curves[worst].group) > 1:
        note += f" Each point is the mean of {whole(group)} {run.steps.word}."
    first, last = whole(min(rows[0].x)), whole(run.steps.step[-1])
    return [Drawing(wide, narrow, f"{title}, steps {first} to {last}", full=True)], note


def _load_figure(runs: Sequence[Run], sparse: Sequence[tuple[int, Run]]) -> Figure:
    series, notes = [], []
    for i, run in sparse:
        curve, note = lines(run, WORST_LOAD, i, f"{run.name}, worst layer", offset=-1)
        series += curve
        notes.append((run.name, note))
        if run.steps.last_load and len(run.steps.last_load[1]) > 1:  # in a single layer the middle one is the worst
            shown = thin(run.steps.step, [v - 1 for v in run.steps.column(MEDIAN_LOAD)])
            smooth = moving_mean(shown.y, smoothing(shown.y)) if len(shown.y) > MARKER_LIMIT else shown.y
            series.append(Series(f"{run.name}, middle layer", shown.x, smooth, i, "dashed"))
    words = "; ".join(first_last(r, WORST_LOAD, lambda v: fixed(v - 1, 2)) for _, r in sparse)
    title = "MaxVio by step"
    chart = Chart(title, f"Worst layer: {words}.", "step", "MaxVio", tuple(series), from_zero=True, marks=marks(runs))
    wide, narrow = draw_chart(chart, WIDE, 260, "fig-load-w"), draw_chart(chart, NARROW, 250, "fig-load-n")
    caption = f"MaxVio of the worst layer in each step: {MAXVIO}. 0 is perfect balance."
    more: tuple[LegendItem, ...] = ()
    if any(s.kind == "dashed" for s in series):
        caption, more = f"{caption} Dashed: the middle layer.", (LegendItem("middle layer", 0, "reference"),)
    table = numbers_table(title, runs, [("worst layer", WORST_LOAD, lambda v: fixed(v - 1, 3))])
    return Figure(title, caption + remarks(notes), (Drawing(wide, narrow),), legend(sparse, *more), table)


_BALANCE = (  # column, title, unit, what the caption says of it
    (
        "balance",
        "Balance loss",
        "1 = uniform",
        "The balance loss is the mean over layers, before its coefficient.",
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
        panel(runs, column, title, unit, f"fig-{column}", from_zero=column != "balance", integer_y=unit == "number")
        for column, title, unit, _ in some
    ]
    caption = " ".join(words for *_, words in some)
    caption += remarks((r.name, lines(r, some[0][0], 0)[1]) for r in runs)
    table = numbers_table("Expert balancing", runs, [(title.lower(), column, short) for column, title, *_ in some])
    return [Figure("Balance by step", caption, tuple(p for p in panels if p), legend(sparse), table)]
