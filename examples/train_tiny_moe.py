"""Train a tiny Mixture-of-Experts model and plot its loss: python examples/train_tiny_moe.py [RUN]

It makes everything it needs: a tokenizer, token shards of Python's own source files, a run folder (runs/example), and
in it report.html, with the loss curve and the load of every expert.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from earthshine import fit
from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.prepare import prepare
from earthshine.recipes.tiny import tiny_moe
from earthshine.report.page import write_report


def make_data(folder: Path) -> Path:
    """Token shards of a few modules of the standard library, with a byte-level tokenizer of 2,048 ids."""
    sources = [
        Path(statistics.__file__).with_name(f"{name}.py") for name in ("argparse", "ast", "statistics", "typing")
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(source) for source in sources], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    prepare(sources, folder / "tokenizer.json", folder / "shards", eod="<|end|>", workers=1)
    return folder / "shards"


def main(run: Path = Path("runs/example"), num_steps: int = 30) -> Path:
    shards = run.with_name(f"{run.name}-data") / "shards"
    if not shards.exists():
        make_data(shards.parent)
    job = tiny_moe()  # a recipe is a function that returns a job; change what you like
    job = replace(
        job, num_steps=num_steps, schedule=replace(job.schedule, warmup_steps=3),
        data=DataConfig(sources=(SourceConfig(path=str(shards)),)),
    )  # fmt: skip
    summary = fit(job, run)  # calling it again resumes; a finished run just returns
    print(f"{summary.step} steps, {summary.total_tokens:,} tokens, last loss {summary.loss:.3f}")
    print(f"open {write_report([run])} in a browser")
    return run


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
