"""How training went: loss curves, learning rate, gradients and speed, update size."""

from collections.abc import Sequence

from earthshine.report.content import Drawing, Element, Figure, LegendItem, Section, Text
from earthshine.report.curves import (
    Format,
    first_last,
    legend,
    lines,
    marks,
    marks_in_words,
    numbers_table,
    panel,
    remarks,
    stretches,
)
from earthshine.report.facts import dig, same_samples
from earthshine.report.figures import HALF, NARROW, WIDE, Chart, Series, draw_chart
from earthshine.report.runs import HEADS_CLIPPED, MAX_LOGIT, UPDATE_RMS, Run
from earthshine.report.scales import fixed, short, whole


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
        words = "; ".join(filter(None, (first_last(r, "loss", fixed) for r in runs)))
        chart = Chart(
            "Training loss by step",
            f"Training loss: {words}.{marks_in_words(runs)}",
            "step",
            "nats per token",
            tuple(series),
            marks=marks(runs),
        )
        wide, narrow = draw_chart(chart, WIDE, 380, "fig-loss-w"), draw_chart(chart, NARROW, 300, "fig-loss-n")
        caption = "Training loss, of each step's own batch: that is why it jumps from step to step."
        more = []
        if heldout:
            caption += " Large hollow marks are held-out losses; their errors are further below."
            more = [LegendItem("held-out loss", 0, "point")]
        table = numbers_table("Training loss, nats per token", runs, [("", "loss", fixed)])
        elements.append(
            Figure(
                "Training loss by step",
                caption + remarks(notes),
                (Drawing(wide, narrow),),
                legend(drawn, *more),
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


def dynamics_section(runs: Sequence[Run]) -> Section:
    """Learning rate, gradient norm and speed as small multiples."""
    limit = ("clip_grad_norm",)
    panels = (
        panel(runs, "lr", "Learning rate", "peak times schedule", "fig-lr", from_zero=True),
        panel(runs, "grad_norm", "Gradient norm", "before clipping", "fig-grad", limit, may_log=True, from_zero=True),
        panel(runs, "tokens_per_second", "Speed", "tokens per second", "fig-speed", from_zero=True),
    )
    elements: list[Element] = []
    if any(panels):
        caption = "One panel per quantity, over the same steps."
        if limits := sorted({short(v) for _, v in stretches(runs, *limit)}):
            caption += f" Gradients are clipped to a norm of {' or '.join(limits)} (dashed, where in range)."
        drawn = [(i, r) for i, r in enumerate(runs) if len(r.steps)]
        caption += remarks((r.name, lines(r, "grad_norm", 0)[1]) for _, r in drawn)
        columns = [("learning rate", "lr", short), ("gradient norm", "grad_norm", short)]
        table = numbers_table("Learning rate and gradient norm", runs, columns)
        title = "Step by step"
        elements.append(Figure(title, caption, tuple(p for p in panels if p), legend(drawn), table))
    names = zip(panels, ("learning rate", "gradient norm", "tokens per second"), strict=True)
    absent = [what for panel, what in names if panel is None]
    if absent:
        elements.append(Text(f"No run recorded its {', '.join(absent)}.", "absent"))
    elements += _qk_clip_figure(runs)
    return Section("dynamics", "Dynamics", "Learning rate, gradients, speed", tuple(elements))


def _qk_clip_figure(runs: Sequence[Run]) -> list[Figure]:
    """The largest attention logit, and how many heads QK-Clip scaled; no figure where neither was recorded."""
    drawn = [(i, r) for i, r in enumerate(runs) if r.steps.finite(MAX_LOGIT) or r.steps.finite(HEADS_CLIPPED)]
    if not drawn:
        return []
    threshold = ("optimizer", "qk_clip_threshold")
    panels = (
        panel(runs, MAX_LOGIT, "Largest attention logit", "per step", "fig-logit", threshold, may_log=True),
        panel(runs, HEADS_CLIPPED, "Heads clipped", "per step", "fig-clipped", from_zero=True, integer_y=True),
    )
    caption = "QK-Clip scales the query and key weights of each head whose largest logit exceeds the threshold"
    limits = sorted({short(v) for _, v in stretches([r for _, r in drawn], *threshold)})
    caption += f" of {' or '.join(limits)} (dashed, where in range)." if limits else "."
    if any(_skips_layers(r) for _, r in drawn):
        caption += " Layers with a frozen query or key projection are neither measured nor scaled."
    caption += remarks((r.name, lines(r, MAX_LOGIT, 0)[1]) for _, r in drawn)
    columns = [("largest logit", MAX_LOGIT, short), ("heads clipped", HEADS_CLIPPED, whole)]
    table = numbers_table("QK-Clip", runs, [c for c in columns if any(r.steps.finite(c[1]) for r in runs)])
    return [Figure("QK-Clip by step", caption, tuple(p for p in panels if p), legend(drawn), table)]


def _skips_layers(run: Run) -> bool:
    """Whether QK-Clip leaves out layers of a run, by its plan."""
    layers, clipped = dig(run.model, "num_hidden_layers"), dig(run.plan, "qk_clip_layers")
    return isinstance(layers, int) and isinstance(clipped, list) and len(clipped) < layers


_NAMES = {"muon": "Muon", "adamw": "AdamW", "scion": "Scion"}


def update_section(runs: Sequence[Run]) -> Section:
    """Root mean square of the updates, one panel per algorithm."""
    algorithms = sorted({c.removeprefix(UPDATE_RMS) for r in runs for c in r.steps.columns if c.startswith(UPDATE_RMS)})
    elements: list[Element] = []
    panels, nominal_drawn = [], False
    for algorithm in reversed(algorithms):
        column = UPDATE_RMS + algorithm
        series = [s for i, run in enumerate(runs) for s in lines(run, column, i)[0]]
        if not series:
            continue
        name = _NAMES.get(algorithm, algorithm)
        references = [] if algorithm != "muon" else _nominal(runs)
        nominal_drawn = nominal_drawn or bool(references)
        series += references
        words = "; ".join(filter(None, (first_last(r, column, short) for r in runs)))
        chart = Chart(
            f"Update RMS, {name}",
            f"{words}.",
            "step",
            "update RMS, before the learning rate",
            tuple(series),
            marks=marks(runs),
        )
        wide, narrow = (draw_chart(chart, w, 250, f"fig-rms-{algorithm}-{w}") for w in (HALF, NARROW))
        panels.append(Drawing(wide, narrow, f"{name} parameters"))
    if panels:
        drawn = [(i, r) for i, r in enumerate(runs) if any(r.steps.finite(UPDATE_RMS + a) for a in algorithms)]
        more = (LegendItem("nominal Muon update", 0, "reference"),) if nominal_drawn else ()
        columns: list[tuple[str, str, Format]] = [
            (_NAMES.get(a, a), UPDATE_RMS + a, short) for a in reversed(algorithms)
        ]
        table = numbers_table("Root mean square of the updates", runs, columns)
        caption = "Root mean square over all elements of a step's update, before it is multiplied by the learning rate."
        if nominal_drawn:
            caption += _NOMINAL
        caption += remarks((r.name, lines(r, UPDATE_RMS + algorithms[-1], 0)[1]) for _, r in drawn)
        elements.append(Figure("Update RMS by step", caption, tuple(panels), legend(drawn, *more), table))
    for run in runs:
        if not any(c.startswith(UPDATE_RMS) for c in run.steps.columns):
            elements.append(Text(f"{run.name} has no update RMS in metrics.jsonl.", "absent"))
    return Section("updates", "Updates", "Size of the updates", tuple(elements))


NS5_RANGE = (0.86, 1.08)  # what five Newton-Schulz steps give of the nominal size, by shape
_NOMINAL = (
    " Dashed is Muon's nominal size (Moonlight: 0.2, about that of an AdamW update). Five Newton-Schulz steps bring "
    f"singular values near 1, not to 1: depending on the matrix's shape the actual size is {NS5_RANGE[0]} to "
    f"{NS5_RANGE[1]} times the nominal one (shaded), less where a gradient has few directions."
)


def _nominal(runs: Sequence[Run]) -> list[Series]:
    """A dashed line at each nominal update RMS of the runs that have Muon updates, shaded by what NS5 gives of it."""
    column = UPDATE_RMS + "muon"
    having = [r for r in runs if r.steps.finite(column)]
    low, high = NS5_RANGE
    return [
        Series("nominal", span, (t, t), 0, "reference", (low * t, low * t), (high * t, high * t))
        for span, t in stretches(having, "optimizer", "update_rms")
    ]
