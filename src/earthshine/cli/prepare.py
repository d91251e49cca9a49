"""`earthshine prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.arguments import Positional
from earthshine.cli.options import json_text, print_outcome
from earthshine.console import human_bytes, human_count

DESCRIPTION = """Turn text, JSON or parquet into token shards, which `train` memory-maps.

A text file is one document; so is each JSON record (a line, or an item of an array) and each row of a parquet file,
whose text is in the field --text-key. Files are recognized by their contents and may be compressed (gzip, zstd, bzip2,
xz). The output does not depend on the number of workers."""
EXAMPLES = (
    ("a folder of text files", "earthshine prepare docs/ --tokenizer models/llama --out data/docs"),
    (
        "several inputs, another field",
        "earthshine prepare a.jsonl b.jsonl.gz --text-key body --tokenizer t.json --out data/ab",
    ),
    (
        "a tokenizer that names no end token",
        "earthshine prepare web.parquet --tokenizer t.json --eod '</s>' --out data/web",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    inputs: Annotated[tuple[Path, ...], Positional("SRC")]
    """Files or folders."""

    tokenizer: Path
    """A tokenizer.json, or a folder with one, such as a model's."""

    out: Annotated[Path, "DIR"]
    """Folder to write; it must not exist."""

    text_key: str = "text"
    """The field of a JSON record or the column of a parquet file that holds the text."""

    eod: Annotated[str | None, "TOKEN"] = None
    """Token that ends a document, as its text or its id; by default the tokenizer's end-of-sequence token."""

    special_tokens: bool = False
    """Read special tokens that a text spells out (a chat's marks) as those tokens, and in prompts later on; by default
    they are plain text."""

    workers: int = 0
    """Tokenizing processes; 0: one per core."""

    max_tokens_per_shard: int = 100_000_000
    """Most tokens in one shard file (a longer document still stays whole)."""

    skip_unreadable: bool = False
    """Skip files that look like data in a format that is not read (archives, CSV, other encodings, JSON without the
    text key, ...) instead of refusing them."""

    json: bool = False
    """Print the summary as JSON."""


def run(options: Options) -> None:
    from earthshine.data.prepare import prepare

    summary = prepare(
        options.inputs,
        options.tokenizer,
        options.out,
        text_key=options.text_key,
        eod=options.eod,
        special_tokens=options.special_tokens,
        workers=options.workers or None,
        max_tokens_per_shard=options.max_tokens_per_shard,
        skip_unreadable=options.skip_unreadable,
    )
    if options.json:
        print_outcome(json_text(summary))
        return
    print_outcome(
        f"{options.out}: {human_count(summary['tokens'])} tokens, {human_count(summary['documents'])} documents, "
        f"{human_bytes(summary['bytes'])} of text"
    )
