"""The command line: which commands there are, and how they fail. Imports no command until it is asked for.

Exit codes: 0 ok, 1 the run failed, 2 usage or config, 3 a check did not hold, 75 interrupted after saving.
"""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

import earthshine
from earthshine.console import log, printable_stdout, silence, surviving_stderr
from earthshine.errors import EarthshineError, nearest

COMMANDS = {
    "quickstart": "everything on a real model: upcycle, verify, train, evaluate, export, report",
    "upcycle": "turn a dense checkpoint into a Mixture-of-Experts one that computes the same function",
    "verify": "measure that a conversion or a checkpoint holds what it should (exit 3 if not)",
    "prepare": "turn text, JSON or parquet into token shards",
    "train": "run a job, or resume it: the same command does both",
    "eval": "held-out loss and bits per byte of a model",
    "generate": "continue a prompt with a model",
    "report": "one self-contained HTML page from run folders",
    "export": "turn a run or a model into a Hugging Face directory with tokenizer and model card",
    "ls": "list recipes and presets",
    "show": "print a recipe or a preset",
    "doctor": "versions, device, compute dtype and why, measured speed, disk",
}

_ABOUT = """Trains Mixture-of-Experts language models with the Muon optimizer, from scratch or upcycled from a dense
checkpoint, and proves what others assume."""
_FLAGS = ("--help", "--version", "--traceback")
_OPTIONS = {
    "-h, --help": "this page; `earthshine COMMAND --help` has a command's own",
    "--version": "print the version",
    "--traceback": "also print where an error came from",
}
_EXAMPLES = """\
  earthshine quickstart --run runs/first
  earthshine upcycle models/llama models/llama-8x --experts 8 --top-k 2
  earthshine train tiny --data data/docs --run runs/tiny"""
_OUTCOMES = """Results go to stdout, logs to stderr. Exit codes: 0 ok, 1 the run failed, 2 usage or config, 3 a check
did not hold, 75 interrupted after saving (re-run the same command to resume)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    _open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # so that a closed pipe or a full disk is met here
        return code
    except EarthshineError as e:
        return _fail(str(e), e.exit_code, show_traceback)
    except BrokenPipeError:
        silence(sys.stdout)
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was saved by this command.", 1, show_traceback)
    except OSError as e:
        return _fail(f"{e}.", 1, show_traceback)
    except Exception as e:
        what = f"{type(e).__name__}: {e}".rstrip(".")
        rerun = "report it with this traceback" if show_traceback else "re-run with --traceback and report it"
        return _fail(f"{what}. This looks like a bug in Earthshine; {rerun}.", 1, show_traceback)


def _open_streams() -> None:
    """Make the standard streams ones that can always be written to.

    A closed one (`2>&-`) becomes the null device: otherwise the next file to be opened would get its number, and what
    libraries print. A character that a stream's encoding does not have is written as its escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int, show_traceback: bool) -> int:
    with surviving_stderr():
        if show_traceback:
            traceback.print_exc()
    # What a message quotes may hold anything; indented, no part of it can pass for a line of its own.
    first, *others = message.split("\n")
    log("\n".join([f"earthshine: {first}", *(o if o[:1] in ("", " ") else f"  {o}" for o in others)]))
    try:
        sys.stdout.flush()
    except OSError:  # it may be what has failed, and would fail again at the exit
        silence(sys.stdout)
    return code


def _dispatch(args: list[str]) -> int:
    if not args:
        print(_help(), file=sys.stderr)
        return 2
    name, *rest = args
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"earthshine {earthshine.__version__}")
        return 0
    if name not in COMMANDS:
        what, known = ("option", _FLAGS) if name.startswith("-") else ("command", COMMANDS)
        return _fail(f"there is no {what} '{name}'.{nearest(name, known)} See earthshine --help.", 2, False)
    from earthshine.cli.arguments import asks_for_help, help_text, parse

    command = importlib.import_module(f"earthshine.cli.{name}")
    if asks_for_help(rest):
        print(help_text(command, name, rest))
        return 0
    if not rest and hasattr(command, "SUBCOMMANDS"):
        # Exit 2, because nothing was done: a script must not take it for success.
        print(help_text(command, name), file=sys.stderr)
        return 2
    options = parse(command, name, rest)
    with printable_stdout():
        return int(command.run(options) or 0)


def _help() -> str:
    from earthshine.cli.arguments import listed, wrapped

    return (
        f"usage: earthshine COMMAND [OPTIONS]\n\n{wrapped(_ABOUT)}\n\ncommands:\n{listed(COMMANDS)}\n\n"
        f"options:\n{listed(_OPTIONS)}\n\nexamples:\n{_EXAMPLES}\n\n{wrapped(_OUTCOMES)}"
    )


if __name__ == "__main__":
    sys.exit(main())
