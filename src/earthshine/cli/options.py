"""Parsing of one command's options by tyro, and what commands share."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from earthshine.files import to_json

ModelPath = Annotated[Positional[Path], arg(metavar="MODEL")]
Precision = Literal["auto", "float32", "bfloat16"]

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def parse(command: ModuleType, name: str, args: Sequence[str]) -> Any:
    """The command's `Options` from its arguments. Exits with 0 after --help (its last lines: examples) or 2."""
    prog = f"earthshine {name}"
    if hasattr(command, "order_arguments"):
        args = command.order_arguments(args)
    try:
        return tyro.cli(command.Options, prog=prog, description=command.DESCRIPTION, args=list(args), config=_CONFIG)
    except SystemExit as e:
        if not e.code and {"-h", "--help"} & set(args):
            print("\nexamples:")
            for comment, line in command.EXAMPLES:
                print(f"  # {comment}\n  {line}")
        raise


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    print(to_json(value, indent=1))


def compute_dtype(precision: Precision) -> Any:
    """The torch.dtype to compute in on the picked device; the choice is logged."""
    from earthshine.console import log
    from earthshine.device import choose_compute_dtype, pick_device

    choice = choose_compute_dtype(precision, pick_device())
    log(f"computing in {str(choice.dtype).removeprefix('torch.')}: {choice.reason}")
    return choice.dtype


def load(path: Path, precision: Precision, trust: bool) -> Any:
    """The model of a Hugging Face directory or of a run, on the picked device."""
    from earthshine.checkpoint.hf import load_model
    from earthshine.device import pick_device

    return load_model(path, device=pick_device(), compute_dtype=compute_dtype(precision), trust=trust)
