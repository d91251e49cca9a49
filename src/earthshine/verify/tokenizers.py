"""Proof that transformers reads a tokenizer under its new `model_type` as it did under the old one."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from earthshine.checkpoint.tokenizer_class import Reading
from earthshine.checkpoint.tokenizer_files import (
    TOKENIZER_CONFIG,
    has_tokenizer,
    is_tokenizer_file,
    tokenizer_and_license_files,
)
from earthshine.config import parse_object, read_json
from earthshine.console import counted, log
from earthshine.files import sha256_file
from earthshine.run_folder import UPCYCLING
from earthshine.verify.measure import TEXT, row

MAX_SPECIAL = 16  # spellings of special tokens that are tried
TEXTS = (
    TEXT,
    "Hello, world! a b",
    " ",
    "  two spaces   three\n\n\n\tand a tab ",
    "12345 3.14159 1,000,000 0x1F x=100 2nd 42",
    "na\u00efve caf\u00e9 \u6f22\u5b57 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f31d e\u0301",
)


def tokenizer_rows(path: Path) -> list[dict[str, Any]]:
    """Rows about the tokenizer of a directory; none for a directory without one.

    An upcycled directory's record says how its source was read: the same files, under that `model_type`, must give
    the same ids. Where there is no such record, what AutoTokenizer makes of them is logged when it differs from
    tokenizer.json itself, which is what training here reads. A directory's own code is not run.
    """
    files = tokenizer_and_license_files(path)
    record = _record(path)
    rows = _unchanged(path, record)
    if not has_tokenizer(files):
        return rows
    reading = _reading(record)
    if reading is not None and reading.own_code:
        log(f"{path}: its tokenizer is read by its own code, {reading.own_code}, which is not run here.")
        return rows
    try:
        after = _auto_tokenizer(path)
    except Exception as e:  # transformers raises whatever it likes
        after, failed = None, _in_words(e)
    if reading is None:
        if after is None:
            log(f"{path}: transformers cannot read the tokenizer: {failed}")
        else:
            _log_other_reading(path, after)
        return rows
    with tempfile.TemporaryDirectory() as scratch:
        try:
            before = _auto_tokenizer(_as_source(files, reading, Path(scratch)))
        except Exception as e:
            log(f"{path}: transformers cannot read the tokenizer as the source's {reading.model_type}: {_in_words(e)}")
            return rows
        if after is None:
            return [*rows, row("errors of AutoTokenizer", 1, 0, failed)]
        return [*rows, _compared(before, after)]


def _reading(record: dict[str, Any]) -> Reading | None:
    """Who read the source's tokenizer; None when the record does not say so."""
    try:
        return Reading(**record["tokenizer"])
    except (KeyError, TypeError):
        return None


def _compared(before: Any, after: Any) -> dict[str, Any]:
    texts = _texts(before)
    other = [text for text in texts if _ids(before, text) != _ids(after, text)]
    note = f"{type(before).__name__} -> {type(after).__name__}, {len(texts)} texts"
    return row("texts whose ids differ from the source's", len(other), 0, note + (f"; {other[0]!r}" if other else ""))


def _ids(tokenizer: Any, text: str) -> list[int] | str:
    """The ids of a text, or what the tokenizer raises at it."""
    try:
        return list(tokenizer.encode(text))
    except Exception as e:
        return _in_words(e)


def _texts(tokenizer: Any) -> list[str]:
    """Ordinary texts, and every special token spelled inside a text, in front of one, and twice."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    special = list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))[:MAX_SPECIAL]
    return [*TEXTS, *(text for s in special for text in (f"a{s} b", f"{s}  c", f"d {s}{s}e"))]


def _as_source(files: dict[str, bytes], reading: Reading, directory: Path) -> Path:
    """The tokenizer files as the source had them, beside a config.json of its `model_type`."""
    for name, contents in files.items():
        if is_tokenizer_file(name) and name != TOKENIZER_CONFIG:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(contents)
    settings = parse_object(files.get(TOKENIZER_CONFIG, b"{}"), TOKENIZER_CONFIG)
    settings.pop("tokenizer_class", None)
    settings |= {"tokenizer_class": reading.declared} if reading.declared else {}
    if settings:
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": reading.model_type}))
    return directory


def _auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def _log_other_reading(path: Path, theirs: Any) -> None:
    if not (path / "tokenizer.json").is_file():
        return
    from earthshine.data.tokenizer import load_tokenizer

    ours = load_tokenizer(path)
    encode: Callable[[str], list[int]] = lambda text: theirs.encode(text, add_special_tokens=False)  # noqa: E731
    other = [text for text in _texts(theirs) if list(ours.encode(text)) != encode(text)]
    if other:
        log(
            f"warning: {path}: AutoTokenizer reads the tokenizer with {type(theirs).__name__}, which gives other ids "
            f"than tokenizer.json itself, with which training here works, such as for {other[0][:40]!r}."
        )


def _record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path / UPCYCLING)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _unchanged(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the tokenizer's files are those that the record lists."""
    listed = record.get("files")
    if not isinstance(listed, dict):
        return []
    names = [name for name in listed if is_tokenizer_file(name) and not name.endswith((".safetensors", ".index.json"))]
    names = [name for name in names if name != "config.json"]
    wanted = {name: listed[name].get("sha256") if isinstance(listed[name], dict) else None for name in names}
    other = [n for n in names if not (path / n).is_file() or sha256_file(path / n) != wanted[n]]
    if not names:
        return []
    return [
        row(
            "tokenizer files that differ from their record",
            len(other),
            0,
            ", ".join(other) or counted(len(names), "file"),
        )
    ]


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
