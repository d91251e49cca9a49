"""`earthshine verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from earthshine.cli.arguments import Positional
from earthshine.cli.options import check_out, print_json
from earthshine.console import table
from earthshine.files import write_json

DESCRIPTION = (
    "Measure an equality that others assume, and print the difference beside its tolerance. Exit 3 if it fails."
)
EXAMPLES = (
    ("the MoE computes what the dense model computes", "earthshine verify upcycle models/llama models/llama-8x"),
    ("transformers computes the same from the directory as we do", "earthshine verify hf models/llama-8x"),
    (
        "a run's checkpoints are whole, and the last follows from the one before",
        "earthshine verify checkpoint runs/a --replay",
    ),
)


@dataclass(frozen=True)
class Upcycle:
    """Compare the logits of an upcycled model with those of its dense model, on the same tokens."""

    dense: Annotated[Path, Positional("DENSE_DIR")]
    """Hugging Face directory of the dense model."""

    moe: Annotated[Path, Positional("MOE_DIR")]
    """Directory that `earthshine upcycle` wrote."""

    tokens: int = 128
    """Tokens to compare on."""

    fp64: bool = False
    """Also compare in double precision, where only a wrong conversion differs."""

    bf16: bool = False
    """Also compare in bfloat16, with what that rounding does to the dense model alone."""

    out: Annotated[Path | None, "FILE"] = None
    """Also write the result to this JSON file, such as RUN/eval/verify-mine.json for `report`."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class HuggingFace:
    """Compare our logits with those of transformers from one directory, and its tokenizer's ids with the source's."""

    path: Annotated[Path, Positional("HF_DIR")]
    """Hugging Face directory."""

    tokens: int = 128
    """Tokens to compare on."""

    out: Annotated[Path | None, "FILE"] = None
    """Also write the result to this JSON file, such as RUN/eval/verify-mine.json for `report`."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """Check a run's checkpoints: manifest, hashes, origin, finite values; and whether a replay gives the same bits."""

    path: Annotated[Path, Positional("RUN")]
    """Run folder, or one of its checkpoints."""

    replay: bool = False
    """Also resume from the last checkpoint but one, in a copy, and require the same bits at the last."""

    trust: bool = False
    """Read checkpoints that were not made on this machine."""

    out: Annotated[Path | None, "FILE"] = None
    """Also write the result to this JSON file, such as RUN/eval/verify-mine.json for `report`."""

    json: bool = False
    """Print JSON."""


SUBCOMMANDS = {"upcycle": Upcycle, "hf": HuggingFace, "checkpoint": Checkpoint}


def run(options: Upcycle | HuggingFace | Checkpoint) -> int:
    check_out(options.out)
    result = _check(options)
    if options.out:
        write_json(options.out, result)
    if options.json:
        print_json(result)
    else:
        rows = [
            (r["name"], _number(r["measured"]), _number(r["tolerance"]), "ok" if r["ok"] else "FAILS", r["note"])
            for r in result["rows"]
        ]
        print(table(("what", "measured", "tolerance", "holds", "note"), rows))
        print("holds" if result["ok"] else "DOES NOT HOLD")
    return 0 if result["ok"] else 3


def _number(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def _check(options: Upcycle | HuggingFace | Checkpoint) -> dict[str, Any]:
    match options:
        case Upcycle():
            from earthshine.verify.upcycled import verify_upcycle

            return verify_upcycle(
                options.dense, options.moe, tokens=options.tokens, fp64=options.fp64, bf16=options.bf16
            )
        case HuggingFace():
            from earthshine.verify.huggingface import verify_huggingface

            return verify_huggingface(options.path, tokens=options.tokens)
        case Checkpoint():
            from earthshine.verify.checkpoints import verify_checkpoint

            return verify_checkpoint(options.path, replay=options.replay, trust=options.trust)
