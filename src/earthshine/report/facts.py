"""What was run, in words and numbers, from config.json, plan.json and the step lines."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from earthshine.console import human_seconds
from earthshine.report.content import Cell, Table, Text
from earthshine.report.runs import Run
from earthshine.report.scales import fixed, flops, optimizer_name, short, whole
from earthshine.report.starts import mid_run_changes, segments, starts_table

UNKNOWN = "not recorded"
NOTHING = "nothing"  # changed between starts
NONE = "none"  # of the parameters
_MANY_EPOCHS = 4  # as `data.usage`, beyond which training warns; report reads run folders only


def dig(data: Any, *keys: str) -> Any:
    """The value under a path of keys, or None."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def plan_number(run: Run, key: str) -> float | None:
    """A number of plan.json, or None where it is absent."""
    value = dig(run.plan, key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def model_words(run: Run) -> str:
    model = run.model
    if model is None:
        return UNKNOWN
    layers = model.get("num_hidden_layers", 0)
    words = f"{layers} layers, hidden size {model.get('hidden_size')}"
    num_experts = dig(model, "moe", "num_experts")
    if not num_experts:
        return f"dense: {words}"
    num_moe_layers = len(dig(model, "moe", "layers") or ())
    spread = "every layer" if num_moe_layers == layers else f"{num_moe_layers} of {layers} layers"
    return f"MoE: {words}; {num_experts} experts, top\u2011{dig(model, 'moe', 'top_k')}, in {spread}"


def start_words(run: Run) -> str:
    init = dig(run.config, "init")
    if not isinstance(init, Mapping):
        return UNKNOWN
    match init.get("kind"):
        case "scratch":
            return "random initialization"
        case "huggingface":
            return f"weights in `{init.get('path')}`, fresh optimizer"
        case "checkpoint":
            return f"checkpoint of `{init.get('path')}`, fresh optimizer"
    return str(init.get("kind"))


def steps_words(run: Run) -> str:
    done, planned = (run.steps.step[-1] if run.steps.step else 0), dig(run.config, "num_steps")
    return whole(done) if planned in (None, done) else f"{whole(done)} of {whole(planned)} planned"


def tokens_done(run: Run) -> float | None:
    """Target tokens trained on so far."""
    total = run.steps.finite("total_tokens")
    return total[-1] if total else None


def _epochs_per_step(plan: Any) -> dict[str, float]:
    """Of each source, by the name of its folder."""
    planned, sources = dig(plan, "num_steps"), dig(plan, "sources")
    if not isinstance(planned, int) or not planned or not isinstance(sources, list):
        return {}
    return {str(dig(s, "path")).rstrip("/").rpartition("/")[2]: (dig(s, "epochs") or 0) / planned for s in sources}


def epochs_words(run: Run) -> str:
    """How many epochs of each source were trained on so far, by the plan that was in force at each step."""
    per_step = _epochs_per_step(run.plan)
    if not per_step or not run.steps.step:
        return UNKNOWN
    total, end = dict.fromkeys(per_step, 0.0), run.steps.step[-1]
    for start in [*reversed(run.starts), None]:
        per_step = _epochs_per_step(start.derived) or per_step if start else per_step
        done = max(0, end + 1 - start.first_step) if start else end
        for name, epochs in per_step.items():
            total[name] = total.get(name, 0.0) + done * epochs
        end -= done
    words = {name: fixed(n, 2) + (" (many epochs)" if n > _MANY_EPOCHS else "") for name, n in total.items()}
    return "; ".join(f"{name}: {n}" for name, n in words.items()) if len(words) > 1 else "".join(words.values())


def compute_done(run: Run, part: str) -> float | None:
    """FLOPs so far of "forward_backward", "repeated_forward" or "newton_schulz", from the plan's FLOPs per step; None
    where a plan does not record them."""
    key = f"{part}_flops_per_step"
    pieces = segments(run.starts, "plan", key, plan_number(run, key), run.steps.step[-1]) if run.steps.step else []
    parts = [(last + 1 - first) * flops for first, last, flops in pieces if isinstance(flops, int | float)]
    return math.fsum(parts) if pieces and len(parts) == len(pieces) else None


def balance_words(run: Run) -> str:
    """What kept the experts evenly loaded, and their capacity."""
    balance, moe = dig(run.config, "balance"), dig(run.model, "moe")
    if not isinstance(balance, Mapping) or not isinstance(moe, Mapping):
        return UNKNOWN
    if not moe.get("num_experts"):
        return "no experts"
    words = []
    if balance.get("loss") != "none":
        scope = "" if balance.get("scope") == "none" else f" per {str(balance.get('scope')).replace('_', '-')}"
        words.append(f"{balance.get('loss')} loss{scope}, {balance.get('coefficient')}")
    if balance.get("z_coefficient"):
        words.append(f"z-loss, {balance['z_coefficient']}")
    if moe.get("gate") == "sigmoid_bias" and balance.get("bias") != "none":
        frozen_layers = dig(run.plan, "frozen_router_biases") or ()
        if len(frozen_layers) < len(moe.get("layers") or ()):
            words.append(f"bias ({balance.get('bias')}), {balance.get('bias_rate')}")
        if frozen_layers:
            words.append(f"bias frozen in layers {', '.join(map(str, frozen_layers))}")
    factor = dig(run.config, "capacity", "factor")
    if factor:
        capacity = dig(run.config, "capacity")
        relative_to = str(capacity.get("relative_to") or capacity.get("meaning"))  # "meaning" in older runs
        words.append(f"capacity factor {factor} {relative_to.replace('_', ' ')}")
    return "; ".join(words) or "nothing"


def optimizer_words(run: Run) -> str:
    o = dig(run.config, "optimizer")
    if not isinstance(o, Mapping):
        return UNKNOWN
    words = optimizer_name(o)
    if o.get("algorithm") == "muon" and "momentum" in o:
        words += f", momentum {o['momentum']}"
    if "weight_decay" in o:
        words += f", weight decay {o['weight_decay']}"
    if o.get("qk_clip_threshold"):
        words += f", QK-Clip at {short(o['qk_clip_threshold'])}"
    if o.get("freeze"):
        words += f"; frozen: {', '.join(f'`{p}`' for p in o['freeze'])}"
    return words


def schedule_words(run: Run) -> str:
    s = dig(run.config, "schedule")
    if not isinstance(s, Mapping):
        return UNKNOWN
    words = {"wsd": "warm-up, stable, decay"}.get(str(s.get("kind")), str(s.get("kind")))
    if s.get("warmup_steps"):
        words += f", {s['warmup_steps']} warm-up steps" if s["warmup_steps"] > 1 else ", 1 warm-up step"
    if s.get("kind") != "constant" and isinstance(s.get("final_fraction"), int | float):
        words += f", ending at {short(100 * s['final_fraction'])} % of the peak"
    return words


def _median(values: Sequence[float], scale: float = 1.0) -> float | None:
    return statistics.median(values) * scale if values else None


def _show(value: Any, form: Any = whole) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    return str(form(value)) if form is str or isinstance(value, int | float) else str(value)


def _count_or_none(run: Run, key: str) -> str:
    """A number of parameters in the plan."""
    return NONE if plan_number(run, key) == 0 else _show(plan_number(run, key))


def what_was_run(runs: Sequence[Run]) -> Table:
    """One column per run, one row per property; a row without a value in any run is left out."""
    rows: list[tuple[str, list[str]]] = [
        ("Model", [model_words(r) for r in runs]),
        ("Starts from", [start_words(r) for r in runs]),
        ("Parameters", [_show(plan_number(r, "parameters")) for r in runs]),
        ("Active per token", [_show(plan_number(r, "active_parameters")) for r in runs]),
        ("Parameters trained by Muon", [_show(plan_number(r, "muon_parameters")) for r in runs]),
        ("Parameters trained by AdamW", [_show(plan_number(r, "adamw_parameters")) for r in runs]),
        ("Parameters trained by Scion", [_count_or_none(r, "scion_parameters") for r in runs]),
        ("Parameters frozen", [_count_or_none(r, "frozen_parameters") for r in runs]),
        ("Steps", [steps_words(r) for r in runs]),
        ("Batch", [_batch(r) for r in runs]),
        ("Tokens trained on", [_show(tokens_done(r)) for r in runs]),
        ("Epochs", [epochs_words(r) for r in runs]),
        ("Compute, forward and backward", [_show(compute_done(r, "forward_backward"), flops) for r in runs]),
        ("Compute, recomputed forward", [_show(compute_done(r, "repeated_forward"), flops) for r in runs]),
        ("Compute, Newton-Schulz", [_show(compute_done(r, "newton_schulz"), flops) for r in runs]),
        ("Optimizer", [optimizer_words(r) for r in runs]),
        ("Peak learning rate", [_peak_rate(r) for r in runs]),
        ("Schedule", [schedule_words(r) for r in runs]),
        ("Changed mid-run", [mid_run_changes(r.starts) or NOTHING for r in runs]),
        ("Expert balancing", [balance_words(r) for r in runs]),
        ("Seed", [_show(dig(r.config, "seed"), str) for r in runs]),
        ("Compute dtype", [_compute_dtype(r) for r in runs]),
        ("Newton-Schulz dtype", [_show(dig(r.env, "ns_dtype"), str) for r in runs]),
        ("Training time", [_show(sum(r.steps.finite("seconds")) or None, human_seconds) for r in runs]),
        ("Tokens per second (median)", [_show(_median(r.steps.finite("tokens_per_second"))) for r in runs]),
        ("MFU (median)", [_mfu(r) for r in runs]),
        ("Peak memory", [_gib(r) for r in runs]),
    ]
    empty = {UNKNOWN, NOTHING, NONE, "no experts", flops(0)}
    filled = [(name, values) for name, values in rows if not set(values) <= empty]
    return Table(
        caption="How each run was configured and how it went. MFU: FLOPs per second over the measured matmul peak.",
        headers=("", *(r.name for r in runs)),
        rows=tuple(
            (name, *(Cell(v, "quiet" if v in (UNKNOWN, NOTHING, NONE) else "") for v in values))
            for name, values in filled
        ),
    )


def costs(run: Run) -> tuple[tuple[str, str], ...]:
    """What the run cost, as far as it is recorded."""
    parts = [compute_done(run, part) for part in ("forward_backward", "repeated_forward", "newton_schulz")]
    rows = (
        ("Training time", _show(sum(run.steps.finite("seconds")) or None, human_seconds)),
        ("Tokens per second", _show(_median(run.steps.finite("tokens_per_second")))),
        ("Compute", UNKNOWN if parts[0] is None else flops(math.fsum(p for p in parts if p is not None))),
        ("MFU", _mfu(run)),
        ("Peak memory", _gib(run)),
    )
    return tuple((name, value) for name, value in rows if value != UNKNOWN)


def settings(run: Run, *keys: str) -> list[tuple[int, int, Any]]:
    """(first step, last step, value) of a field of the config, in the order of the steps; none without a step."""
    last = run.steps.step[-1] if run.steps.step else 0
    return segments(run.starts, "config", ".".join(keys), dig(run.config, *keys), last)


def _peak_rate(run: Run) -> str:
    """The peak rate of the steps done, or, before the first, of those planned."""
    pieces = settings(run, "optimizer", "lr")
    if len(pieces) > 1:
        return ", ".join(f"{_show(rate, short)} from step {whole(first)}" for first, _, rate in pieces)
    return _show(pieces[0][2] if pieces else dig(run.config, "optimizer", "lr"), short)


def starts(runs: Sequence[Run]) -> list[Table]:
    """The starts of each run that had several."""
    return [table for r in runs if (table := starts_table(r.name, r.starts))]


def unknown_properties(runs: Sequence[Run]) -> list[Text]:
    """A line for what only plan.json records, where it is absent."""
    names = [r.name for r in runs if plan_number(r, "parameters") is None]
    if not names:
        return []
    return [Text(f"Parameters and compute are not recorded for {', '.join(names)} (plan.json).", "absent")]


def _batch(run: Run) -> str:
    sequences, length = dig(run.config, "sequences_per_step"), dig(run.config, "seq_len")
    return UNKNOWN if None in (sequences, length) else f"{sequences} sequences of {whole(length)} tokens"


def _compute_dtype(run: Run) -> str:
    """The dtype of the forward and backward pass; "auto" is resolved at the start and recorded in env.json."""
    chosen = dig(run.env, "compute_dtype") or dig(run.config, "compute_dtype")
    return UNKNOWN if chosen is None else str(chosen)


def _mfu(run: Run) -> str:
    """The median; marked where it exceeds 100 %, so that the measured peak cannot be one."""
    value = _median(run.steps.finite("mfu"), 100)
    if value is None:
        return UNKNOWN
    return f"{short(value)} %" + (" (above the measured peak)" if value > 100 else "")


def _gib(run: Run) -> str:
    memory = run.steps.finite("memory_gib")
    return f"{fixed(max(memory), 2)} GiB" if memory else UNKNOWN


def same_samples(a: Run, b: Run) -> str:
    """Whether two runs saw the same samples in the same order, by the hashes in their step lines; "" if unknown.

    Compares lines that stand for the same steps.
    """
    of_b = dict(zip(zip(b.steps.step, b.steps.stands_for, strict=True), b.steps.samples, strict=True))
    lines = zip(a.steps.step, a.steps.stands_for, a.steps.samples, strict=True)
    common = [(n, x, of_b[step, n]) for step, n, x in lines if x and of_b.get((step, n))]
    steps, differ = sum(n for n, _, _ in common), sum(n for n, x, y in common if x != y)
    if not common:
        return ""
    if differ:
        within = "in" if steps == len(common) else "within"
        return f"{a.name} and {b.name} saw different samples {within} {whole(differ)} of {whole(steps)} steps."
    every = "their one common step" if steps == 1 else f"each of their {whole(steps)} common steps"
    return f"{a.name} and {b.name} saw the same samples in {every} (the hashes of the sample ids agree)."
