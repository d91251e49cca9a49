"""Twenty recorded losses and gradient norms of a tiny mixture trained with Muon.

Bit-equal where processor, torch and threads are the recorded ones; elsewhere within 1e-4 relative, because matrix
products sum in another order there. To record on purpose: `python tests/golden/test_losses.py`.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter
from earthshine.device import environment
from earthshine.recipes.tiny import tiny_moe
from earthshine.train.loop import fit

GOLDEN = Path(__file__).parent / "losses" / "tiny_moe_muon.json"
SAME_MACHINE = ("cpu_flags", "cpu_capability", "threads", "float32_matmul_precision", "torch")


def train(folder: Path) -> dict[str, Any]:
    """20 steps on a made-up language: each token follows from the one before, with noise."""
    shards = folder / "shards"
    shards.mkdir()
    random = np.random.Generator(np.random.Philox(7))
    writer = ShardWriter(shards, vocab_size=2048, max_tokens_per_shard=1 << 20)
    for _ in range(64):
        noise = random.integers(0, 2**63, 180, dtype=np.int64)
        tokens = np.zeros(181, dtype=np.int64)
        for i in range(179):
            tokens[i + 1] = (tokens[i] * 31 + 17) % 2000 if noise[i] % 4 else noise[i] % 2000
        tokens[-1] = 2047
        writer.add(tokens, np.array([181]), np.array([700]))
    writer.finish(eod=2047, tokenizer_sha256="0" * 64)
    job = replace(
        tiny_moe(), data=DataConfig(sources=(SourceConfig(path=str(shards)),)), seq_len=64, num_steps=20,
        compute_dtype="float32", schedule=replace(tiny_moe().schedule, warmup_steps=4),
    )  # fmt: skip
    fit(replace(job, optimizer=replace(job.optimizer, ns_dtype="float32")), folder / "run", device="cpu")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    here = environment()
    where = {key: here["versions"]["torch"] if key == "torch" else here[key] for key in SAME_MACHINE}
    return {"where": where, **{key: [line[key] for line in steps] for key in ("loss", "grad_norm", "samples")}}


def test_losses_are_the_recorded_ones(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    golden = json.loads(GOLDEN.read_text())
    torch.set_num_threads(golden["where"]["threads"])
    try:
        got = train(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert got["samples"] == golden["samples"]
    if got["where"] == golden["where"]:
        assert (got["loss"], got["grad_norm"]) == (golden["loss"], golden["grad_norm"])
    assert got["loss"] == pytest.approx(golden["loss"], rel=1e-4)
    assert golden["loss"][-1] < golden["loss"][0] - 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(train(Path(scratch)), indent=1) + "\n")
