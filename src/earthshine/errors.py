"""Every error a user can meet, and what their messages suggest: the nearest name, divisors. Standard library only.

A message names the field, the value, the rule and the fix. The command line prints the message without a
traceback (unless `--traceback`) and exits with the class's `exit_code`.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: " Did you mean 'X'?", or all choices when none is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def divisors(n: int) -> str:
    """The end of a message about a number that does not divide n: the numbers that do, "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


class EarthshineError(Exception):
    """Base of all errors that a user can act on; exit code 1 (the run failed)."""

    exit_code = 1


class ConfigError(EarthshineError, ValueError):
    """A config, an option or a command that cannot be carried out; exit code 2."""

    exit_code = 2


class UnsupportedModelError(ConfigError):
    """A `model_type` or a model feature outside the known families; exit code 2."""


class OutputExistsError(ConfigError, FileExistsError):
    """The output path exists and is not ours to resume or replace; exit code 2."""


class WeightsError(EarthshineError, ValueError):
    """A weight file that is corrupt, or a tensor that is missing, extra, misshapen or not finite; exit code 1."""


class DataError(EarthshineError, ValueError):
    """Documents, token shards or token ids that cannot be used; exit code 1."""


class CheckpointError(EarthshineError):
    """A training checkpoint that is damaged, untrusted or of another job; exit code 1."""


class DiskFullError(EarthshineError, OSError):
    """The disk filled up while writing; what was written is removed or resumable; exit code 1."""


class TrainingDivergedError(EarthshineError, ArithmeticError):
    """A loss, a gradient or a logit that is not finite; exit code 1."""


class MissingDependencyError(EarthshineError, ImportError):
    """An optional package that a command needs; names the extra to install; exit code 1."""


class CheckFailedError(EarthshineError):
    """A verification that did not hold; exit code 3."""

    exit_code = 3


class InterruptedRunError(EarthshineError):
    """SIGTERM, SIGINT or SIGHUP arrived and the run was saved: the same command resumes it; exit code 75."""

    exit_code = 75
