"""`earthshine eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.options import ModelPath, Precision, check_out, load, print_json
from earthshine.console import log, table

DESCRIPTION = (
    "Held-out (validation) loss of a model on token shards: nats per token with its standard error, and bits per byte."
)
EXAMPLES = (
    ("a Hugging Face directory", "earthshine eval models/llama-8x --shards data/heldout"),
    ("a run's latest checkpoint, on 64 sequences", "earthshine eval runs/a --shards data/heldout --max-sequences 64"),
    (
        "keep the result where `report` finds it",
        "earthshine eval runs/a --shards data/heldout --out runs/a/eval/heldout-after.json",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: ModelPath
    """Hugging Face directory, or a run folder (its latest checkpoint)."""

    shards: Annotated[Path, "DIR"]
    """Token shards from `earthshine prepare`, of documents that were not trained on."""

    seq_len: int = 512
    """Tokens per sequence."""

    max_sequences: int = 256
    """Sequences to evaluate, from the start of the shards; 0: all."""

    batch: int = 4
    """Sequences per forward pass."""

    across_documents: bool = False
    """Let attention see the earlier documents in its window, as a job with data.document_attention=false does; such a
    run is evaluated that way by default."""

    precision: Precision = "float32"
    """Compute dtype."""

    out: Annotated[Path | None, "FILE"] = None
    """Also write the result to this JSON file."""

    trust: bool = False
    """Read a checkpoint that was not made on this machine."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    from earthshine.checkpoint.run_rule import run_rule
    from earthshine.data.shards import TokenShards
    from earthshine.data.tokenization import unlike
    from earthshine.data.tokenizer import warn_of_other_tokenizer
    from earthshine.evaluate.perplexity import heldout_loss
    from earthshine.files import write_json

    check_out(options.out)
    shards, rule = TokenShards(options.shards, verify=False), run_rule(options.model)
    within = not options.across_documents
    if rule is None:
        warn_of_other_tokenizer(options.model, options.shards, shards.tokenizer_sha256)
        note = "a Hugging Face directory does not say how it was trained"
    else:
        fix = "Prepare them again with the tokenizer of the run's data (data.sources)."
        rule.require_tokenizer(shards.tokenizer_sha256, f"the tokenizer of {options.shards}", fix)
        within = within and rule.document_attention
        note = "as the run was trained" if within == rule.document_attention else "the run was trained within documents"
        differ = unlike(shards.tokenization, [rule.tokenization] if rule.tokenization else [])
        if differ:
            log(f"warning: {options.shards} was prepared differently from the run's data: {differ}.")
    for line in shards.notes():
        log(line)
    model = load(options.model, options.precision, options.trust)
    result = heldout_loss(
        model,
        options.shards,
        seq_len=options.seq_len,
        max_sequences=options.max_sequences,
        batch=options.batch,
        document_attention=within,
    )
    if options.out:
        write_json(options.out, result)
    if options.json:
        print_json(result)
        return
    rows = [
        ("loss", f"{result['loss']:.4f} +- {result['stderr']:.4f}", "nats per token"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}", f"lossy: {result['lost']}" if result["lost"] else ""),
        ("tokens", f"{result['tokens']:,}", f"of {options.shards}"),
        ("attention", "within documents" if within else "across documents", note),
    ]
    print(table(("what", "value", "note"), rows))
