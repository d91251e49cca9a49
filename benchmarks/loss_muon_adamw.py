"""Muon against AdamW on a small MoE and real text: each at its best of several learning rates.

    python benchmarks/loss_muon_adamw.py --text DOCUMENT.txt... [--dir FOLDER] [--jobs 2] [--report-only]

Every (optimizer, learning rate, seed) is one run of `fit` in its own folder, on one thread; everything else is equal:
model, initialization, batches and their order (both by seed), schedule, clipping, weight decay. The same command skips
finished runs and resumes an interrupted one from its last checkpoint; more learning rates or seeds only add runs.
--jobs runs are made at a time. Every tenth --text file (by name) is held out: of each, an excerpt from its middle, the
same in all runs. `benchmarks/support/loss_report.py` reports them, with intervals, as muon-vs-adamw.md and
muon-vs-adamw.svg in --out.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from support.loss_report import Study, write_report

from earthshine.config import encode
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.files import write_json
from earthshine.model import presets
from earthshine.model.config import ModelConfig
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train.job import CheckpointConfig, HeldoutConfig, Scratch, TrainJob

LAYERS = 4
VOCABULARY, END = 2048, "<|endoftext|>"
SEQ_LEN, SEQUENCES_PER_STEP = 256, 8
WARMUP_FRACTION, FINAL_FRACTION = 0.1, 0.1
EVALUATE_EVERY = 25
HELDOUT_EVERY, HELDOUT_CHARS = 10, 1800
RESULT, LOG = "result.json", "log.txt"


def model() -> ModelConfig:
    """The recipe tiny_moe's model with a fourth layer: 8 experts, top-2, of 96 x 256 in all layers."""
    recipe = presets.llama3_tiny_e8t2()
    moe = replace(recipe.moe, layers=tuple(range(LAYERS)))
    return replace(recipe, vocab_size=VOCABULARY, num_hidden_layers=LAYERS, moe=moe)


@dataclass(frozen=True)
class GridRun:
    """One run's place in the grid."""

    algorithm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.algorithm}-lr{self.lr:g}-seed{self.seed}"


def job(run: GridRun, data: Path, steps: int) -> TrainJob:
    """Two jobs differ in `run` only."""
    assert run.algorithm in ("muon", "adamw")
    return TrainJob(
        name=run.name,
        init=Scratch(model=model()),
        data=DataConfig(sources=(SourceConfig(path=str(data / "train")),)),
        heldout=HeldoutConfig(path=str(data / "heldout"), every_steps=EVALUATE_EVERY, max_sequences=0),
        seq_len=SEQ_LEN,
        sequences_per_step=SEQUENCES_PER_STEP,
        sequences_per_micro_batch=SEQUENCES_PER_STEP,
        num_steps=steps,
        optimizer=OptimizerConfig(
            algorithm="muon" if run.algorithm == "muon" else "adamw",
            lr=run.lr,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            ns_form="auto",
        ),
        schedule=ScheduleConfig(
            kind="cosine", warmup_steps=round(WARMUP_FRACTION * steps), final_fraction=FINAL_FRACTION
        ),
        clip_grad_norm=1.0,
        seed=run.seed,
        compute_dtype="float32",
        checkpoint=CheckpointConfig(every_steps=100, keep=1),
    )


def prepare_data(files: list[Path], data: Path) -> dict[str, Any]:
    """A tokenizer trained on the training documents, and shards of both parts; an earlier result is reused.

    Raises ConfigError for too few files, or for a folder that was made from others.
    """
    described = data / "text.json"
    if described.exists():
        known = _read(described)
        if files and _fingerprint(files) != known["sha256"]:
            raise ConfigError(f"{data} was made from other texts than --text: choose another --dir.")
        return known
    if len(files) < 2 * HELDOUT_EVERY:
        raise ConfigError(f"--text names {len(files)} files; at least {2 * HELDOUT_EVERY} documents are needed.")
    from tokenizers import ByteLevelBPETokenizer

    from earthshine.data.prepare import prepare

    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    documents = [f.read_text(encoding="utf-8") for f in files]
    middle = (HELDOUT_EVERY - 1) // 2
    parts = {
        "train": [d for i, d in enumerate(documents) if i % HELDOUT_EVERY != middle],
        "heldout": [_excerpt(d) for i, d in enumerate(documents) if i % HELDOUT_EVERY == middle],
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(parts["train"], vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer.save(str(data / "tokenizer.json"))
    summary: dict[str, Any] = {"files": len(files), "bytes": sum(len(d.encode()) for d in documents)}
    for name, texts in parts.items():
        lines = data / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        shards = prepare([lines], data / "tokenizer.json", data / name, eod=END, workers=1)
        summary[name] = {key: shards[key] for key in ("documents", "tokens", "bytes")}
    summary |= {"names": [files[0].name, files[-1].name], "sha256": _fingerprint(files)}
    write_json(described, summary)
    return summary


def _excerpt(text: str) -> str:
    """The middle of a document, in whole words."""
    start = max(0, (len(text) - HELDOUT_CHARS) // 2)
    return text[start : start + HELDOUT_CHARS].partition(" ")[2].rpartition(" ")[0]


def _fingerprint(files: list[Path]) -> str:
    """sha256 of all files' bytes, in order, as `cat FILES | sha256sum` gives it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def train(run: GridRun, root: Path, steps: int) -> None:
    """One run, in this process; its result is the last thing written, and its checkpoints go."""
    import torch

    from earthshine.device import environment
    from earthshine.train.loop import fit

    torch.set_num_threads(1)
    folder, this = root / run.name, job(run, root / "data", steps)
    diverged = ""
    try:
        fit(this, folder, device="cpu")
    except TrainingDivergedError as e:  # a learning rate too high is a result, too
        diverged = str(e)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_steps = [r for r in records if r["kind"] == "step"]
    write_json(
        folder / RESULT,
        {
            "algorithm": run.algorithm,
            "lr": run.lr,
            "seed": run.seed,
            "steps": steps,
            "diverged": diverged,
            "train_loss": [r["loss"] for r in of_steps],
            "heldout": [[r["step"], r["loss"]] for r in records if r["kind"] == "heldout"],
            "seconds": [r["seconds"] for r in of_steps],
            "samples": hashlib.sha256("".join(r["samples"] for r in of_steps).encode()).hexdigest(),
            "job": encode(this),
            "environment": environment(torch.device("cpu")),
        },
    )
    for checkpoint in folder.glob("checkpoints*"):
        shutil.rmtree(checkpoint)


def start(run: GridRun, root: Path, steps: int) -> None:
    """`train` in a process of its own, on one thread, unless its result is there."""
    folder = root / run.name
    if (folder / RESULT).exists():
        return
    command = [sys.executable, __file__, "--one", run.algorithm, repr(run.lr), str(run.seed)]
    command += ["--dir", str(root), "--steps", str(steps)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    log = root / f"{run.name}.{LOG}"
    with log.open("a") as out:
        process = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads)
    if process.returncode:
        raise ConfigError(f"{run.name} ended with code {process.returncode}: see {log}.")
    result = _read(folder / RESULT)
    ended = "diverged" if result["diverged"] else f"held-out loss {result['heldout'][-1][1]:.4f}"
    print(f"{run.name}: {ended}, {sum(result['seconds']):.0f} s", flush=True)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="at least 20 text files, one document each")
    parser.add_argument("--text-name", default="", help="what the report calls them")
    parser.add_argument("--dir", type=Path, default=Path("runs/muon-vs-adamw"), help="where the runs are")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lrs-muon", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--lrs-adamw", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--report-only", action="store_true", help="from the finished runs of --dir")
    parser.add_argument("--out", type=Path, help="where the report goes; --dir when absent")
    parser.add_argument("--one", nargs=3, metavar=("ALGORITHM", "LR", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    root = chosen.dir
    if chosen.one:
        algorithm, lr, seed = chosen.one
        train(GridRun(algorithm, float(lr), int(seed)), root, chosen.steps)
        return
    text = prepare_data(sorted(chosen.text, key=lambda f: f.name), root / "data")
    grids = {"muon": chosen.lrs_muon, "adamw": chosen.lrs_adamw}
    # Seeds outermost: the first seed of the whole grid tells early whether the grid lies right.
    runs = [GridRun(a, lr, seed) for seed in chosen.seeds for a, lrs in grids.items() for lr in lrs]
    if not chosen.report_only:
        with ThreadPoolExecutor(chosen.jobs) as pool:
            for _ in pool.map(lambda run: start(run, root, chosen.steps), runs):
                pass
    results = [_read(root / run.name / RESULT) | {"plan": _read(root / run.name / "plan.json")} for run in runs]
    named = {run.name for run in runs}
    outside = [_read(path) for path in sorted(root.glob(f"*/{RESULT}")) if path.parent.name not in named]
    study = Study(results, text=text | {"name": chosen.text_name}, outside=outside)
    print(write_report(study, chosen.out or root))


if __name__ == "__main__":
    main()
