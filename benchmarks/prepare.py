"""How fast `prepare` is: tokens per second over the Python standard library's own sources.

    python benchmarks/prepare.py [--tokenizer PATH] [--workers 1 2] [--repeat 3] [--mib 8] [--json FILE]

Each number of workers is run in turn, `repeat` times over, so that a busy machine slows all of them alike; the best and
the median are shown. Start-up of the workers is part of the time, as it is for a user. "library alone" is
`tokenizers.encode_batch_fast` on the same texts, in memory, by as many of its own threads: the upper bound.
Without a tokenizer a byte-level BPE of 8,192 entries is trained on the same sources first.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from earthshine.console import human_bytes, human_count, table
from earthshine.data.prepare import prepare

_ALONE = """
import sys, time, pathlib, tokenizers
t = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [pathlib.Path(p).read_text(encoding="utf-8") for p in sys.stdin.read().splitlines()]
start = time.perf_counter()
tokens = sum(len(e.ids) for e in t.encode_batch_fast(texts, add_special_tokens=False))
print(tokens / (time.perf_counter() - start))
"""


def standard_library(mib: float) -> list[Path]:
    """The first `mib` MiB of what Python ships, without installed packages and test files that are not text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if "site-packages" not in f.parts and _is_text(f)]
    ends = itertools.accumulate(f.stat().st_size for f in files)
    return [f for f, end in zip(files, ends, strict=True) if end <= mib * 2**20]


def _is_text(file: Path) -> bool:
    try:
        return bool(file.read_text(encoding="utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def train_tokenizer(files: list[Path], folder: Path) -> Path:
    """A GPT-2-style byte-level BPE over a part of the sources."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(f) for f in files[:60]], vocab_size=8192, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def library_alone(tokenizer_json: Path, files: list[Path], threads: int) -> float:
    """Tokens per second of the library's own threads, in a fresh process."""
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tokenizer_json)],
        input="\n".join(map(str, files)),
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(tokenizer: Path, workers: list[int], repeat: int, files: list[Path]) -> list[dict[str, Any]]:
    tokenizer_json = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    runs: dict[int, list[dict[str, Any]]] = {n: [] for n in workers}
    alone: dict[int, list[float]] = {n: [] for n in workers}
    for _ in range(repeat):
        for n in workers:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch, "shards")
                start = time.perf_counter()
                summary = prepare(files, tokenizer, out, workers=n, eod=0)
                seconds = time.perf_counter() - start
                shutil.rmtree(out)
            runs[n].append({**summary, "rate": summary["tokens"] / seconds})
            alone[n].append(library_alone(tokenizer_json, files, n))
    return [
        {
            "workers": n,
            "documents": runs[n][0]["documents"],
            "tokens": runs[n][0]["tokens"],
            "bytes": runs[n][0]["bytes"],
            "tokens_per_second_best": max(r["rate"] for r in runs[n]),
            "tokens_per_second_median": statistics.median(r["rate"] for r in runs[n]),
            "library_alone_best": max(alone[n]),
        }
        for n in workers
    ]


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, or a folder with one")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, cores}), help="numbers of workers to try")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    parser.add_argument("--mib", type=float, default=8, help="how much of the sources to use (they are about 30 MiB)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    files = standard_library(options.mib)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = options.tokenizer or train_tokenizer(files, Path(scratch))
        rows = measure(tokenizer, options.workers, options.repeat, files)
    print(
        table(
            ["workers", "tokens", "text", "tokens/s best", "median", "text/s best", "of library alone"],
            [
                [
                    r["workers"],
                    human_count(r["tokens"]),
                    human_bytes(r["bytes"]),
                    human_count(r["tokens_per_second_best"]),
                    human_count(r["tokens_per_second_median"]),
                    human_bytes(r["tokens_per_second_best"] * r["bytes"] / r["tokens"]),
                    f"{r['tokens_per_second_best'] / r['library_alone_best']:.2f}",
                ]
                for r in rows
            ],
        )
    )
    if options.json:
        options.json.write_text(json.dumps({"python": sys.version.split()[0], "cores": cores, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
