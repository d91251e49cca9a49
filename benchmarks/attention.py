"""Attention by row blocks against torch's SDPA, forward and backward, interleaved in one run.

    python benchmarks/attention.py [--threads 1 2] [--samples 7] [--dtypes float32 bfloat16] [--json FILE]

`ops.attention` chooses its kernel by these numbers. GFLOP/s count the causal half of the square: two matmuls forward,
four backward.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from earthshine.console import table
from earthshine.device import DTYPES, gemm_peak, pick_device
from earthshine.ops import attention

SHAPES = (  # batch, query heads, key-value heads, positions, width of keys, width of values
    (8, 8, 8, 512, 32, 32),
    (8, 8, 8, 512, 64, 64),
    (8, 8, 2, 512, 64, 64),
    (4, 8, 8, 1024, 64, 64),
    (2, 8, 8, 2048, 64, 64),
    (8, 8, 8, 512, 48, 32),
    (8, 4, 4, 512, 192, 128),
    (2, 4, 4, 2048, 192, 128),
)
CHOSEN_ROWS = attention._block_rows
CONTENDERS: tuple[tuple[str, int], ...] = (("sdpa", 0), ("blocks", 32), ("blocks", 64), ("blocks", 128))


def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, contender: tuple[str, int]) -> float:
    """Seconds of one forward and backward pass."""
    backend, rows = contender
    attention._block_rows = lambda _: rows
    start = time.perf_counter()
    attention.causal_attention(q, k, v, backend=backend).backward(grad)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    q.grad = k.grad = v.grad = None
    return seconds


def measure(shape: tuple[int, ...], dtype: torch.dtype, samples: int) -> dict[str, Any]:
    B, H, G, S, C, V = shape
    sizes = ((B, S, H, C), (B, S, G, C), (B, S, G, V))
    q, k, v = (torch.randn(size, dtype=dtype).transpose(1, 2).requires_grad_() for size in sizes)
    grad = torch.randn(B, H, S, V, dtype=dtype)
    seconds: dict[tuple[str, int], list[float]] = {c: [] for c in CONTENDERS}
    for sample in range(-1, samples):
        for contender, times in seconds.items():
            spent = step(q, k, v, grad, contender)
            if sample >= 0:
                times.append(spent)
    flops = 3 * 2 * B * H * (C + V) * S * (S + 1) / 2
    seconds_by_name = {f"{name}{rows or ''}": statistics.median(times) for (name, rows), times in seconds.items()}
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": seconds_by_name,
        "gflops": {name: flops / s / 1e9 for name, s in seconds_by_name.items()},
        "sdpa_over_blocks": seconds_by_name["sdpa"] / seconds_by_name[f"blocks{CHOSEN_ROWS(C)}"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32"])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            peak = gemm_peak(pick_device("cpu"), DTYPES[dtype]) / 1e9
            rows = [measure(shape, DTYPES[dtype], options.samples) for shape in SHAPES]
            results += rows
            print(f"\n{dtype}, {threads} threads, large matmul {peak:.0f} GFLOP/s; milliseconds (GFLOP/s)")
            print(
                table(
                    ["B, H, G, S, C, V", *rows[0]["seconds"], "sdpa / chosen blocks"],
                    [
                        [
                            ", ".join(map(str, r["shape"])),
                            *(f"{1e3 * s:.1f} ({r['gflops'][name]:.0f})" for name, s in r["seconds"].items()),
                            f"{r['sdpa_over_blocks']:.2f}",
                        ]
                        for r in rows
                    ],
                )
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
