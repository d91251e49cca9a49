"""Median time of one Muon step over a set of matrices, beside every other Muon that runs here, interleaved in one run.

    python benchmarks/muon_step.py [--set a|b|c|d|e|layer|ROWSxCOLS*COUNT,...] [--threads 1|2] [--samples 9] [--each]
                                   [--gradients gaussian|tokens] [--cap SECONDS] [--only NAME ...] [--json FILE]

Each round times one whole step (momentum, Newton-Schulz, decay, update) of every side in turn, so that other work on
the machine hits all of them alike. Peers: torch.optim.Muon on the matrices one by one; muonium, heavyball and
pytorch_optimizer as they come from PyPI. All take five steps of K. Jordan's coefficients, except heavyball, whose table
is fixed. All of them force bf16, which a CPU without bf16 instructions runs many times slower than fp32: there the fair
peers are torch's loop without the cast, and pytorch_optimizer patched to fp32, which are therefore timed as well. A
side whose step would take longer than --cap, by the measured rate of its dtype, is left out, with that estimate; one
whose samples together would is sampled once, and marked *.

"x installed" and "x any" are the time of the fastest peer, as installed or patched ones included, over this side's. "of
GEMM" is the rate of the standard form's FLOPs, whatever is really computed, over that of a 1024 matmul in the side's
dtype in the same rounds, so it may exceed 100 %. Error and largest singular value are of the first update, against the
same polynomial in fp64, the worst over the shapes. CPU time is shown beside wall time: on a busy machine it is the
steadier of the two, on one thread. --each measures every shape by itself.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.muon_sides import SETS, Quality, Shape, Side, gradients, own_sides, parse_shapes, peer_sides
from torch import nn

from earthshine.console import log, table
from earthshine.device import choose_compute_dtype, environment, gemm_peak
from earthshine.ops.orthogonalize import newton_schulz_flops

CPU = torch.device("cpu")


class Runner:
    """One side with its own parameters and gradients, and its times."""

    def __init__(self, side: Side, shapes: list[Shape], grads: list[torch.Tensor]) -> None:
        self.side = side
        self.params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.given, self.grads = grads, [torch.empty_like(g) for g in grads]
        self.optimizer = side.build(self.params)
        self.samples: list[tuple[float, float]] = []
        self.once = False  # its first step is its only sample

    def sample(self) -> float:
        """Seconds of one step on the same gradients: some peers write into them, or drop them."""
        for p, buffer, g in zip(self.params, self.grads, self.given, strict=True):
            p.grad = buffer.copy_(g)
        seconds = timed(self.optimizer.step)
        self.samples.append(seconds)
        return seconds[0]


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time over all threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - start_cpu


def prepare(
    sides: list[Side], shapes: list[Shape], options: argparse.Namespace
) -> tuple[list[Runner], list[dict[str, Any]], list[str]]:
    """Sides that have taken their first step, a row of quality for each, and why others are left out."""
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    grads = gradients(shapes, options.gradients)
    quality = Quality(shapes, grads)
    runners, rows, left_out = [], [], []
    for side in sides:
        estimate = flops / gemm_peak(CPU, side.dtype, size=256)
        if estimate > options.cap:
            left_out.append(f"{side.name}: a step would take about {estimate:.0f} s here, in {side.dtype}")
            continue
        log(f"{side.name}: first step")
        try:
            runner = Runner(side, shapes, grads)
            first = runner.sample()
        except Exception as e:  # a peer that does not run here must not end the others' run
            left_out.append(f"{side.name}: does not run here ({type(e).__name__}: {str(e).strip().splitlines()[0]})")
            continue
        error, largest = quality.of(side, runner.params)
        runner.once = side.dtype != torch.float32 and estimate * options.samples > options.cap
        if not runner.once:
            runner.samples.clear()  # the first step also allocates, and may compile
        rows.append({"name": side.name, "first_seconds": first, "error": error, "largest_singular_value": largest})
        runners.append(runner)
    return runners, rows, left_out


def measure(sides: list[Side], shapes: list[Shape], options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turns; a JSON-ready result."""
    runners, rows, left_out = prepare(sides, shapes, options)
    dtypes = sorted({r.side.dtype for r in runners}, key=str)
    squares = {dtype: torch.randn(1024, 1024).to(dtype) for dtype in dtypes if gemm_peak(CPU, dtype, 256) > 2e10}
    matmuls: dict[torch.dtype, list[float]] = {dtype: [] for dtype in squares}
    for n in range(options.samples):
        log(f"round {n + 1} of {options.samples}")
        for dtype, square in squares.items():
            matmuls[dtype].append(timed(lambda square=square: square @ square)[0])
        for runner in runners:
            if not runner.once:
                runner.sample()
    peaks = {d: 2 * 1024**3 / statistics.median(seconds) for d, seconds in matmuls.items()}
    flops = sum(newton_schulz_flops(*shape) for shape in shapes)
    for row, runner in zip(rows, runners, strict=True):
        clock, cpu = ([pair[i] for pair in runner.samples] for i in (0, 1))
        peak = peaks.get(runner.side.dtype) or gemm_peak(CPU, runner.side.dtype, 256)
        row |= {
            "dtype": str(runner.side.dtype).removeprefix("torch."),
            "samples": len(clock),
            "median_seconds": statistics.median(clock),
            "min_seconds": min(clock),
            "max_seconds": max(clock),
            "median_cpu_seconds": statistics.median(cpu),
            "fraction_of_gemm_peak": flops / statistics.median(clock) / peak,
            "installed": runner.side.installed,
            "ours": runner.side.ours,
        }
    for row in rows:
        for key, peers in (
            ("x_installed", [r for r in rows if r["installed"]]),
            ("x_any", [r for r in rows if not r["ours"]]),
        ):
            for clock in ("median_seconds", "median_cpu_seconds"):
                fastest = min((r[clock] for r in peers), default=None)
                row[key + ("_cpu" if "cpu" in clock else "")] = fastest and fastest / row[clock]
    return {
        "matrices": len(shapes),
        "flops": flops,
        "threads": options.threads,
        "gradients": options.gradients,
        "gemm_peak_flops": {str(d).removeprefix("torch."): rate for d, rate in peaks.items()},
        "rows": rows,
        "left_out": left_out,
    }


def show(what: str, result: dict[str, Any]) -> None:
    print(f"\n{what}: {result['matrices']} matrices, {result['flops'] / 1e9:.1f} GFLOP in standard form, ", end="")
    print(f"{result['threads']} thread(s), {result['gradients']} gradients; GEMM of 1024 in the same rounds: ", end="")
    print(", ".join(f"{d} {rate / 1e9:.0f} GFLOP/s" for d, rate in result["gemm_peak_flops"].items()))
    headers = [
        "side",
        "median ms",
        "min",
        "max",
        "CPU ms",
        "x installed",
        "x any",
        "(CPU)",
        "of GEMM",
        "error",
        "s max",
    ]
    lines = []
    for r in result["rows"]:
        times = [f"{1e3 * r[k]:.1f}" for k in ("median_seconds", "min_seconds", "max_seconds", "median_cpu_seconds")]
        ratios = ["-" if r[k] is None else f"{r[k]:.2f}" for k in ("x_installed", "x_any", "x_any_cpu")]
        quality = [f"{r['fraction_of_gemm_peak']:.0%}", f"{r['error']:.1e}", f"{r['largest_singular_value']:.3f}"]
        lines.append([r["name"] + ("*" if r["samples"] == 1 else ""), *times, *ratios, *quality])
    print(table(headers, lines))
    for line in result["left_out"]:
        print(f"left out: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="layer", help=f"one of {', '.join(SETS)}, or rows x cols * count, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--each", action="store_true", help="every shape of the set by itself")
    parser.add_argument("--gradients", choices=("gaussian", "tokens"), default="gaussian")
    parser.add_argument("--cap", type=float, default=60.0, help="seconds that a side's step may take")
    parser.add_argument("--only", nargs="*", default=(), help="only sides whose names contain one of these")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of to standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native_bf16 = choose_compute_dtype("auto", CPU).dtype == torch.bfloat16
    peers, missing = peer_sides()
    sides = peers + own_sides((torch.float32, torch.bfloat16) if native_bf16 else (torch.float32,))
    sides = [s for s in sides if not options.only or any(part in s.name for part in options.only)]
    shapes = parse_shapes(options.set)
    cases = {f"{M}x{N}": [s for s in shapes if s == (M, N)] for M, N in dict.fromkeys(shapes)}
    results = {}
    for what, members in cases.items() if options.each else [(options.set, shapes)]:
        results[what] = measure(sides, members, options)
        show(what, results[what])
    print("\n".join(missing))
    written = {"results": results, "not_installed": missing, "environment": environment()}
    if options.json:
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    else:
        print(json.dumps(written))


if __name__ == "__main__":
    main()
