"""A run that is killed again and again, also while it saves, is the run that was left alone: bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from earthshine.config import encode
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train.job import CheckpointConfig, HeldoutConfig, Scratch, TrainJob

STEPS, EVERY = 20, 5
# What may differ between two runs of the same job: when and where they ran.
PLACE = ("seconds", "tokens_per_second", "mfu", "memory_gib")
PATIENCE_SECONDS = 1800  # of a machine that is busy with other work
# A run that stops in the middle of its first save, until it is killed.
STOPS_IN_A_SAVE = """
import sys, time
from earthshine.checkpoint import run_store
from earthshine.cli.main import main

write_json = run_store.write_json

def write_and_wait(path, value):
    write_json(path, value)
    time.sleep(3600)

run_store.write_json = write_and_wait
sys.exit(main(sys.argv[1:]))
"""


def write_shards(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(2, 60, size=100)
    tokens = rng.integers(1, 64, size=int(lengths_N.sum()))
    tokens[np.cumsum(lengths_N) - 1] = 0
    folder.mkdir()
    writer = ShardWriter(folder, vocab_size=64, max_tokens_per_shard=1000)
    writer.add(tokens, lengths_N, 3 * (lengths_N - 1))
    writer.finish(tokenizer_sha256="0" * 64, eod=0)
    return folder


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """Twenty steps of experts with a bias that no optimizer holds, latent attention, Muon and AdamW, micro-batches, a
    routing pass, capacity, QK-Clip, two sources and held-out data."""
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=48, layers=(0, 1), gate="sigmoid_bias"),
    )
    sources = tuple(SourceConfig(path=str(write_shards(tmp_path / f"s{i}", i)), weight=1 + i) for i in range(2))
    job = TrainJob(
        name="kill",
        init=Scratch(model=model),
        seq_len=32,
        sequences_per_step=8,
        sequences_per_micro_batch=4,
        num_steps=STEPS,
        optimizer=OptimizerConfig(lr=5e-3, qk_clip_threshold=1e-3),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=3),
        data=DataConfig(sources=sources),
        balance=BalanceConfig(loss="switch", scope="step", bias_rate=1e-2),
        capacity=CapacityConfig(factor=1.0),
        heldout=HeldoutConfig(path=str(write_shards(tmp_path / "heldout", 9)), every_steps=10, max_sequences=4),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=2),
    )
    path = tmp_path / "job.json"
    path.write_text(json.dumps(encode(job)))
    return path


def start(
    job_file: Path, run_dir: Path, env: dict[str, str], *, stops_in_a_save: bool = False
) -> subprocess.Popen[bytes]:
    program = ["-c", STOPS_IN_A_SAVE] if stops_in_a_save else ["-m", "earthshine.cli.main"]
    command = [sys.executable, *program, "train", str(job_file), "--run", str(run_dir)]
    return subprocess.Popen(
        command, env=env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err.decode()
    return err.decode()


def wait_for(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> None:
    """Until the moment or, on a machine so busy that we miss it, the end of the run."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not moment() and process.poll() is None:
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.0005)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Whether the signal came before the end of the run: on a busy machine the last steps can be faster than we are."""
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err.decode()
    return process.returncode != 0


def logged(run_dir: Path, step: int) -> Callable[[], bool]:
    """The moment that the run has logged that step."""
    path, needle = run_dir / "metrics.jsonl", f'"kind": "step", "step": {step},'
    return lambda: path.exists() and needle in path.read_text()


def saving(run_dir: Path) -> Callable[[], bool]:
    """A moment in the middle of a save: tensors are being written, and not yet in their final place."""
    checkpoints = run_dir / "checkpoints"
    return lambda: any((p / "tensors").exists() for p in checkpoints.glob(".step-*.partial"))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Losses, norms, learning rates, sample ids, expert loads, evaluations; and the last checkpoint by its hashes."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    files = json.loads((last / "manifest.json").read_text())["files"]
    return {
        "metrics": [{k: v for k, v in line.items() if k not in PLACE} for line in lines],
        # Parameters, momenta and random state, byte by byte; the index beside them holds a unique id of the save.
        "files": {name: file for name, file in files.items() if name != "tensors/.metadata"},
        "state": json.loads((last / "state.json").read_text()),
        "heldout": (run_dir / "eval" / "heldout-after.json").read_text(),
    }


def test_killed_at_random_moments_and_in_saves_the_run_is_the_same(
    job_file: Path, tmp_path: Path, earthshine_env: dict[str, str]
) -> None:
    finish(start(job_file, tmp_path / "whole", earthshine_env))
    expected = outcome(tmp_path / "whole")
    assert [r["step"] for r in expected["metrics"] if r["kind"] == "step"] == list(range(1, STEPS + 1))
    assert sum(r.get("heads_clipped", 0) for r in expected["metrics"]) > STEPS

    rng = random.Random(20261121)
    for attempt in range(5):  # more than one only where other work kept us from the moments
        run = tmp_path / f"run-{attempt}"
        kills, interrupted_saves = interrupt(job_file, run, earthshine_env, rng)
        log = finish(start(job_file, run, earthshine_env))
        assert "resuming from" in log or f"all {STEPS} steps are done" in log
        assert not list((run / "checkpoints").glob(".*"))
        assert outcome(run) == expected
        if kills >= 3 and interrupted_saves >= 1:
            return
    pytest.fail("no kill hit a save, or too few hit the run: nothing was shown")


def interrupt(job_file: Path, run: Path, env: dict[str, str], rng: random.Random) -> tuple[int, int]:
    """Start the run five times and end each start early; returns how many kills hit it, and how many hit a save."""
    kills = interrupted_saves = 0
    for how, step in (
        ("kill", rng.randint(1, 3)),  # before there is a checkpoint
        ("kill in a save", 0),
        ("terminate", rng.randint(6, 8)),
        ("kill in a save", 0),
        ("kill", rng.randint(15, 19)),
    ):
        process = start(job_file, run, env, stops_in_a_save=how == "kill in a save")
        wait_for(process, logged(run, step) if step else saving(run))
        if step:
            time.sleep(rng.uniform(0, 0.05))
        if how == "terminate":
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=PATIENCE_SECONDS)
            if process.returncode:  # else it ended before
                assert process.returncode == 75 and "Run the same command to resume" in err.decode(), err.decode()
        else:
            kills += kill(process)
        interrupted_saves += any((run / "checkpoints").glob(".step-*.partial"))
    return kills, interrupted_saves
