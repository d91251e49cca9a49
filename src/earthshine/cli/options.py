"""What commands share: options, results on stdout, and the model that they load."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from earthshine.cli.arguments import Positional
from earthshine.console import log, silence
from earthshine.errors import ConfigError
from earthshine.files import to_json

ModelPath = Annotated[Path, Positional("MODEL")]
Precision = Literal["auto", "float32", "bfloat16"]


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
    """A machine-readable result; as ASCII where stdout is not UTF-8."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "").replace("_", "") == "utf8"
    return to_json(value, indent=1, ascii_only=not utf8)


def print_json(value: Any) -> None:
    """A machine-readable result, on stdout."""
    print(json_text(value))


def print_outcome(text: str) -> None:
    """The outcome of work that is finished and on the disk: failing to print it is no failure of the work."""
    try:
        print(text, flush=True)
    except OSError as e:
        silence(sys.stdout)
        log(f"warning: the outcome could not be written to stdout ({e.strerror}); the work itself is done.")


def compute_dtype(precision: Precision) -> Any:
    """The torch.dtype to compute in on the picked device; the choice is logged."""
    from earthshine.device import choose_compute_dtype, pick_device

    choice = choose_compute_dtype(precision, pick_device())
    log(f"computing in {str(choice.dtype).removeprefix('torch.')}: {choice.reason}")
    return choice.dtype


def load(path: Path, precision: Precision, trust: bool) -> Any:
    """The model of a Hugging Face directory or of a run, on the picked device."""
    from earthshine.checkpoint.load import load_model
    from earthshine.device import pick_device

    return load_model(path, device=pick_device(), compute_dtype=compute_dtype(precision), trust=trust)
