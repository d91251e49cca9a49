"""Upcycling a synthetic dense checkpoint: peak memory, and bytes written per second beside the disk's own rate.

    python benchmarks/upcycle_io.py [--gb 4] [--layers N] [--dir DIR] [--json FILE]

A bf16 Llama of about `--gb` GB is written into a scratch folder and converted to 8 experts, top-2 (in its first N
layers; 0 for all), in a process of its own. After each weight file that the conversion has synced, as many bytes are
written and synced plainly, so that both meet the same disk. Sources are dropped from the page cache first.
Memory is the peak (VmHWM) of the converting process less that of a process that only imported the same modules.
Exits 3 when memory is not below 1 GB or the rate is below 0.8 of the plain one. The scratch folder is removed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from earthshine.checkpoint.hf import write_model
from earthshine.checkpoint.name_tables import Entry, entries
from earthshine.checkpoint.safetensors_store import row_blocks
from earthshine.checkpoint.safetensors_writer import OutputTensor
from earthshine.console import human_bytes, table
from earthshine.device import environment
from earthshine.files import write_json
from earthshine.model.config import ModelConfig
from earthshine.model.counts import count_parameters
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle

MAX_MEMORY_BYTES = 1_000_000_000
MIN_RATE_RATIO = 0.8
BLOCK = os.urandom(16 << 20)


def dense_config(num_bytes: float) -> ModelConfig:
    """A Llama with Llama 3's vocabulary and proportions whose bf16 weights come nearest to `num_bytes`."""
    small = num_bytes < 2e9

    def with_layers(layers: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=8192 if small else 128256,
            hidden_size=1024 if small else 2048,
            intermediate_size=4096 if small else 8192,
            num_hidden_layers=layers,
            num_attention_heads=16 if small else 32,
            num_key_value_heads=4 if small else 8,
            head_dim=64,
        )

    return min(map(with_layers, range(1, 200)), key=lambda c: abs(2 * count_parameters(c).total - num_bytes))


def write_dense(directory: Path, config: ModelConfig) -> None:
    """Random weights; which ones does not matter, only that they are finite and not all the same."""
    pattern = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).bfloat16()

    def rows_of(entry: Entry) -> Iterator[Tensor]:
        for rows in row_blocks(entry.shape, 2):
            shape = (rows[0].stop - rows[0].start, *entry.shape[1:])
            yield pattern[: torch.Size(shape).numel()].view(shape)

    directory.mkdir()
    tensors = [OutputTensor(e.hf, torch.bfloat16, e.shape, partial(rows_of, e)) for e in entries(config)]
    write_model(directory, config, tensors, files={})


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_write(path: Path, num_bytes: int) -> float:
    """Seconds to write and sync that many bytes."""
    start = time.perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    left = num_bytes
    while left:
        left -= os.write(fd, memoryview(BLOCK)[:left])
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def convert(dense: Path, out: Path, layers: int) -> dict[str, object]:
    """Run in the child: convert, with a plain write after each file; JSON-ready times and sizes."""
    files: list[dict[str, float]] = []
    mark = time.perf_counter()

    def after_shard(path: Path) -> None:
        nonlocal mark
        seconds, size = time.perf_counter() - mark, path.stat().st_size
        files.append({"bytes": size, "seconds": seconds, "plain_seconds": plain_write(out.parent / "plain", size)})
        mark = time.perf_counter()

    upcycle(dense, out, UpcycleConfig(layers=tuple(range(layers))), after_shard=after_shard)
    tail = time.perf_counter() - mark  # config, tokenizer, manifest, rename
    return {"files": files, "tail_seconds": tail}


def peak_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run_child(*arguments: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def child(arguments: list[str]) -> None:
    result = convert(Path(arguments[1]), Path(arguments[2]), int(arguments[3])) if arguments[0] == "convert" else {}
    print(json.dumps(result | {"peak_bytes": peak_memory_bytes()}))


def measure(num_bytes: float, layers: int, folder: Path | None) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="upcycle-io-") as scratch:
        dense, out = Path(scratch) / "dense", Path(scratch) / "moe"
        config = dense_config(num_bytes)
        write_dense(dense, config)
        drop_from_cache(dense)
        source_bytes = sum(p.stat().st_size for p in dense.iterdir())
        idle = run_child("import")
        run = run_child("convert", str(dense), str(out), str(layers))
    files = run["files"]
    assert isinstance(files, list) and isinstance(run["peak_bytes"], int) and isinstance(idle["peak_bytes"], int)
    written = sum(f["bytes"] for f in files)
    seconds = sum(f["seconds"] for f in files) + float(str(run["tail_seconds"]))
    plain = sum(f["plain_seconds"] for f in files)
    memory = run["peak_bytes"] - idle["peak_bytes"]
    return {
        "benchmark": "upcycle_io",
        "source_bytes": source_bytes,
        "converted_layers": layers or config.num_hidden_layers,
        "num_layers": config.num_hidden_layers,
        "written_bytes": written,
        "seconds": seconds,
        "plain_seconds": plain,
        "bytes_per_second": written / seconds,
        "plain_bytes_per_second": written / plain,
        "rate_ratio": plain / seconds,
        "min_rate_ratio": MIN_RATE_RATIO,
        "peak_bytes": run["peak_bytes"],
        "import_peak_bytes": idle["peak_bytes"],
        "memory_bytes": memory,
        "max_memory_bytes": MAX_MEMORY_BYTES,
        "ok": memory < MAX_MEMORY_BYTES and plain / seconds >= MIN_RATE_RATIO,
        "files": files,
        "environment": environment(),
    }


def show(result: dict[str, object]) -> str:
    size = {k: human_bytes(v) for k, v in result.items() if isinstance(v, int | float) and "bytes" in k}
    rows = [
        ["source", size["source_bytes"], ""],
        ["layers converted", f"{result['converted_layers']} of {result['num_layers']}", ""],
        ["written", size["written_bytes"], ""],
        ["upcycling, hashed and synced", f"{size['bytes_per_second']}/s", ""],
        ["plain write, synced", f"{size['plain_bytes_per_second']}/s", ""],
        ["ratio", f"{result['rate_ratio']:.3f}", f">= {MIN_RATE_RATIO}"],
        ["peak memory beyond the imports", size["memory_bytes"], f"< {human_bytes(MAX_MEMORY_BYTES)}"],
        ["peak memory, total", size["peak_bytes"], ""],
    ]
    return table(["what", "measured", "bar"], rows)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the dense checkpoint, in 10^9 bytes")
    parser.add_argument("--layers", type=int, default=0, help="convert the first N layers; 0: all")
    parser.add_argument("--dir", type=Path, help="scratch folder, on the disk to measure (needs seven times --gb)")
    parser.add_argument("--json", type=Path, help="also write the result there")
    options = parser.parse_args()
    result = measure(options.gb * 1e9, options.layers, options.dir)
    print(show(result))
    if options.json:
        write_json(options.json, result)
    return 0 if result["ok"] else 3


if __name__ == "__main__":
    sys.exit(main())
