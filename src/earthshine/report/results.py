"""What training did for quality: the result in short, held-out losses and their differences, text samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from earthshine.report.content import (
    Bullets,
    Card,
    Cards,
    Cell,
    Drawing,
    Element,
    Figure,
    Link,
    Links,
    Section,
    Sides,
    Table,
    Text,
    Tone,
)
from earthshine.report.evidence import tolerance_used
from earthshine.report.facts import costs
from earthshine.report.figures import NARROW, WIDE, Interval, draw_intervals
from earthshine.report.runs import Heldout, Run, Samples, Verification
from earthshine.report.scales import fixed, short, whole, with_error
from earthshine.report.statistics import BAR, Difference, paired, ratio

UNIT = "nats per token"


@dataclass(frozen=True)
class Comparison:
    """The difference of two held-out losses, or the reason why they cannot be compared."""

    label: str  # short, for the table
    mark: str  # shorter, for the figure
    sentence: str  # "{run}: after training, the held-out loss is", which the verdict completes
    reference: str  # what it is compared with, at the sentence's end
    color: int
    when: Literal["before", "after"]
    outcome: Difference | str

    @property
    def within_run(self) -> bool:
        """Whether it compares a run with itself before training."""
        return self.reference == "before it"


def evaluations(run: Run) -> tuple[Heldout | None, Heldout | None]:
    """Before and after: of eval/, or else the first and the last of metrics.jsonl if they are at different steps."""
    during = run.heldout_during
    before = run.before or (during[0] if during and during[0].step == 0 else None)
    after = run.after or (during[-1] if during and during[-1].step != 0 else None)
    return before, after


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """After against before for each run; then each other run against the first one, before and after."""
    compared = []
    for i, run in enumerate(runs):
        before, after = evaluations(run)
        if before and after:
            outcome = paired(after, before, f"{run.name} after", f"{run.name} before")
            start = f"**{run.name}**: after training, the held-out loss is"
            compared.append(
                Comparison(f"{run.name}: after \u2212 before", run.name, start, "before it", i, "after", outcome)
            )
    words: tuple[Literal["before", "after"], ...] = ("before", "after")
    for when, word in enumerate(words):
        for i, run in enumerate(runs[1:], 1):
            heldout, base = evaluations(run)[when], evaluations(runs[0])[when]
            if heldout and base:
                outcome = paired(heldout, base, f"{run.name} {word}", f"{runs[0].name} {word}")
                start = f"**{run.name} against {runs[0].name}**, {word} training: the held-out loss is"
                label = f"{word}: {run.name} \u2212 {runs[0].name}"
                reference = f"that of {runs[0].name}"
                compared.append(Comparison(label, f"{word}: {run.name}", start, reference, i, word, outcome))
    return compared


def verdict_sentence(c: Comparison) -> str:
    """What one comparison shows, in one sentence."""
    d = c.outcome
    if isinstance(d, str):
        return f"{c.sentence} not compared with {c.reference}: {d}."
    if d.verdict == "equal":
        return f"{c.sentence} the same as {c.reference} to float32 rounding (difference {short(d.value)})."
    way = "lower" if d.value < 0 else "higher"
    size, _, error = with_error(abs(d.value), d.stderr).partition(" \u00b1 ")
    start = f"{c.sentence} {size} {UNIT} {way} than {c.reference}"
    if d.verdict == "no error":
        return f"{start}, measured on a single sequence, so without a standard error: no conclusion."
    errors = f"{short(ratio(d))} times its standard error of {error}"
    if d.verdict == "unclear":
        return f"{start}, {errors}: **not significant** at {short(BAR)} standard errors."
    return f"{start}, {errors}: **significant** at {short(BAR)} standard errors."


def tone(d: Difference | str) -> Tone:
    """The direction of a significant difference: neither is a failure, which only a missed tolerance is."""
    if isinstance(d, Difference) and d.verdict in ("lower", "higher"):
        return "down" if d.verdict == "lower" else "up"
    return "quiet"


def verdict_words(d: Difference) -> str:
    return {
        "lower": "lower",
        "higher": "higher",
        "unclear": "not significant",
        "equal": "equal",
        "no error": "no standard error",
    }[d.verdict]


def summary(runs: Sequence[Run], compared: Sequence[Comparison], links: Sequence[Link]) -> Section:
    """For a reader with one minute: each run's result beside its cost, and the checks."""
    cards = [card for i, run in enumerate(runs) if (card := _run_card(run, i, compared))]
    checks = [v for run in runs for v in run.verifications]
    if checks:
        cards.append(_checks_card(checks))
    elements: list[Element] = [Cards(tuple(cards))] if cards else []
    if links:
        elements.append(Links(tuple(links)))
    return Section("summary", "In short", "The result in short", tuple(elements))


def _run_card(run: Run, color: int, compared: Sequence[Comparison]) -> Card | None:
    before, after = evaluations(run)
    losses = run.steps.finite("loss")
    if before and after:
        change = next((c.outcome for c in compared if c.color == color and c.within_run), None)
        detail = f"held-out loss, {UNIT}; {fixed(before.loss)} before training"
        if isinstance(change, Difference):
            detail += f", change {with_error(change.value, change.stderr, sign=True)}"
        return Card(run.name, fixed(after.loss), detail, color=color, facts=costs(run))
    if losses:
        detail = (
            f"training loss of the last step, {UNIT}; {fixed(losses[0])} in the first (no held-out losses to compare)"
        )
        return Card(run.name, fixed(losses[-1]), detail, color=color, facts=costs(run))
    return None


def _checks_card(checks: Sequence[Verification]) -> Card:
    rows = [row for v in checks for row in v.rows]
    all_ok = all(v.ok for v in checks)
    count = f"{sum(r.ok for r in rows)} of {len(rows)}" if rows else f"{sum(v.ok for v in checks)} of {len(checks)}"
    facts = tuple((v.check, f"{sum(r.ok for r in v.rows)} of {len(v.rows)}" if v.rows else "") for v in checks)
    used = [fraction for row in rows if (fraction := tolerance_used(row)) is not None]
    if all_ok and used:
        facts += (("Closest to tolerance", f"{whole(100 * max(used))} %"),)
    words = "checks hold" if all_ok else "checks hold; see Verification"
    return Card("Verification", count, words, "good" if all_ok else "bad", facts=facts)


def heldout_section(runs: Sequence[Run], compared: Sequence[Comparison]) -> Section:
    """The paired differences in words, as figures and as a table, then the absolute losses."""
    elements: list[Element] = []
    if compared:
        elements.append(Bullets(tuple((verdict_sentence(c), tone(c.outcome)) for c in compared)))
    else:
        elements.append(
            Text("No held-out loss was measured both before and after, so no difference is judged.", "absent")
        )
    measured = [(c, c.outcome) for c in compared if isinstance(c.outcome, Difference)]
    if measured:
        within = [k for k in measured if k[0].within_run]
        between = [k for k in measured if not k[0].within_run]
        figures = (("Change of held-out loss by training", within), (f"Held-out loss against {runs[0].name}", between))
        elements += [_interval_figure(title, rows, bool(within) and rows is between) for title, rows in figures if rows]
        elements += [_difference_table(measured), Text(_CAVEAT, "note")]
    evaluated = [(i, run, *evaluations(run)) for i, run in enumerate(runs)]
    rows = [
        _heldout_row(run, i, word, h)
        for i, run, before, after in evaluated
        for word, h in (("before", before), ("after", after))
        if h
    ]
    if rows:
        headers = ("Run", "When", f"Loss, {UNIT}", "Bits per byte", "Tokens", "Sequences")
        caption = "Loss on held-out (validation) text, \u00b1 one standard error over its sequences."
        elements.append(Table(caption, headers, tuple(rows), frozenset(range(2, 6))))
    for _, run, before, after in evaluated:
        missing = [w for w, h in (("before", before), ("after", after)) if h is None]
        if missing:
            elements.append(Text(f"{run.name} has no held-out loss {' or '.join(missing)} training.", "absent"))
    return Section("heldout", "Held-out", "Held-out loss", tuple(elements))


_CAVEAT = (
    "Differences are paired by held-out sequence: what makes a text easy or hard for both models cancels, so a "
    "difference has a much smaller error than the two losses. That error covers the choice of held-out text, in which "
    "neighboring sequences may share a document. It does not cover the choice of seed or learning rate: for that, "
    "train several runs of each kind."
)


def _heldout_row(run: Run, color: int, word: str, h: Heldout) -> tuple[Cell | str, ...]:
    bits_error = h.stderr * h.bits_per_byte / h.loss if h.loss else math.nan
    return (
        Cell(run.name, color=color),
        word if h.step is None else f"{word} (step {whole(h.step)})",
        with_error(h.loss, h.stderr),
        with_error(h.bits_per_byte, bits_error) + (" (lossy: unknown tokens)" if h.lossy else ""),
        whole(h.tokens) if h.tokens else "not recorded",
        whole(len(h.sequences)) if h.sequences else "not recorded",
    )


def _interval_figure(title: str, measured: Sequence[tuple[Comparison, Difference]], second: bool) -> Figure:
    rows = [
        Interval(c.mark, d.value, BAR * d.stderr, with_error(d.value, d.stderr, sign=True), c.color)
        for c, d in measured
    ]
    described = "; ".join(f"{r.label}: {r.text}" for r in rows)
    wide, narrow = (
        draw_intervals(title, described, UNIT, rows, w, f"fig-diff{int(second)}-{w}") for w in (WIDE, NARROW)
    )
    caption = (
        "Read as the figure above."
        if second
        else (
            "Left of zero is better. The point is the difference, the bar two standard errors to either side: where it "
            "does not touch zero, the difference is significant. Numbers are \u00b1 one standard error."
        )
    )
    return Figure(title, caption, (Drawing(wide, narrow),))


def _difference_table(measured: Sequence[tuple[Comparison, Difference]]) -> Table:
    rows = tuple(
        (
            c.label,
            with_error(d.value, d.stderr, sign=True),
            with_error(d.bits_per_byte, d.bits_per_byte_stderr, sign=True),
            short(ratio(d)) if math.isfinite(d.stderr) else "n/a",
            whole(d.num_sequences),
            Cell(verdict_words(d), tone(d)),
        )
        for c, d in measured
    )
    headers = ("Difference", f"Loss, {UNIT}", "Bits per byte", "Standard errors", "Sequences", "Verdict")
    caption = (
        f"Paired differences, \u00b1 one standard error. Significant: more than {short(BAR)} standard errors from zero."
    )
    return Table(caption, headers, rows, frozenset(range(1, 5)))


_SAMPLES = "Text as the model wrote it. So few samples do not measure quality; they show that the model still writes."


def samples_section(runs: Sequence[Run]) -> Section:
    """What the models write, before and after, side by side for the same prompt."""
    elements: list[Element] = []
    for run in runs:
        before, after = run.samples_before, run.samples_after
        if not before and not after:
            elements.append(
                Text(f"{run.name} has no text samples (eval/samples-before.json, eval/samples-after.json).", "absent")
            )
            continue
        sides = [(word, s) for word, s in (("Before", before), ("After", after)) if s]
        columns = tuple(_column(run, word, s) for word, s in sides)
        prompts = list(dict.fromkeys(sample.prompt for _, s in sides for sample in s.samples))
        rows = tuple((prompt, tuple(_texts(s, prompt) for _, s in sides)) for prompt in prompts)
        elements.append(Sides(f"{run.name}", columns, rows))
        if not before or not after:
            elements.append(Text(f"{run.name} has samples only {'after' if after else 'before'} training.", "absent"))
    if any(isinstance(b, Sides) for b in elements):
        elements.insert(0, Text(_SAMPLES, "note"))
    return Section("samples", "Samples", "Text samples", tuple(elements))


def _column(run: Run, word: str, samples: Samples) -> str:
    """ "Before" or "After", with what the file's label adds to that and to the run's name."""
    label = " ".join(w for w in samples.label.replace(run.name, " ").split() if w.lower() != word.lower())
    return f"{word} ({label})" if label else word


def _texts(samples: Samples, prompt: str) -> str:
    texts = [s.text for s in samples.samples if s.prompt == prompt]
    return "\n\u2014\n".join(texts) if texts else "(no sample for this prompt)"
