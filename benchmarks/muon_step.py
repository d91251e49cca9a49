"""Median time of one Muon step over a set of matrices, against torch.optim.Muon, interleaved in one run.

    python benchmarks/muon_step.py [--shapes 576x1536*4,...] [--threads 1] [--samples 9] [--json FILE]

Each sample times one whole step (momentum, Newton-Schulz, decay, update) of every contender in turn, so that what
else the machine does hits all of them. torch.optim.Muon forces bf16, which a CPU without bf16 instructions runs many
times slower than fp32; the same loop in fp32 is then the fair peer, so it has a row of its own. Every contender's
update is compared with fp64 on the first matrix of each shape. The rate is operations of the standard form per
second, whatever a form really computes, against a large product timed in the same rounds. CPU time is shown beside
the clock's: on a machine that others use too it is the steadier of the two.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from earthshine.console import table
from earthshine.device import environment, gemm_peak
from earthshine.ops.orthogonalize import newton_schulz, newton_schulz_flops
from earthshine.optim.muon import Muon

# One layer of SmolLM2-135M: q and o, k and v, gate and up, down.
DEFAULT_SHAPES = "576x576*2,192x576*2,1536x576*2,576x1536"
LR = 1e-3

Contender = tuple[Callable[[], None], list[nn.Parameter]]


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


def contenders(shapes: list[tuple[int, int]], bf16: bool) -> dict[str, Contender]:
    """Name -> (one step, its parameters), all from the same gradients."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    def make(
        build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> Contender:
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer = build(params)
        return lambda: optimizer.step(), params

    def ours(dtype: str, form: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: Muon(params, lr=LR, ns_dtype=dtype, ns_form=form)  # type: ignore[arg-type]

    found = {
        "torch's loop, in fp32": make(lambda params: TorchLoop(params, lr=LR)),
        "Muon float32 standard": make(ours("float32", "standard")),
        "Muon float32 gram": make(ours("float32", "gram")),
        "Muon float32 auto": make(ours("float32", "auto")),
    }
    if bf16:
        peer = make(lambda params: torch.optim.Muon(params, lr=LR, adjust_lr_fn="match_rms_adamw"))
        found = {"torch.optim.Muon (bf16)": peer} | found | {"Muon bfloat16": make(ours("bfloat16", "auto"))}
    return found


def worst_error(params: list[nn.Parameter], shapes: list[tuple[int, int]]) -> float:
    """Largest relative Frobenius error of the first update to Newton-Schulz in fp64, over the shapes."""
    worst = 0.0
    for shape in set(shapes):
        p = params[shapes.index(shape)]
        assert p.grad is not None
        exact: Tensor = newton_schulz(p.grad.double(), dtype=torch.float64) * (0.2 * math.sqrt(max(shape)))
        worst = max(worst, float(((p.detach().double() / -LR) - exact).norm() / exact.norm()))
    return worst


def measure(runs: dict[str, Contender], shapes: list[tuple[int, int]], samples: int) -> tuple[list[dict], float]:
    """A row per contender, and the fp32 rate in FLOP/s of a product of 1024 in the same rounds."""
    errors = {}
    for name, (step, params) in runs.items():
        step()  # warm-up, and the first update is what is compared with fp64
        errors[name] = worst_error(params, shapes)
    square = torch.randn(1024, 1024)
    steps = {name: step for name, (step, _) in runs.items()} | {"product": lambda: square @ square}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(samples):
        for name, step in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    median = {name: [statistics.median(t[i] for t in pairs) for i in (0, 1)] for name, pairs in times.items()}
    peak = 2 * 1024**3 / median.pop("product")[0]
    flops, first = sum(newton_schulz_flops(*shape) for shape in shapes), median[next(iter(runs))]
    rows = [
        {
            "name": name,
            "median_seconds": seconds,
            "min_seconds": min(t for t, _ in times[name]),
            "max_seconds": max(t for t, _ in times[name]),
            "median_cpu_seconds": cpu,
            "speedup": first[0] / seconds,
            "cpu_speedup": first[1] / cpu,
            "fraction_of_fp32_peak": flops / seconds / peak,
            "error": errors[name],
        }
        for name, (seconds, cpu) in median.items()
    ]
    return rows, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help="rows x cols * count, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--bf16", choices=("auto", "always", "never"), default="auto", help="auto: when it takes < 2 s")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of to standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = parse_shapes(options.shapes)
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    bf16_rate = 0.0 if options.bf16 == "never" else gemm_peak(torch.device("cpu"), torch.bfloat16, size=256)
    bf16 = options.bf16 == "always" or (bf16_rate > 0 and flops / bf16_rate < 2)
    rows, peak = measure(contenders(shapes, bf16), shapes, options.samples)
    result = {"shapes": options.shapes, "threads": options.threads, "samples": options.samples, "flops": flops}
    result |= {"fp32_peak_flops": peak, "rows": rows, "environment": environment()}
    print(f"{len(shapes)} matrices ({options.shapes}), {flops / 1e9:.1f} GFLOP in standard form, ", end="")
    print(f"{options.threads} thread(s), medians of {options.samples} interleaved samples")
    print(f"fp32 GEMM of 1024 in the same rounds: {peak / 1e9:.0f} GFLOP/s")
    if not bf16:
        print("torch.optim.Muon itself left out: bf16 is too slow here (--bf16 always runs it)")
    headers = ["contender", "median ms", "min", "max", "CPU ms", "speed-up", "in CPU time", "of GEMM", "error to fp64"]
    keys = ("median_seconds", "min_seconds", "max_seconds", "median_cpu_seconds")
    print(
        table(
            headers,
            [
                [r["name"], *(f"{1e3 * r[k]:.1f}" for k in keys), f"{r['speedup']:.2f}", f"{r['cpu_speedup']:.2f}"]
                + [f"{r['fraction_of_fp32_peak']:.0%}", f"{r['error']:.1e}"]
                for r in rows
            ],
        )
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
