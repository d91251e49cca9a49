"""`earthshine export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from earthshine.cli.arguments import Positional
from earthshine.cli.options import json_text, print_outcome

DESCRIPTION = (
    "Write a run or a model as a Hugging Face directory: weights, config, tokenizer, generation config and model card."
)
EXAMPLES = (
    ("a run's latest checkpoint, with the tokenizer of the model it started from", "earthshine export runs/a models/a"),
    ("the same in half the size", "earthshine export runs/a models/a-bf16 --dtype bfloat16"),
    ("with a tokenizer from elsewhere", "earthshine export runs/a models/a --tokenizer models/llama"),
)


@dataclass(frozen=True)
class Options:
    source: Annotated[Path, Positional("RUN|DIR")]
    """Run folder (its latest checkpoint), or a Hugging Face directory."""

    out: Annotated[Path, Positional("OUT_DIR")]
    """Directory to write; it must not exist."""

    tokenizer: Annotated[Path | None, "DIR"] = None
    """Folder with the tokenizer to copy, and with the generation config if it has one; by default that of the model the
    run started from."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored weights."""

    trust: bool = False
    """Read a checkpoint that was not made on this machine."""

    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    from earthshine.checkpoint.export import export

    export(options.source, options.out, tokenizer_dir=options.tokenizer, dtype=options.dtype, trust=options.trust)
    out = str(options.out)
    print_outcome(json_text({"out": out, "dtype": options.dtype}) if options.json else out)
