"""`earthshine eval`."""

from dataclasses import dataclass
from pathlib import Path

from earthshine.cli.options import ModelPath, Precision, load, print_json
from earthshine.console import table

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

    across_documents: bool = False
    """Let attention see the documents before in its window, as a job with data.document_attention=false trains."""

    precision: Precision = "float32"
    """Type of the computation."""

    out: Path | None = None
    """JSON file to write the result to as well."""

    trust: bool = False
    """Read a checkpoint that was not made on this machine."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    from earthshine.data.shards import TokenShards
    from earthshine.data.tokenizer import warn_of_other_tokenizer
    from earthshine.evaluate.perplexity import heldout_loss
    from earthshine.files import write_json

    warn_of_other_tokenizer(options.model, options.shards, TokenShards(options.shards, verify=False).tokenizer_sha256)
    model = load(options.model, options.precision, options.trust)
    result = heldout_loss(
        model,
        options.shards,
        seq_len=options.seq_len,
        max_sequences=options.max_sequences,
        batch=options.batch,
        document_attention=not options.across_documents,
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
