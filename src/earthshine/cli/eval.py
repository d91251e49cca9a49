"""`earthshine eval`."""

from dataclasses import dataclass
from pathlib import Path

from earthshine.cli.options import ModelPath, Precision, load, print_json
from earthshine.console import log, table

DESCRIPTION = "Held-out loss of a model on token shards: nats per token with its standard error, and bits per byte."
EXAMPLES = (
    ("a Hugging Face directory", "earthshine eval models/llama-8x --shards data/heldout"),
    ("a run's latest checkpoint, on 64 sequences", "earthshine eval runs/a --shards data/heldout --max-sequences 64"),
    (
        "keep the result where `report` finds it",
        "earthshine eval runs/a --shards data/heldout --out runs/a/eval/mine.json",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: ModelPath
    """Hugging Face directory, or a run folder (its latest checkpoint)."""

    shards: Path
    """Token shards that `earthshine prepare` wrote, of documents that were not trained on."""

    seq_len: int = 512
    """Tokens per sequence."""

    max_sequences: int = 256
    """Sequences to use, from the start of the shards; 0: all."""

    batch: int = 4
    """Sequences per forward pass."""

    precision: Precision = "float32"
    """Type of the computation."""

    out: Path | None = None
    """JSON file to write the result to as well."""

    trust: bool = False
    """Read a checkpoint that was not made on this machine."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    from earthshine.evaluate.perplexity import heldout_loss
    from earthshine.files import write_json

    _compare_tokenizers(options)
    model = load(options.model, options.precision, options.trust)
    result = heldout_loss(
        model, options.shards, seq_len=options.seq_len, max_sequences=options.max_sequences, batch=options.batch
    )
    if options.out:
        write_json(options.out, result)
    if options.json:
        print_json(result)
        return
    rows = [
        ("loss", f"{result['loss']:.4f} +- {result['stderr']:.4f}", "nats per token"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}", ""),
        ("tokens", f"{result['tokens']:,}", f"of {options.shards}"),
    ]
    print(table(("what", "value", "note"), rows))


def _compare_tokenizers(options: Options) -> None:
    """Say so when the shards were made with another file than the model's: ids that mean something else have a loss."""
    from earthshine.data.shards import TokenShards
    from earthshine.files import sha256_file

    own = options.model / "tokenizer.json"
    if own.is_file() and sha256_file(own) != TokenShards(options.shards, verify=False).tokenizer_sha256:
        log(
            f"warning: {options.shards} was not made with {own}: unless the two files hold the same vocabulary, "
            f"the loss means nothing."
        )
