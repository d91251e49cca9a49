"""Parsing of one command's options by tyro, and what commands share."""

import dataclasses
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from earthshine.console import log, silence
from earthshine.errors import ConfigError
from earthshine.files import expand_home, to_json

ModelPath = Annotated[Positional[Path], arg(metavar="MODEL")]
Precision = Literal["auto", "float32", "bfloat16"]

_PATHS_AS_TEXT = {"run", "job"}  # of `train`, where they may be empty or a recipe's name
_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def parse(command: ModuleType, name: str, args: Sequence[str]) -> Any:
    """The command's `Options` from its arguments. Exits with 0 after --help (its last lines: examples) or 2."""
    prog = f"earthshine {name}"
    if hasattr(command, "order_arguments"):
        args = command.order_arguments(args)
    try:
        options = tyro.cli(command.Options, prog=prog, description=command.DESCRIPTION, args=list(args), config=_CONFIG)
        return dataclasses.replace(
            options, **{f.name: _usable(f.name, getattr(options, f.name)) for f in dataclasses.fields(options)}
        )
    except SystemExit as e:
        if not e.code and {"-h", "--help"} & set(args):
            print("\nexamples:")
            for comment, line in command.EXAMPLES:
                print(f"  # {comment}\n  {line}")
        raise


def _usable(name: str, value: Any) -> Any:
    """An option's value: a path without `~`, for which shells often do not look; a text in UTF-8, or ConfigError."""
    if isinstance(value, tuple):
        return tuple(_usable(name, v) for v in value)
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    if name in _PATHS_AS_TEXT:
        return expand_home(value)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):  # bytes that Python could not decode
        try:
            return os.fsencode(value).decode()  # only because the locale is not UTF-8
        except UnicodeError as e:
            option = name.replace("_", "-")
            raise ConfigError(f"{option}={value!r} has bytes that are not UTF-8: give it in that encoding.") from e
    return value


def check_out(out: Path | None) -> None:
    """Raise ConfigError when the file of `--out` could not be written, before the work whose result goes there."""
    if out is None:
        return
    place = next(p for p in out.absolute().parents if p.exists())
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: give the name of a file.")
    try:
        with tempfile.TemporaryFile(dir=place):
            """It can be done."""
    except OSError as e:
        raise ConfigError(f"out={out} cannot be written: {e.strerror} ({place}). Choose another place.") from e


def shell_quoted(path: str | Path) -> str:
    """A path as a word to paste into a shell, and no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def json_text(value: Any) -> str:
    """A result for machines; as ASCII where stdout is not UTF-8."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "").replace("_", "") == "utf8"
    return to_json(value, indent=1, ascii_only=not utf8)


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    print(json_text(value))


def print_outcome(text: str) -> None:
    """What is left to say of work that lies finished on the disk: that it cannot be said is no failure of the work."""
    try:
        print(text, flush=True)
    except OSError as e:
        silence(sys.stdout)
        log(f"warning: the outcome could not be written to stdout ({e.strerror}); the work itself is done.")


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
