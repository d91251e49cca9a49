"""Text, JSON or parquet -> token shards. Torch-free.

One process reads, cuts the input into tasks and writes; the others parse and tokenize. Processes rather than the
threads inside `tokenizers`: those parallelize encoding alone, while reading, parsing and turning its results into
arrays stay on one core. They are spawned, not forked, because a fork in a process with threads (torch's, rayon's) may
hang. Tasks do not depend on the number of workers and results are written in the order of the tasks, so neither does a
byte of the output. In memory: at most _TASKS_PER_WORKER tasks per worker with their results, about 100 bytes per
character of the piece being encoded, the offsets of one shard, the list of files, and one longest document.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthshine.console import counted, human_count, human_seconds, log, printable, progress
from earthshine.data.documents import (
    Document,
    EncodingTask,
    Skipped,
    find_files,
    make_tasks,
    refuse,
    refuse_unreadable,
    size_of,
    texts,
)
from earthshine.data.formats import recognize
from earthshine.data.long_text import encode_in_pieces
from earthshine.data.shards import ShardWriter, token_dtype
from earthshine.data.tokenization import Tokenization
from earthshine.data.tokenizer import load_tokenizer, warn_of_missing_rows
from earthshine.errors import ConfigError, DataError
from earthshine.staging import require_absent, staged_directory

_PIECE_CHARS = 1 << 20  # longest text that is encoded whole: `tokenizers` holds about 100 bytes per character
_TASKS_PER_WORKER = 3
_MIN_BYTES_PER_WORKER = 1 << 20  # below this a process costs more than it saves
_SKIPS_NAMED = 3  # of each reason
_COUNTED = ("unknown_tokens", "dropped_characters", "end_tokens_inside", "spelling_special_tokens")


@dataclass(frozen=True)
class Encoded:
    """A task's documents end to end: tokens, and for each document its number of tokens and of UTF-8 bytes."""

    input_bytes: int
    tokens: NDArray[Any]
    lengths_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]
    skipped: tuple[Skipped, ...]
    in_pieces: int  # documents longer than _PIECE_CHARS
    counts: "Counter[str]" = field(default_factory=Counter)  # of _COUNTED


class Encoder:
    """EncodingTask -> Encoded."""

    def __init__(self, tokenizer: Path, eod: str | int | None, text_key: str, special_tokens: bool = False) -> None:
        self.tokenizer = load_tokenizer(tokenizer, eod)
        self.eod = self.tokenizer.eod  # so that an unknown one is found out before anything is written
        self.special_tokens = special_tokens
        self._text_key = text_key
        self._dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, task: EncodingTask) -> Encoded:
        parts: list[NDArray[Any]] = []
        lengths: list[int] = []
        sizes: list[int] = []
        in_pieces = 0
        beginning, end = (np.array(ids, dtype=self._dtype) for ids in (self.tokenizer.bos_ids, [self.eod]))
        items = list(texts(task, self._text_key))
        skipped = [item for item in items if isinstance(item, Skipped)]
        documents = [item for item in items if isinstance(item, Document)]
        ids = self._encode([document.text for document in documents if len(document.text) <= _PIECE_CHARS])
        for document in documents:
            pieces = [next(ids)] if len(document.text) <= _PIECE_CHARS else self._encode_long(document.text)
            pieces = [piece for piece in pieces if len(piece)]
            if not pieces:  # a normalizer may leave nothing of a text
                skipped.append(Skipped(document.name, "no tokens"))
                continue
            # A text may spell its own beginning and end where special tokens are tokens: neither stands there twice.
            if not (self.special_tokens and np.array_equal(pieces[0][: len(beginning)], beginning)):
                pieces.insert(0, beginning)
            if not (self.special_tokens and pieces[-1][-1] == self.eod):
                pieces.append(end)
            parts += pieces
            lengths.append(sum(map(len, pieces)))
            sizes.append(len(document.text.encode()))
            in_pieces += len(document.text) > _PIECE_CHARS
        tokens = np.concatenate(parts) if parts else end[:0]
        return Encoded(
            task.input_bytes,
            tokens,
            np.array(lengths, dtype=np.int64),
            np.array(sizes, dtype=np.int64),
            tuple(skipped),
            in_pieces,
            self._counts([document.text for document in documents], tokens, len(lengths)),
        )

    def _counts(self, given: list[str], tokens: NDArray[Any], documents: int) -> "Counter[str]":
        """What prepare says of the texts; `_COUNTED` has the names."""
        unknown, around = self.tokenizer.unknown_id, (*self.tokenizer.bos_ids, self.eod)
        counts = {
            "unknown_tokens": 0 if unknown is None else _count(tokens, unknown) - documents * around.count(unknown),
            "dropped_characters": self.tokenizer.dropped_characters(given),
            "end_tokens_inside": _count(tokens, self.eod) - documents * around.count(self.eod),
            "spelling_special_tokens": sum(bool(self.tokenizer.spelled(text)) for text in given),
        }
        return Counter({name: counts[name] for name in _COUNTED if counts[name] > 0})

    def _encode_long(self, text: str) -> list[NDArray[Any]]:
        pieces = encode_in_pieces(text, _PIECE_CHARS, self._encode_batch)
        return [ids.astype(self._dtype) for ids in pieces]

    def _encode_batch(self, given: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(given, special=self.special_tokens)

    def _encode(self, given: list[str]) -> Iterator[NDArray[Any]]:
        """Each text's ids, encoding at most about _PIECE_CHARS at a time."""
        start = 0
        while start < len(given):
            stop, chars = start, 0
            while stop < len(given) and (stop == start or chars + len(given[stop]) <= _PIECE_CHARS):
                chars += len(given[stop])
                stop += 1
            for ids in self._encode_batch(given[start:stop]):
                yield np.array(ids, dtype=self._dtype)
            start = stop


def _count(tokens: NDArray[Any], number: int) -> int:
    return int(np.count_nonzero(tokens == number))


_encoder: Encoder | None = None  # of this process, when it is a worker


def _start_worker(stop: Connection, tokenizer: Path, eod: int, text_key: str, special_tokens: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()
    _encoder = Encoder(tokenizer, eod, text_key, special_tokens)


def _end_with_parent(stop: Connection) -> None:
    """End this worker, in the middle of a task too, when the parent closes its end of the pipe or is killed.

    A pool by itself lets running tasks finish, and its workers outlive a killed parent.
    """
    stop.poll(None)
    os._exit(1)


def _encode_task(task: EncodingTask) -> Encoded:
    if _encoder is None:
        raise RuntimeError("_encode_task runs in workers only")
    return _encoder(task)


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    text_key: str = "text",
    eod: str | int | None = None,
    special_tokens: bool = False,
    workers: int | None = None,
    max_tokens_per_shard: int = 1 << 28,
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Tokenize documents into a new folder of token shards (`shards` has the format); returns a summary.

    inputs: files and folders (`documents` says what is read from them). text_key: the key or column of the text in
    JSON and parquet. eod: see `load_tokenizer`. special_tokens: a special token's spelling inside a text becomes
    that token (chats written out with their marks); otherwise it is text like any other. A document begins with what
    the tokenizer puts before a text; the index records both, for prompts to be encoded alike. workers: processes, all
    cores when absent; the output does not depend on it. max_tokens_per_shard: a shard is closed before it exceeds this,
    unless one document does. skip_unreadable: leave out what looks like data in a form that is not read, instead of
    refusing it.

    The folder appears whole or not at all (`staging`). Raises ConfigError (inputs, tokenizer, eod), OutputExistsError,
    DataError (input that is damaged or would be left out, or no document in it), MissingDependencyError (parquet),
    DiskFullError.
    """
    out = Path(out)
    workers = _cores() if workers is None else workers
    for name, value in (("workers", workers), ("max_tokens_per_shard", max_tokens_per_shard)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if not inputs:
        raise ConfigError("inputs=[] names nothing to read; give files or folders of text, JSON or parquet.")
    require_absent(out)
    encoder = Encoder(Path(tokenizer), eod, text_key, special_tokens)
    warn_of_missing_rows(encoder.tokenizer)
    files, aside = find_files(inputs)
    total_bytes = sum(map(size_of, files))
    formats = [recognize(file, text_key) for file in files]
    if not skip_unreadable:
        refuse_unreadable(files, formats)
    tasks = make_tasks(files, text_key, formats)
    workers = min(workers, -(-total_bytes // _MIN_BYTES_PER_WORKER) or 1)
    start = time.monotonic()
    with staged_directory(out) as folder:
        writer = ShardWriter(folder, vocab_size=encoder.tokenizer.vocab_size, max_tokens_per_shard=max_tokens_per_shard)
        try:
            tally = _write_all(writer, _encode_all(tasks, encoder, text_key, workers), total_bytes, skip_unreadable)
            skipped = aside + tally.skipped
            index = _finish(writer, encoder, files, skipped, tally)
        finally:
            writer.abandon()
    seconds = time.monotonic() - start
    log(
        f"prepare: {out} has {human_count(index['tokens'])} tokens of {human_count(index['documents'])} documents in "
        f"{counted(len(index['shards']), 'shard')}, made in {human_seconds(seconds)}."
    )
    return {
        "out": str(out),
        **{key: index[key] for key in ("tokens", "documents", "bytes", "vocab_size", "eod", "dtype", *_COUNTED[:2])},
        "shards": len(index["shards"]),
        "files": len(files),
        "skipped": index["skipped"],
        "encoded_in_pieces": tally.in_pieces,
        "workers": workers,
        "seconds": seconds,
        "tokens_per_second": index["tokens"] / seconds,
    }


def _cores() -> int:
    """Cores this process may use, which a container or a job may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Tally:
    skipped: Counter[str]
    in_pieces: int
    counts: Counter[str]


def _write_all(
    writer: ShardWriter, results: Generator[Encoded, None, None], total_bytes: int, skip_unreadable: bool
) -> _Tally:
    """Write every result, showing progress in bytes of input; names the first few skips of each reason but "empty"."""
    tally = _Tally(Counter(), 0, Counter())
    tokens = documents = 0
    with contextlib.closing(results), progress("prepare", total_bytes, "B") as bar:
        for result in results:
            if not skip_unreadable:
                refuse(result.skipped)
            writer.add(result.tokens, result.lengths_N, result.bytes_N)
            for skip in result.skipped:
                tally.skipped[skip.reason] += 1
                if skip.reason != "empty" and tally.skipped[skip.reason] <= _SKIPS_NAMED:  # those are in the total
                    log(f"prepare: skipped {printable(skip.name, one_line=True)}: {skip.reason}")
            tally.in_pieces += result.in_pieces
            tally.counts.update(result.counts)
            tokens += len(result.tokens)
            documents += len(result.lengths_N)
            bar.advance(result.input_bytes, f"{human_count(tokens)} tokens, {human_count(documents)} documents")
    return tally


def _finish(
    writer: ShardWriter, encoder: Encoder, files: list[Path], skipped: Counter[str], tally: _Tally
) -> dict[str, Any]:
    counts = dict(sorted(skipped.items()))
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items())
    if tally.in_pieces:
        log(f"prepare: {tally.in_pieces} documents of more than {_PIECE_CHARS} characters were encoded in pieces.")
    if reasons:
        log(f"prepare: skipped {reasons}.")
    rule = Tokenization(
        tokenizer_sha256=encoder.tokenizer.sha256,
        eod=encoder.eod,
        bos_ids=encoder.tokenizer.bos_ids,
        special_spellings="tokens" if encoder.special_tokens else "text",
    )
    index = writer.finish(
        tokenizer_sha256=rule.tokenizer_sha256,
        eod=rule.eod,
        tokenization=rule.in_index(),
        **{name: tally.counts[name] for name in _COUNTED},
        skipped=counts,
    )
    if index["documents"] == 0:
        raise DataError(
            f"inputs hold no document: {len(files)} files were read{f' ({reasons})' if reasons else ''}; "
            f"name files with text, or the right text_key."
        )
    _log_counts(encoder, index)
    return index


def _log_counts(encoder: Encoder, index: dict[str, Any]) -> None:
    """Log what the tokens lose of the texts, and where they hold special tokens that a reader may not expect."""
    tokenizer, unknown, dropped, inside, spelling = encoder.tokenizer, *(index[name] for name in _COUNTED)
    if unknown:
        name = tokenizer.decode([tokenizer.unknown_id or 0], skip_special=False)
        log(
            f"warning: {unknown / index['tokens']:.2%} of the tokens ({unknown:,}) are the unknown token {name} (id "
            f"{tokenizer.unknown_id}): {tokenizer.path} cannot spell these texts, and bits per byte will be lossy. "
            f"Take a tokenizer made for them, or one that falls back on bytes."
        )
    if dropped:
        log(
            f"warning: {dropped:,} characters were left out: {tokenizer.path} does not know them and has no unknown "
            f"token (<unk>). Take a tokenizer made for these texts, or one that falls back on bytes."
        )
    if inside:
        spelled = f"{inside:,} tokens inside the texts are the end token (id {encoder.eod}); documents end where their "
        if encoder.special_tokens:
            log(f"prepare: {spelled}lengths say.")
        else:
            log(
                f"warning: {spelled}lengths say, but a model learns to continue after it: choose one that no text "
                f"spells (--eod)."
            )
    if spelling:
        how = "became the tokens" if encoder.special_tokens else "are text (--special-tokens makes them the tokens)"
        log(f"prepare: {spelling:,} documents spell special tokens, which {how}; prompts are encoded alike.")


def _encode_all(
    tasks: Iterator[EncodingTask], encoder: Encoder, text_key: str, workers: int
) -> Generator[Encoded, None, None]:
    """The tasks' results in the tasks' order."""
    if workers == 1:
        with _one_thread():
            yield from map(encoder, tasks)
        return
    context = multiprocessing.get_context("spawn")
    watched, alive = context.Pipe(duplex=False)  # nothing is sent: its end is the message
    pool = ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(watched, encoder.tokenizer.path, encoder.eod, text_key, encoder.special_tokens),
    )
    try:
        yield from _in_order(lambda task: pool.submit(_encode_task, task), tasks, workers * _TASKS_PER_WORKER)
    except BrokenProcessPool as e:
        raise DataError(
            f"a worker process ended unexpectedly, perhaps for lack of memory; try fewer than workers={workers}."
        ) from e
    except BaseException:
        alive.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        alive.close()
        watched.close()


def _in_order(
    submit: Callable[[EncodingTask], "Future[Encoded]"], tasks: Iterator[EncodingTask], ahead: int
) -> Generator[Encoded, None, None]:
    """Results in order, with at most `ahead` tasks under way or waiting to be written."""
    pending: deque[Future[Encoded]] = deque()
    for task in tasks:
        pending.append(submit(task))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep `tokenizers` from using every core where one worker was asked for."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
