"""The report of a comparison of two optimizers: intervals over seeds, the figure and the page.

All intervals are Student's t at 95 % over seeds (Gosset 1908): mean +- t(0.975, n - 1) * s / sqrt(n). A seed determines
initialization and sample order, so runs of one seed are pairs, and the interval of their differences is the one to
judge by: what makes a seed good or bad for both cancels in it.
"""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earthshine.console import human_count
from earthshine.errors import ConfigError

NAMES = {"muon": "Muon", "adamw": "AdamW"}
COLORS = {"muon": "#0b6e99", "adamw": "#c2571a"}
PAGE, FIGURE = "muon-vs-adamw.md", "muon-vs-adamw.svg"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its interval; NaN for a single seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else "")


def interval(values: Sequence[float]) -> Interval:
    """The t-interval of a mean; infinite values (a diverged run) give an infinite mean and no width."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan)
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def first_crossing(curve: Sequence[tuple[float, float]], level: float) -> float:
    """Where a curve of (x, y) first is at `level` or below, linear between its points; NaN when it never is."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= level:
            if before is None or before[1] == y:
                return x
            return before[0] + (x - before[0]) * (before[1] - level) / (before[1] - y)
        before = (x, y)
    return math.nan


class Study:
    """The finished runs of a grid of learning rates and seeds, for two optimizers.

    Raises ConfigError when runs that are compared differ in more than optimizer, learning rate and seed, or when two
    runs of one seed did not see the same samples or did not begin at the same loss.
    """

    def __init__(
        self, results: Sequence[dict[str, Any]], text: dict[str, Any], outside: Sequence[dict[str, Any]] = ()
    ) -> None:
        """outside: finished runs outside the grid, which are only listed."""
        self.text, self.outside = text, outside
        self.runs = {(r["algorithm"], r["lr"], r["seed"]): r for r in results}
        self.algorithms = [a for a in NAMES if any(key[0] == a for key in self.runs)]
        self.seeds = sorted({key[2] for key in self.runs})
        self._check_alike()

    def _check_alike(self) -> None:
        shared = []
        for result in self.runs.values():
            job = {key: value for key, value in result["job"].items() if key not in ("name", "seed", "optimizer")}
            optimizer = {k: v for k, v in result["job"]["optimizer"].items() if k not in ("algorithm", "lr")}
            shared.append((job, optimizer))
        if any(settings != shared[0] for settings in shared):
            raise ConfigError("the runs differ in more than optimizer, learning rate and seed: use one --dir for each.")
        for seed in self.seeds:
            finished = [r for key, r in self.runs.items() if key[2] == seed and not r["diverged"]]
            starts = {(r["samples"], r["heldout"][0][1]) for r in finished}
            if len(starts) > 1:
                raise ConfigError(f"runs of seed {seed} differ in their samples or in their loss before step 1.")

    @property
    def job(self) -> dict[str, Any]:
        return dict(next(iter(self.runs.values()))["job"])

    @property
    def tokens_per_step(self) -> int:
        return int(self.job["seq_len"] * self.job["sequences_per_step"])

    def lrs(self, algorithm: str) -> list[float]:
        return sorted({key[1] for key in self.runs if key[0] == algorithm})

    def finals(self, algorithm: str, lr: float) -> list[float]:
        """The held-out loss after the last step, by seed; infinite for a run that diverged."""
        runs = [self.runs[algorithm, lr, seed] for seed in self.seeds]
        return [math.inf if r["diverged"] else r["heldout"][-1][1] for r in runs]

    def lowest(self, algorithm: str) -> float:
        """The lowest final loss of any run."""
        return min(loss for lr in self.lrs(algorithm) for loss in self.finals(algorithm, lr))

    def best_lr(self, algorithm: str) -> float:
        """The learning rate with the lowest mean final loss."""
        return min(self.lrs(algorithm), key=lambda lr: interval(self.finals(algorithm, lr)).mean)

    def at_edge(self, algorithm: str) -> bool:
        lrs = self.lrs(algorithm)
        return self.best_lr(algorithm) in (lrs[0], lrs[-1])

    def heldout(self, algorithm: str, seed: int) -> list[tuple[float, float]]:
        """(step, held-out loss) of a seed's run at the optimizer's best learning rate."""
        points = self.runs[algorithm, self.best_lr(algorithm), seed]["heldout"]
        return [(step, loss) for step, loss in points]

    def curve(self, algorithm: str) -> list[tuple[float, Interval]]:
        """The mean held-out curve at the best learning rate."""
        by_seed = [self.heldout(algorithm, seed) for seed in self.seeds]
        return [(points[0][0], interval([y for _, y in points])) for points in zip(*by_seed, strict=True)]

    def training(self, algorithm: str) -> list[float]:
        """The mean over seeds of the training loss of each step at the best learning rate."""
        lr = self.best_lr(algorithm)
        rows = [self.runs[algorithm, lr, seed]["train_loss"] for seed in self.seeds]
        return [statistics.fmean(column) for column in zip(*rows, strict=True)]

    def difference(self) -> list[tuple[float, Interval]]:
        """Muon's held-out loss minus AdamW's, each at its best learning rate, paired by seed, at every evaluation."""
        pairs = [
            [(s, m - a) for (s, m), (_, a) in zip(self.heldout("muon", n), self.heldout("adamw", n), strict=True)]
            for n in self.seeds
        ]
        return [(points[0][0], interval([d for _, d in points])) for points in zip(*pairs, strict=True)]

    def leader(self) -> tuple[str, str]:
        """The optimizer with the lower final loss at its best learning rate, and the other."""
        first, second = sorted(NAMES, key=lambda a: interval(self.finals(a, self.best_lr(a))).mean)
        return first, second

    def token_fraction(self) -> list[float]:
        """By seed: the leader's tokens until it has the other's final held-out loss, over the other's tokens."""
        leader, other = self.leader()
        fractions = []
        for seed in self.seeds:
            last_step, level = self.heldout(other, seed)[-1]
            fractions.append(first_crossing(self.heldout(leader, seed), level) / last_step)
        return fractions

    def plan(self, algorithm: str) -> dict[str, Any]:
        """What `train.derive` says of the optimizer's runs."""
        return dict(next(r for key, r in self.runs.items() if key[0] == algorithm)["plan"])

    def newton_schulz_fraction(self) -> float:
        """FLOPs of Newton-Schulz over those of forward and backward, per step."""
        plan = self.plan("muon")
        return float(plan["newton_schulz_flops_per_step"] / plan["forward_backward_flops_per_step"])

    def seconds_per_step(self, algorithm: str) -> float:
        """The fastest step of all runs: other work on the machine only makes steps longer."""
        return min(s for key, r in self.runs.items() if key[0] == algorithm for s in r["seconds"])


def write_report(study: Study, out: Path) -> Path:
    """Write the figure and the page into the folder `out`; returns the page's path."""
    if study.algorithms != list(NAMES):
        raise ConfigError(f"the report compares {' and '.join(NAMES)}; there are runs of {study.algorithms} only.")
    out.mkdir(parents=True, exist_ok=True)
    draw(study, out / FIGURE)
    page = out / PAGE
    page.write_text("\n".join(_page(study)) + "\n", encoding="utf-8")
    return page


def draw(study: Study, path: Path) -> None:
    """Held-out loss by tokens; the paired difference; and the final loss by learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "figure.facecolor": "white",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "svg.fonttype": "none",  # text stays text: it can be selected and searched
        "font.sans-serif": ["DejaVu Sans"],
        "path.simplify_threshold": 0.5,  # pixels
        "svg.hashsalt": "earthshine",  # the same runs give the same bytes
    }
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic(
            [["curves", "curves"], ["difference", "rates"]],
            figsize=(9, 8),
            height_ratios=(1.25, 1),
            layout="constrained",
        )
        figure.suptitle(_finding(study), x=0.012, ha="left", fontsize=13, fontweight="bold")
        _draw_curves(study, axes["curves"])
        _draw_difference(study, axes["difference"])
        _draw_rates(study, axes["rates"])
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)
        plt.close(figure)
    if path.suffix == ".svg":
        path.write_text(_shorter(path.read_text(encoding="utf-8")), encoding="utf-8")


def _shorter(svg: str) -> str:
    """The same drawing with coordinates to a hundredth of a point, and without its indentation."""
    rounded = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg)
    return re.sub(r"\n\s+", "\n", rounded)


def _finding(study: Study) -> str:
    leader, other = study.leader()
    fraction = interval(study.token_fraction()).mean
    if math.isfinite(fraction):
        return f"{NAMES[leader]} reaches {NAMES[other]}'s loss with {100 * fraction:.0f} % of the tokens"
    return f"{NAMES[leader]} and {NAMES[other]} on a small MoE"


def _thousands(study: Study, steps: Sequence[float]) -> list[float]:
    return [step * study.tokens_per_step / 1000 for step in steps]


def _label(axes: Any, text: str, x: float, y: float, color: str) -> None:
    """The name of a line, right of its last point."""
    axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", color=color, fontweight="bold")


def _draw_curves(study: Study, axes: Any) -> None:
    last = 0.0
    for algorithm in NAMES:
        color, name = COLORS[algorithm], NAMES[algorithm]
        training = study.training(algorithm)
        x = _thousands(study, range(1, len(training) + 1))
        axes.plot(x, training, color=color, alpha=0.3, linewidth=0.8, zorder=1.5)  # below the held-out curves
        points = study.curve(algorithm)
        x, mean = _thousands(study, [s for s, _ in points]), [i.mean for _, i in points]
        axes.plot(x, mean, color=color, linewidth=1.8, marker="o", markersize=3.5)
        low, high = [i.mean - i.half for _, i in points], [i.mean + i.half for _, i in points]
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        _label(axes, f"{name}\n{_rate(study.best_lr(algorithm))}", x[-1], mean[-1], color)
        last = max(last, x[-1])
    leader, other = study.leader()
    level, fraction = study.curve(other)[-1][1].mean, interval(study.token_fraction()).mean
    if math.isfinite(fraction):
        axes.plot([fraction * last, last], [level, level], color="#444444", linewidth=1, linestyle="--")
        axes.plot([fraction * last], [level], marker="v", color="#444444", markersize=6)
        axes.annotate(
            f"{NAMES[other]}'s final loss, after\n{100 * fraction:.0f} % of the tokens",
            (fraction * last, level),
            xytext=(-14, -12),  # below and left of both curves, which fall
            textcoords="offset points",
            ha="right",
            va="top",
            color="#333333",
        )
    lowest = study.curve(leader)[-1][1].mean
    axes.set_ylim(lowest - 0.15, study.curve(leader)[0][1].mean + 0.1)
    axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= last])
    axes.set_xlim(0, last * 1.14)  # room for the lines' names
    axes.set_xlabel("tokens (thousands)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        f"Held-out loss at the best learning rate: mean and 95 % interval of {len(study.seeds)} seeds (thin: training)"
    )


def _rate(lr: float) -> str:
    return f"lr {1000 * lr:g} \u00d7 10\u207b\u00b3"


def _draw_difference(study: Study, axes: Any) -> None:
    points = study.difference()[1:]  # before the first step both are the same model
    x, mean = _thousands(study, [s for s, _ in points]), [i.mean for _, i in points]
    axes.axhline(0, color="#444444", linewidth=1)
    axes.errorbar(x, mean, yerr=[i.half for _, i in points], color="#333333", marker="o", markersize=3.5, capsize=2.5)
    axes.set_xlim(0, x[-1] * 1.03)
    axes.set_xlabel("tokens (thousands)")
    axes.set_ylabel("Muon \u2212 AdamW (nats per token)")
    axes.set_title("Held-out difference, paired by seed")


def _draw_rates(study: Study, axes: Any) -> None:
    """The mean of the seeds as a line, each seed as a circle: few, and not normal where a seed fails."""
    ticks = sorted({lr for algorithm in NAMES for lr in study.lrs(algorithm)})
    for algorithm in NAMES:
        color = COLORS[algorithm]
        lrs = [lr for lr in study.lrs(algorithm) if math.isfinite(sum(study.finals(algorithm, lr)))]
        mean = [interval(study.finals(algorithm, lr)).mean for lr in lrs]
        axes.plot(lrs, mean, color=color, linewidth=1.6)
        for lr in lrs:
            finals = study.finals(algorithm, lr)
            axes.plot([lr] * len(finals), finals, "o", color=color, alpha=0.8, markersize=4.5, markerfacecolor="white")
        _label(axes, NAMES[algorithm], lrs[-1], mean[-1], color)
        best = study.best_lr(algorithm)
        lowest = interval(study.finals(algorithm, best)).mean
        axes.plot(
            [best], [lowest], "o", markersize=13, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.4
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{1000 * lr:g}" for lr in ticks])
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 2.4)
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate \u00d7 10\u207b\u00b3")
    axes.set_ylabel("final held-out loss (nats per token)")
    axes.set_title("Final loss by learning rate: every seed (ring: best)")


def _page(study: Study) -> list[str]:
    steps = round(study.heldout("muon", study.seeds[0])[-1][0])
    seeds, per_step = len(study.seeds), study.tokens_per_step
    lines = [
        "# Muon and AdamW on a small MoE",
        "",
        f"{steps} steps of {per_step:,} tokens from scratch, each optimizer at its best of "
        f"{len(study.lrs('muon'))} (Muon) and {len(study.lrs('adamw'))} (AdamW) learning rates, {seeds} seeds. "
        f"± is Student's t-interval at 95 % over seeds.",
        "",
        f"![{_finding(study)}: loss curves, their difference, and the final loss by learning rate]({FIGURE})",
        "",
        *_findings(study),
        "",
        "## All runs",
        "",
        f"Held-out loss after step {steps}, nats per token; the best mean of each optimizer in bold.",
        "",
        f"| optimizer | peak learning rate | {' | '.join(f'seed {s}' for s in study.seeds)} | mean |",
        "|---|---|" + "---|" * (seeds + 1),
    ]
    for algorithm in NAMES:
        for lr in study.lrs(algorithm):
            finals = study.finals(algorithm, lr)
            mean = str(interval(finals)) if math.isfinite(sum(finals)) else "-"
            mean = f"**{mean}**" if lr == study.best_lr(algorithm) else mean
            shown = " | ".join(f"{f:.4f}" if math.isfinite(f) else "diverged" for f in finals)
            lines.append(f"| {NAMES[algorithm]} | {lr:g} | {shown} | {mean} |")
    return [*lines, *_outside(study), "", *_setting(study), "", *_limits(study)]


def _outside(study: Study) -> list[str]:
    """Every finished run that is not in the grid."""
    if not study.outside:
        return []
    listed = ", ".join(
        f"{NAMES[r['algorithm']]} {r['lr']:g}, seed {r['seed']}: "
        + ("diverged" if r["diverged"] else f"{r['heldout'][-1][1]:.4f}")
        for r in study.outside
    )
    return ["", f"Also run while choosing the grid: {listed}."]


def _findings(study: Study) -> list[str]:
    leader, other = study.leader()
    best = {a: study.best_lr(a) for a in NAMES}
    final = {a: interval(study.finals(a, best[a])) for a in NAMES}
    _, gap = study.difference()[-1]
    fractions = study.token_fraction()
    where = {a: "at the edge of its grid" if study.at_edge(a) else "inside its grid" for a in NAMES}
    seconds = {a: study.seconds_per_step(a) for a in NAMES}
    rows = [
        "| | Muon | AdamW |",
        "|---|---|---|",
        f"| best peak learning rate | {best['muon']:g}, {where['muon']} | {best['adamw']:g}, {where['adamw']} |",
        f"| final held-out loss, nats per token | {final['muon']} | {final['adamw']} |",
        f"| difference paired by seed, Muon - AdamW | {gap} | |",
        f"| lowest final loss of any single run | {study.lowest('muon'):.3f} | {study.lowest('adamw'):.3f} |",
        f"| FLOPs per step, relative to forward and backward | {1 + study.newton_schulz_fraction():.2f} | 1.00 |",
        f"| fastest step, seconds | {seconds['muon']:.2f} | {seconds['adamw']:.2f} |",
    ]
    if all(math.isfinite(s) for s in fractions):
        listed = ", ".join(f"{s:.3f}" for s in fractions)
        rows += [
            "",
            f"Tokens to equal loss: {NAMES[leader]} reaches {NAMES[other]}'s final held-out loss with "
            f"**{interval(fractions)}** of {NAMES[other]}'s tokens (by seed: {listed}; linear between evaluations). "
            f"{_in_flops(study, interval(fractions).mean)}"
            f"At that point {NAMES[leader]}'s learning rate has not decayed yet, as {NAMES[other]}'s has at its end: a "
            f"{NAMES[leader]} run planned to end there was not measured.",
        ]
    return rows


def _in_flops(study: Study, fraction: float) -> str:
    """The sentence that turns a fraction of the tokens into one of FLOPs."""
    cost = 1 + study.newton_schulz_fraction()
    times = cost if study.leader()[0] == "muon" else 1 / cost
    return f"With Newton-Schulz counted that is {fraction * times:.2f} of the FLOPs. "


def _setting(study: Study) -> list[str]:
    job, text = study.job, study.text
    model, schedule, optimizer = job["init"]["model"], job["schedule"], job["optimizer"]
    moe, environment = model["moe"], next(iter(study.runs.values()))["environment"]
    train, plan = text["train"], study.plan("muon")
    lrs = {a: " ".join(f"{lr:g}" for lr in study.lrs(a)) for a in NAMES}
    seeds = " ".join(map(str, study.seeds))
    steps = job["num_steps"]
    seen = steps * study.tokens_per_step / train["tokens"]
    return [
        "## Setting",
        "",
        f"- **Text**: {text['name'] or 'the files given'}; {text['files']} documents, {text['bytes']:,} bytes, sha256 "
        f"of all in the order of their names `{text['sha256'][:16]}...`. Every tenth document is held out; of each of "
        f"these {text['heldout']['documents']} an excerpt from its middle is evaluated, "
        f"{text['heldout']['tokens']:,} tokens total, the same in every run. The other {train['documents']} give "
        f"{human_count(train['tokens'])} tokens of a byte-level BPE of {model['vocab_size']:,} entries trained on "
        f"them; a run sees {seen:.0%} of these{', none twice' if seen <= 1 else ''}.",
        f"- **Model**: the recipe `tiny_moe`'s with a fourth layer: hidden size {model['hidden_size']}, "
        f"{model['num_hidden_layers']} layers, {moe['num_experts']} experts of {moe['intermediate_size']} with top-"
        f"{moe['top_k']} in each; {plan['parameters']:,} parameters, {plan['active_parameters']:,} of them active per "
        f"token; float32.",
        f"- **Both**: {job['sequences_per_step']} sequences of {job['seq_len']} tokens per step; {schedule['kind']} "
        f"schedule to {schedule['final_fraction']:g} of the peak after {schedule['warmup_steps']} warm-up steps; "
        f"weight decay {optimizer['weight_decay']:g}; gradient norm clipped at {job['clip_grad_norm']:g}; "
        f"sequence-wise balance loss {job['balance']['coefficient']:g}. A seed determines initialization and sample "
        f"order; the report checks that both optimizers started at the same loss and saw the same samples.",
        f"- **AdamW**: betas {optimizer['beta1']:g} and {optimizer['beta2']:g}, epsilon {optimizer['eps']:g}, for all "
        f"parameters. **Muon**: momentum {optimizer['momentum']:g} (Nesterov), update RMS {optimizer['update_rms']:g}, "
        f"{optimizer['ns_steps']} Newton-Schulz steps, for the matrices of the layers; the same AdamW, with the same "
        f"learning rate, for embeddings and norms.",
        f"- **Machine**: {environment['cpu']}, one thread per run, two runs at a time on a machine with other "
        f"work, so its seconds are rough; torch {environment['versions']['torch']}, Python "
        f"{environment['versions']['python']}, earthshine {environment['versions']['earthshine']}.",
        "",
        "```",
        f"python benchmarks/loss_muon_adamw.py --text DOCUMENTS/*.txt --steps {steps} --seeds {seeds} --jobs 2 \\",
        f"    --lrs-muon {lrs['muon']} --lrs-adamw {lrs['adamw']}",
        "```",
    ]


def _limits(study: Study) -> list[str]:
    return [
        "## Limits",
        "",
        f"- {study.job['num_steps']} steps, a tiny model, one text: this says nothing about longer runs or larger "
        "models, where Moonlight (arXiv:2502.16982) measured about half of AdamW's compute for equal loss.",
        f"- {len(study.seeds)} seeds: the intervals are about other seeds of this setting, on this held-out text, not "
        "about other texts.",
        "- The learning rate is chosen, in factors of two, on the held-out text that is reported, for both alike. "
        "Weight decay, betas, momentum, schedule and warm-up are tuned for neither.",
        f"- Tokens are compared, not time. With so few tokens per step, Newton-Schulz adds "
        f"{study.newton_schulz_fraction():.0%} to the FLOPs per step; it costs the same for any number of tokens, "
        f"so that fraction falls as steps grow ([performance.md](performance.md)).",
    ]
