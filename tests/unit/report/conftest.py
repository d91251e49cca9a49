"""Run folders like those that training writes, made without training: plausible numbers from a seeded generator."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23)
MODEL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
PROMPTS = (
    "def fibonacci(n):\n",
    "The Moon has no light of its own.",
    'if x < 3 && y > "4":  # <script>alert(1)</script> & friends',
)


class RunFolder:
    """A generated run folder; `write` replaces one of its files, `remove` takes one away."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: Any) -> "RunFolder":
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        return self

    def remove(self, *names: str) -> "RunFolder":
        for name in names:
            (self.path / name).unlink()
        return self


def config(name: str, num_steps: int, sparse: bool) -> dict[str, Any]:
    return {
        "name": name,
        "init": {"kind": "huggingface", "path": "smollm2-e8t2" if sparse else "smollm2"},
        "seq_len": 512,
        "sequences_per_step": 16,
        "sequences_per_micro_batch": 4,
        "num_steps": num_steps,
        "optimizer": {
            "algorithm": "muon", "lr": 0.0003, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True,
            "update_rms": 0.2, "ns_steps": 5, "freeze": [],
        },
        "schedule": {"kind": "cosine", "warmup_steps": max(1, num_steps // 20), "final_fraction": 0.1},
        "data": {"sources": [{"path": "stdlib-train", "weight": 1.0}], "document_attention": True},
        "heldout": {"path": "stdlib-heldout", "every_steps": 0, "max_sequences": 48},
        "balance": {"loss": "switch", "coefficient": 0.01, "scope": "micro_batch", "z_coefficient": 0.001},
        "capacity": {"factor": 1.25 if sparse else 0.0, "relative_to": "per_assignment", "drop": "probability"},
        "clip_grad_norm": 1.0,
        "seed": 0,
        "compute_dtype": "auto",
        "checkpoint": {"every_steps": 100, "keep": 2},
        "tracker": "none",
    }  # fmt: skip


def plan(num_steps: int, sparse: bool) -> dict[str, Any]:
    moe = {"num_experts": 8, "top_k": 2, "intermediate_size": 1536, "layers": list(LAYERS)} if sparse else {}
    total, active = (283_185_216, 155_778_624) if sparse else (134_515_008, 134_515_008)
    return {
        "world": 1,
        "num_steps": num_steps,
        "tokens_per_step": 8192,
        "total_tokens": 8192 * num_steps,
        "parameters": total,
        "active_parameters": active,
        "trainable_parameters": total,
        "muon_parameters": total - 28_347_264,
        "adamw_parameters": 28_347_264,
        "forward_backward_flops_per_step": 6.4e12 * active / 134e6,
        "newton_schulz_flops_per_step": 8.8e11 * total / 134e6,
        "repeated_forward_flops_per_step": 2.1e12 if sparse else 0.0,
        "model": {**MODEL, "moe": moe},
    }


ENV = {
    "versions": {
        "python": "3.11.7",
        "earthshine": "0.1.0",
        "torch": "2.13.0+cpu",
        "numpy": "2.3.1",
        "transformers": None,
    },
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz",
    "cpu_flags": ["avx2", "fma", "f16c"],
    "cores": 2,
    "threads": 2,
    "device": "cpu",
    "memory_bytes": 25_200_000_000,
    "float32_matmul_precision": "highest",
    "compute_reason": "bfloat16 products are slower here",
    "peak_flops": 1.37e11,
    "compute_dtype": "float32",
    "ns_dtype": "float32",
}


def expert_load(rng: random.Random, spread: float) -> dict[str, list[float]]:
    loads = {}
    for layer in LAYERS:
        weights = [math.exp(rng.gauss(0, spread)) for _ in range(8)]
        loads[str(layer)] = [w / sum(weights) for w in weights]
    return loads


def metrics(num_steps: int, sparse: bool, start: float, drop: float) -> list[dict[str, Any]]:
    rng, common = random.Random(num_steps + sparse), random.Random(7)
    lines: list[dict[str, Any]] = [heldout_line(0, start)]
    warmup = max(1, num_steps // 20)
    for step in range(1, num_steps + 1):
        done = step / num_steps
        loss = start - drop * (1 - math.exp(-3 * done)) + common.gauss(0, 0.06) + rng.gauss(0, 0.01)
        lr = 3e-4 * (step / warmup if step <= warmup else 0.55 + 0.45 * math.cos(math.pi * done))
        speed = rng.gauss(610 if sparse else 910, 12)
        line = {
            "kind": "step", "step": step, "loss": loss, "grad_norm": 0.7 + 1.6 * math.exp(-6 * done) + rng.random() / 5,
            "lr": lr, "tokens": 8190, "total_tokens": 8190 * step, "seconds": 8190 / speed, "tokens_per_second": speed,
            "mfu": rng.gauss(0.52, 0.01), "memory_gib": 5.61 if sparse else 3.02,
            "update_rms": {"muon": rng.gauss(0.186, 0.002), "adamw": 0.3 + 0.5 / step}, "samples": f"{step:064x}"[::-1],
        }  # fmt: skip
        if sparse:
            line["expert_load"] = expert_load(rng, 0.15 + 0.25 * done)
            worst = max(8 * max(row) for row in line["expert_load"].values())
            balance = 1 + 0.05 * done + rng.random() / 100
            line |= {"max_violation": worst - 1, "dead_experts": 0, "balance": balance, "balance_loss": 8e-3 * balance}
            line["drop_rate"] = max(0.0, rng.gauss(0.01, 0.004))
        lines.append(line)
        if step in (num_steps // 2, num_steps):
            lines.append(heldout_line(step, start - drop * (1 - math.exp(-3 * done))))
    return lines


def heldout_line(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "heldout", "step": step, "loss": loss, "stderr": 0.03, "bits_per_byte": loss / 2.4, "tokens": 24528}


def heldout(loss: float, own_seed: int, noise: float = 0.01, sequences: int = 48) -> dict[str, Any]:
    """An evaluation whose sequences are hard or easy for every model alike, plus a little of each model's own."""
    common, individual = random.Random(3), random.Random(own_seed)
    tokens = [511 - common.randrange(3) for _ in range(sequences)]
    losses = [loss + common.gauss(0, 0.4) + individual.gauss(0, noise) for _ in range(sequences)]
    total = sum(tokens)
    mean = sum(x * n for x, n in zip(losses, tokens, strict=True)) / total
    residual = sum((n * (x - mean)) ** 2 for x, n in zip(losses, tokens, strict=True))
    stderr = math.sqrt(sequences / (sequences - 1) * residual) / total if sequences > 1 else 0.0
    return {
        "kind": "heldout", "loss": mean, "stderr": stderr, "bits_per_byte": mean / math.log(2) / 3.46, "tokens": total,
        "bytes": round(3.46 * total), "seq_len": 512, "sequence_losses": losses, "sequence_tokens": tokens,
    }  # fmt: skip


def samples(label: str, trained: bool) -> dict[str, Any]:
    texts = (
        "    a, b = 0, 1\n    while a < n:\n        yield a\n        a, b = b, a + b\n" if trained else
        "    if n < 2:\n        return n\n    return fibonacci(n-1) + fibonacci(n-2)\n",
        "It shines by the light of the Sun, and on its night side by ours.\n\nThe Earth is four times as wide.",
        "``` <b>not bold</b> \u202e \u0000 \ud83c\udf12 </pre></div>",
    )  # fmt: skip
    pairs = zip(PROMPTS, texts, strict=True)
    return {"kind": "samples", "label": label, "samples": [{"prompt": p, "text": t} for p, t in pairs]}


def verification() -> dict[str, Any]:
    rows = [
        ("logits, relative", 1.93e-6, 1e-5, "largest logit 43.1"),
        ("logits, against own error", 1.93e-6, 2.4e-6, "3 x the dense model's own float32 error, 8.0e-07"),
        ("logits in float64, relative", 4.4e-15, 1e-9, ""),
    ]
    keys = ("name", "measured", "tolerance", "note")
    return {
        "kind": "verify",
        "check": "upcycle",
        "subject": {"dense": "smollm2", "moe": "smollm2-e8t2", "tokens": 128, "text": "English and code"},
        "ok": True,
        "rows": [{**dict(zip(keys, row, strict=True)), "ok": row[1] <= row[2]} for row in rows],
    }


def make_run(path: Path, name: str, num_steps: int = 4, sparse: bool = False) -> RunFolder:
    """A finished run of `num_steps` steps with every file that a report can use."""
    start, drop = 2.31, 0.05 if num_steps < 10 else 0.9
    run = RunFolder(path)
    run.write("config.json", config(name, num_steps, sparse)).write("plan.json", plan(num_steps, sparse))
    run.write("env.json", ENV)
    run.write("metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics(num_steps, sparse, start, drop)))
    run.write("eval/heldout-before.json", heldout(start, 1, 1e-7))
    run.write("eval/heldout-after.json", heldout(start - drop - (0.002 if sparse else 0), 2 + sparse))
    run.write("eval/samples-before.json", samples("greedy", False)).write(
        "eval/samples-after.json", samples("greedy", True)
    )
    if sparse:
        run.write("eval/verify-upcycle.json", verification())
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., RunFolder]:
    """Make a run folder: folder("name", num_steps=4, sparse=False)."""
    return lambda name, num_steps=4, sparse=False: make_run(tmp_path / name, name, num_steps, sparse)


@pytest.fixture
def pair(folder: Callable[..., RunFolder]) -> tuple[RunFolder, RunFolder]:
    """The tour's two runs: dense, and upcycled to 8 experts, of 4 steps."""
    return folder("smollm2-dense"), folder("smollm2-e8t2", sparse=True)


@pytest.fixture
def heldout_json() -> Callable[..., dict[str, Any]]:
    """An evaluation file: heldout_json(loss, own_seed, noise, sequences)."""
    return heldout
