"""The report's first sentence: what was trained, what that did, and whether every check holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from earthshine.report.facts import dig, plan_number, tokens_done
from earthshine.report.results import UNIT, Comparison, evaluations
from earthshine.report.runs import Run
from earthshine.report.scales import compact, fixed, short, whole
from earthshine.report.statistics import BAR, Difference, paired

SIGNIFICANT = f"significant at {short(BAR)} standard errors"


def verdict(runs: Sequence[Run], compared: Sequence[Comparison]) -> str:
    """One sentence, for a reader who reads no further; from the run folders alone."""
    function = _function_clause(runs)
    if len(runs) == 1:
        training = _one_run(runs[0], _course(runs[0], compared, 0), introduced=bool(function))
    elif len(runs) == 2:
        training = _two_runs(runs, compared, introduced=bool(function))
    else:
        training = _many_runs(runs)
    sentence = "; ".join(clause for clause in (function, training, _checks_clause(runs)) if clause)
    name_first = len(runs) == 1 and not function and len(runs[0].steps) > 0
    return f"{sentence if name_first else sentence[0].upper() + sentence[1:]}."


def _function_clause(runs: Sequence[Run]) -> str:
    """Whether an upcycled model is its dense parent's function; "" where that was not verified."""
    checks = [v for run in runs for v in run.verifications if v.check == "upcycle"]
    rows = [row for v in checks for row in v.rows if row.name.startswith("logits")]
    if not rows:
        return ""
    many = len(checks) > 1
    subject, verb = ("the upcycled MoEs", "compute") if many else ("the upcycled MoE", "computes")
    parent = "their dense parents' functions" if many else "the dense model's function"
    failed = [row for row in rows if not row.ok]
    if failed:
        row = failed[0]
        limit = f"{row.name} {_number(row.measured)}, tolerance {_number(row.tolerance)}"
        return f"{subject} {'do' if many else 'does'} **not** compute {parent} ({limit})"
    measured = [row.measured for row in rows if row.name == "logits, relative" and isinstance(row.measured, float)]
    return f"{subject} {verb} {parent}" + (f" to {short(max(measured), 1)}" if measured else "")


def _number(value: object) -> str:
    return short(value, 2) if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Course:
    """What a run's loss did. `kind` is equal for runs whose losses did the same."""

    noun: str  # "held-out loss"
    words: str  # "fell from 2.08 to 2.03"
    kind: str

    @property
    def sentence_end(self) -> str:
        return f"{self.noun} {self.words}"


def _course(run: Run, compared: Sequence[Comparison], index: int) -> Course:
    step = diverged_at(run)
    if step is not None:
        return Course("loss", f"is **not finite** from step {whole(step)} on", "diverged")
    before, after = evaluations(run)
    if before and after:
        outcome = next((c.outcome for c in compared if c.color == index and c.within_run), "")
        words, kind = _change(before.loss, after.loss, outcome)
        return Course("held-out loss", words, kind)
    if after:
        return Course("held-out loss", f"is {fixed(after.loss, 2)}", "after only")
    losses = run.steps.finite("loss")
    if not losses:
        return Course("loss", "is not recorded", "nothing")
    first, last = _apart(losses[0], losses[-1])
    held_out = f"the held-out loss was {fixed(before.loss, 2)} before" if before else "no held-out loss"
    return Course("training loss", f"went from {first} to {last} ({held_out})", "training")


def _change(before: float, after: float, outcome: Difference | str) -> tuple[str, str]:
    """(words, kind) of a held-out loss that was measured twice."""
    first, last = _apart(before, after)
    if isinstance(outcome, str):
        if "different" in outcome:
            return f"is {last} ({first} before, on different sequences)", "other sequences"
        return f"went from {first} to {last} (the error of that change is not recorded)", "no error"
    words = {
        "lower": f"fell from {first} to {last}",
        "higher": f"rose from {first} to {last}",
        "unclear": f"did not change significantly ({first} to {last})",
        "equal": f"stayed at {last}",
        "no error": f"went from {first} to {last} (on a single sequence)",
    }
    return words[outcome.verdict], outcome.verdict


def _apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers with two digits, or as many (up to four) as show that they differ."""
    for digits in (2, 3, 4):
        texts = fixed(a, digits), fixed(b, digits)
        if texts[0] != texts[1]:
            return texts
    return fixed(a, 2), fixed(b, 2)


def diverged_at(run: Run) -> int | None:
    """The step from which on the loss is not finite; None for a run that ends with a finite one."""
    losses = run.steps.column("loss")
    if not losses or math.isfinite(losses[-1]):
        return None
    last = max((i for i, loss in enumerate(losses) if math.isfinite(loss)), default=-1)
    return run.steps.step[last + 1]


def _length(run: Run) -> str:
    """ "24 steps on 197k tokens", "3 of 24 planned steps", with what was changed on the way."""
    done, planned = run.steps.step[-1] if run.steps.step else 0, dig(run.config, "num_steps")
    unfinished = isinstance(planned, int) and planned > done
    tokens = tokens_done(run)
    changed = [whole(s.first_step) for s in run.starts if s.another_run]
    words = f"{whole(done)} of {whole(planned)} planned" if unfinished else whole(done)
    words += " step" if done == 1 and not unfinished else " steps"
    words += f" on {compact(tokens)} tokens" if tokens else ""
    return words + (f", its config changed at step {' and '.join(changed)}," if changed else "")


def _model(run: Run) -> str:
    """ "an MoE of 8 experts (283M parameters, 156M active)"; "" when it is not recorded."""
    if run.model is None:
        return ""
    total, active = plan_number(run, "parameters"), plan_number(run, "active_parameters")
    experts = dig(run.model, "moe", "num_experts")
    if not experts:
        return "a dense model" + (f" of {compact(total)} parameters" if total else "")
    size = f" ({compact(total)} parameters, {compact(active)} active)" if total and active else ""
    return f"an MoE of {experts} experts{size}"


def _one_run(run: Run, course: Course, introduced: bool) -> str:
    if not len(run.steps):
        return f"no training step of {run.name} is recorded"
    if introduced:
        return f"after {_length(run)} its {course.sentence_end}"
    model = _model(run)
    scratch = " from scratch" if dig(run.config, "init", "kind") == "scratch" else ""
    named = f"{run.name}, {model}," if model else run.name
    return f"{named} was trained{scratch} for {_length(run).rstrip(',')}: its {course.sentence_end}"


def _two_runs(runs: Sequence[Run], compared: Sequence[Comparison], introduced: bool) -> str:
    """The MoE beside its dense parent, or the second run beside the first."""
    sparse = [bool(dig(run.model, "moe", "num_experts")) for run in runs]
    pair = all(run.model for run in runs) and sparse.count(True) == 1
    index = sparse.index(True) if pair else 1
    run, other = runs[index], runs[1 - index]
    moe = "the upcycled MoE" if introduced else "the MoE"
    name, other_name = (moe, "the dense model") if pair else (run.name, other.name)
    course, other_course = _course(run, compared, index), _course(other, compared, 1 - index)
    same_length = _length(run) == _length(other)
    elsewhen = "" if same_length else f" after {_length(other).rstrip(',')}"
    owner = "its" if introduced and pair else f"{name}'s"
    start = f"after {_length(run).rstrip(',')}{'' if owner == 'its' else ','} {owner} {course.sentence_end}"
    gap = next((c.outcome for c in compared if not c.within_run and c.when == "after"), None)
    if course.noun == other_course.noun and isinstance(gap, Difference):
        if gap.verdict in ("lower", "higher"):
            way = "below" if (gap.value < 0) == (index == 1) else "above"
            return f"{start}, {short(abs(gap.value), 2)} {way} {other_name}'s{elsewhen} ({SIGNIFICANT})"
        if gap.verdict in ("unclear", "equal") and course.kind == other_course.kind:
            if course.kind in ("lower", "higher"):
                return f"{start}, as {other_name}'s did{elsewhen}"
            return f"{start}, like {other_name}'s{elsewhen}"
    ending = other_course.words if course.noun == other_course.noun else other_course.sentence_end
    return f"{start}, {other_name}'s {ending}{elsewhen}"


def _many_runs(runs: Sequence[Run]) -> str:
    diverged = [run.name for run in runs if diverged_at(run) is not None]
    final = [(after, run) for run in runs if (after := evaluations(run)[1]) and run.name not in diverged]
    lost = f"{len(diverged)} of {len(runs)} runs **diverged** ({', '.join(diverged)})" if diverged else ""
    if len(final) < 2:
        return lost or f"{len(runs)} runs were trained (no held-out losses to compare)"
    (best, first), (worst, last) = min(final, key=lambda f: f[0].loss), max(final, key=lambda f: f[0].loss)
    gap = paired(best, worst, first.name, last.name)
    low, high = _apart(best.loss, worst.loss)
    if isinstance(gap, str):
        judged = f"not compared: {gap}"
    else:
        judged = SIGNIFICANT if gap.verdict == "lower" else f"not {SIGNIFICANT}"
    ends = f"lowest for {first.name}, {low} {UNIT}, and highest for {last.name}, {high} ({judged})"
    return "; ".join(filter(None, (f"of {len(runs)} runs, the held-out loss is {ends}", lost)))


def _checks_clause(runs: Sequence[Run]) -> str:
    checks = [v for run in runs for v in run.verifications]
    results = [row.ok for v in checks for row in v.rows]
    results += [v.ok for v in checks if not v.rows or (not v.ok and all(row.ok for row in v.rows))]
    if not results:
        return "no check is recorded"
    failed = results.count(False)
    if failed:
        return f"**{failed} of {len(results)} checks {'does' if failed == 1 else 'do'} not hold**"
    return "every check holds" if len(results) > 1 else "its one check holds"
