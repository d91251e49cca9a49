"""Median time of one Muon step over sets of matrices, against torch.optim.Muon and packages of PyPI, interleaved.

    python benchmarks/muon_step.py [--set a|b|c|d|e|each | --shapes 576x1536*4,...] [--threads 1] [--samples 9]

Each sample times one whole step (momentum, Newton-Schulz, decay, update) of every contender in turn, so that what else
the machine does hits all of them. All have the same matrices, gradients, coefficients (keller5) and five steps.

torch.optim.Muon, muonium and heavyball force bf16, which a CPU without bf16 instructions runs many times slower than
fp32: the fair peer there is torch's own loop without that cast ("torch's loop, in fp32"). A contender whose
step would take longer than --cap seconds, by its type's measured rate of products, is left out and named.
    pip install --no-deps muonium heavyball pytorch_optimizer; pip install opt-einsum        the packages it looks for

The rate is operations of the standard form per second, whatever a form really computes, over that of a large product
timed in the same rounds. Quality is of the update, on a matrix of each shape that fp64 can do quickly: the
relative Frobenius error to Newton-Schulz in fp64, and the largest singular value over fp64's.
Sets: (a) Moonlight's shapes, (b) a small Mixtral's 112 matrices, (c) a small fine-grained model's 796, (d) 126 small
matrices, (e) wide ones; "each" is many shapes, one at a time.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from earthshine.console import table
from earthshine.device import environment, gemm_peak
from earthshine.ops.orthogonalize import newton_schulz, newton_schulz_flops
from earthshine.optim.muon import Muon

LR = 1e-3
SETS = {
    "a": "2048x2048,11264x2048,1408x2048*2",
    "b": "256x256*16,704x256*64,256x704*32",
    "c": "384x256*4,144x256*4,512x128*4,256x256*4,352x256*8,256x352*4,176x256*512,256x176*256",
    "d": "64x64*42,64x128*42,128x128*42",
    "e": "256x704*16,352x1408*8,384x1536*4,512x2048*4",
}
EACH = "8x256 16x16 64x64 64x128 128x128 96x256 176x256 256x256 352x512 512x512 256x704 384x384 704x1024 1024x1024"
# Matrices beyond this many operations are not compared with fp64: it takes ten times as long as the step.
QUALITY_FLOPS = 120e9

Contender = tuple[Callable[[], None], list[nn.Parameter], list[Tensor]]
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class TorchLoop(torch.optim.Muon):
    """torch.optim.Muon's step on the matrices one by one, with Newton-Schulz in fp32: its own lines but the cast."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(buf, group["momentum"])
                tall = X.size(0) > X.size(1)
                X = X.T if tall else X
                X.div_(X.norm().clamp(min=group["eps"]))
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    A = X @ X.T
                    X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(X.T if tall else X, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "2x3*2,4x5" -> [(2, 3), (2, 3), (4, 5)]"""
    shapes = []
    for item in text.split(","):
        size, _, count = item.partition("*")
        rows, _, cols = size.partition("x")
        shapes += [(int(rows), int(cols))] * int(count or 1)
    return shapes


def peers() -> tuple[dict[str, tuple[Build, torch.dtype]], list[str]]:
    """Other people's optimizers: name -> (how it is made, the type it computes in); and those that are not there."""
    found: dict[str, tuple[Build, torch.dtype]] = {
        "torch's loop, in fp32": (lambda p: TorchLoop(p, lr=LR), torch.float32),
        "torch.optim.Muon (bf16)": (
            lambda p: torch.optim.Muon(p, lr=LR, adjust_lr_fn="match_rms_adamw"),
            torch.bfloat16,
        ),
    }
    missing = []
    try:
        from pytorch_optimizer import Muon as Other

        # Its own scale rule; the rest is the same.
        adjusted = {"lr": LR, "weight_decay": 0.1, "use_adjusted_lr": True}
        found["pytorch_optimizer"] = (lambda p: Other([{"params": p, "use_muon": True}], **adjusted), torch.float32)
    except ImportError:
        missing.append("pytorch_optimizer")
    try:
        import muonium

        # Its own scale rule, and weight decay that is not cautious, as everybody's here.
        found["muonium (bf16)"] = (
            lambda p: muonium.Muon(p, lr=LR, use_cautious_wd=False, orthogonalization_strategy="newton_schulz"),
            torch.bfloat16,
        )
    except ImportError:
        missing.append("muonium")
    try:
        import heavyball

        heavyball.utils.zeroth_power_mode = "legacy_newtonschulz"  # keller5; its default is another table
        found["heavyball (bf16)"] = (lambda p: heavyball.Muon(p, lr=LR, weight_decay=0.1), torch.bfloat16)
    except ImportError:
        missing.append("heavyball")
    return found, missing


def make(build: Build, shapes: list[tuple[int, int]], grads: list[Tensor]) -> Contender:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    give_gradients(params, grads)
    optimizer = build(params)
    return lambda: optimizer.step(), params, grads


def give_gradients(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Where they are not there: some optimizers take them away."""
    for p, g in zip(params, grads, strict=True):
        if p.grad is None:
            p.grad = g.clone()


def contenders(shapes: list[tuple[int, int]], options: argparse.Namespace) -> tuple[dict[str, Contender], list[str]]:
    """Name -> (one step, its parameters), all from the same gradients; and who is left out, with the reason."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    others, missing = peers()
    left_out = [f"{name} (not installed)" for name in missing]
    found = {}
    for name, (build, dtype) in others.items():
        seconds = flops / gemm_peak(torch.device("cpu"), dtype, size=256)
        if seconds > options.cap:
            left_out.append(f"{name} (about {seconds:.0f} s a step by its rate of products)")
            continue
        found[name] = make(build, shapes, grads)

    def ours(dtype: str, form: str) -> Build:
        return lambda params: Muon(params, lr=LR, ns_dtype=dtype, ns_form=form)  # type: ignore[arg-type]

    for form in options.forms.split(","):
        found[f"Muon float32 {form}"] = make(ours("float32", form), shapes, grads)
    if flops / gemm_peak(torch.device("cpu"), torch.bfloat16, size=256) < options.cap / 4:
        found["Muon bfloat16 auto"] = make(ours("bfloat16", "auto"), shapes, grads)
    return found, left_out


def quality(params: list[nn.Parameter], grads: list[Tensor], shapes: list[tuple[int, int]]) -> tuple[float, float]:
    """Worst over the shapes, of the first update without its scale: error to fp64, largest singular value over fp64's.

    The scale that fits best is taken out, because packages differ in it.
    """
    small = [s for s in set(shapes) if newton_schulz_flops(*s) <= QUALITY_FLOPS] or [min(set(shapes))]
    errors, ratios = [], []
    for shape in small:
        exact = newton_schulz(grads[shapes.index(shape)].double(), dtype=torch.float64)
        update = -params[shapes.index(shape)].detach().double()
        update *= float((update * exact).sum() / (update * update).sum())
        errors.append(float((update - exact).norm() / exact.norm()))
        ratios.append(float(torch.linalg.matrix_norm(update, 2) / torch.linalg.matrix_norm(exact, 2)))
    return max(errors), max(ratios)


def measure(runs: dict[str, Contender], shapes: list[tuple[int, int]], samples: int) -> tuple[list[dict], float]:
    """A row per contender, and the fp32 rate in FLOP/s of a product of 1024 in the same rounds."""
    qualities = {}
    for name, (step, params, grads) in runs.items():
        give_gradients(params, grads)
        with torch.no_grad():
            torch._foreach_zero_(params)
        step()  # with one gradient over and over, every update has its direction: that is compared with fp64
        qualities[name] = quality(params, grads, shapes)
    square = torch.randn(1024, 1024)
    runs = runs | {"product": (lambda: square @ square, [], [])}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, (step, params, grads) in runs.items():
            give_gradients(params, grads)
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    peak = 2 * 1024**3 / median.pop("product")
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    fastest = min(seconds for name, seconds in median.items() if not name.startswith("Muon "))
    rows = [
        {
            "name": name,
            "median_seconds": seconds,
            "min_seconds": min(times[name]),
            "max_seconds": max(times[name]),
            "ratio_to_fastest_peer": fastest / seconds,
            "fraction_of_fp32_peak": flops / seconds / peak,
            "error": qualities[name][0],
            "sigma_max_ratio": qualities[name][1],
        }
        for name, seconds in median.items()
    ]
    return rows, peak


def run_set(name: str, text: str, options: argparse.Namespace) -> dict:
    """Measure and print one set."""
    shapes = parse_shapes(text)
    runs, left_out = contenders(shapes, options)
    for other, (step, _, _) in list(runs.items()):
        if not other.startswith("Muon "):
            try:
                step()
            except Exception as e:  # other people's, on a machine that they may not be made for
                left_out.append(f"{other} (does not run here: {type(e).__name__}: {str(e).splitlines()[0][:80]})")
                del runs[other]
    rows, peak = measure(runs, shapes, options.samples)
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    print(f"({name}) {len(shapes)} matrices ({text}), {flops / 1e9:.1f} GFLOP in standard form, ", end="")
    print(f"{options.threads} thread(s), medians of {options.samples} interleaved samples; ", end="")
    print(f"fp32 GEMM of 1024 in the same rounds: {peak / 1e9:.0f} GFLOP/s")
    for other in left_out:
        print(f"left out: {other}")
    headers = ["contender", "median ms", "min", "max", "to fastest peer", "of GEMM", "error to fp64", "sigma max"]
    body = [
        [r["name"], *(f"{1e3 * r[k]:.2f}" for k in ("median_seconds", "min_seconds", "max_seconds"))]
        + [f"{r['ratio_to_fastest_peer']:.2f}", f"{r['fraction_of_fp32_peak']:.0%}"]
        + [f"{r['error']:.1e}", f"{r['sigma_max_ratio']:.4f}"]
        for r in rows
    ]
    print(table(headers, body), flush=True)
    return {"set": name, "shapes": text, "flops": flops, "fp32_peak_flops": peak, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="d", help=f"comma-separated: {', '.join(SETS)}, each, all")
    parser.add_argument("--shapes", default="", help="instead of a set: rows x cols * count, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--forms", default="standard,auto", help="ns_form of our own contenders in fp32")
    parser.add_argument("--cap", type=float, default=30.0, help="seconds: contenders with longer steps are left out")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of to standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the packages
    chosen = "a,b,c,d,e,each" if options.set == "all" else options.set
    sets: list[tuple[str, str]] = [("shapes", options.shapes)] if options.shapes else []
    for name in () if options.shapes else chosen.split(","):
        sets += [(f"each {s}", s) for s in EACH.split()] if name == "each" else [(name, SETS[name])]
    results = [run_set(name, text, options) for name, text in sets]
    result = {"threads": options.threads, "samples": options.samples, "sets": results, "environment": environment()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
