"""Token shards: documents as token ids on disk, written once, read by memory map. Torch-free.

A folder holds `index.json` and for each shard `shard-00000.bin` (the documents' tokens end to end, each document closed
by the end-of-document token; little-endian uint16, or uint32 for vocabularies beyond 65,536) and `shard-00000.idx`
(for each document two little-endian int64: its first token in the shard, and the UTF-8 bytes of its text). A document
is never split over shards. The index holds the size and sha256 of every file, so that nothing short or altered is read
unnoticed, and under "tokenization" how the texts became ids (`tokenization` has the rule). Without the latter, as in
older shards, a document is taken to end at each end-of-document token.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from earthshine.config import parse_json
from earthshine.data.tokenization import of_index
from earthshine.data.tokenizer import MORE_IDS_THAN_ROWS
from earthshine.errors import DataError
from earthshine.files import naming_full_disk, sha256_file, write_json

FORMAT, VERSION = "earthshine-tokens", 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_IDX = np.dtype("<i8")
_TOTALS = ("tokens", "documents", "bytes")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that holds ids 0 to vocab_size - 1."""
    return _DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


class ShardWriter:
    """Writes one folder of shards, document after document; `finish` completes it. Memory: 16 bytes per document of the
    open shard. Files are fsynced; making the folder visible is the caller's. A full disk raises DiskFullError.
    """

    def __init__(self, folder: Path, *, vocab_size: int, max_tokens_per_shard: int) -> None:
        """folder: exists and is empty. A document longer than max_tokens_per_shard gets a shard of its own."""
        self._folder = folder
        self._dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens_per_shard
        self._shards: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._tokens = self._max_token = 0
        self._idx: list[NDArray[np.int64]] = []

    def add(self, tokens: NDArray[Any], lengths_N: NDArray[np.int64], bytes_N: NDArray[np.int64]) -> None:
        """Documents end to end: their tokens, and for each the number of its tokens and of its text's bytes."""
        ends_N = np.cumsum(lengths_N)
        first, begin = 0, 0
        while first < len(lengths_N):
            fit = int(np.searchsorted(ends_N, begin + self._max_tokens - self._tokens, side="right"))
            if fit <= first and self._tokens:
                self._close()
                continue
            last = max(fit, first + 1)
            end = int(ends_N[last - 1])
            starts = ends_N[first:last] - lengths_N[first:last] - begin + self._tokens
            self._idx.append(np.stack([starts, bytes_N[first:last]], axis=1).astype(_IDX))
            self._write(np.ascontiguousarray(tokens[begin:end], dtype=self._dtype))
            first, begin = last, end

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the last shard and write index.json, which starts with `facts`; returns it."""
        self._close()
        index = {
            "format": FORMAT,
            "version": VERSION,
            **facts,
            "vocab_size": self._vocab_size,
            "dtype": self._dtype.name,
            **{key: sum(s[key] for s in self._shards) for key in _TOTALS},
            "shards": self._shards,
        }
        write_json(self._folder / "index.json", index)
        return index

    def abandon(self) -> None:
        """Close the open file, whatever is in it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, tokens: NDArray[Any]) -> None:
        path = self._folder / f"shard-{len(self._shards):05d}.bin"
        with naming_full_disk(path):
            if self._file is None:
                self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - open across calls; `abandon` closes it
            data = tokens.data.cast("B")
            self._digest.update(data)
            while data:
                data = data[self._file.write(data) :]
        self._tokens += len(tokens)
        self._max_token = max(self._max_token, int(tokens.max()))

    def _close(self) -> None:
        """Complete the open shard, if it holds anything."""
        if self._file is None:
            return
        name = f"shard-{len(self._shards):05d}"
        idx = np.concatenate(self._idx)
        with naming_full_disk(self._folder / f"{name}.bin"):
            os.fsync(self._file.fileno())
            self._file.close()
            with open(self._folder / f"{name}.idx", "xb", buffering=0) as file:
                data = idx.data.cast("B")
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
        self._shards.append(
            {
                "file": f"{name}.bin",
                "tokens": self._tokens,
                "documents": len(idx),
                "bytes": int(idx[:, 1].sum()),
                "max_token": self._max_token,
                "sha256": self._digest.hexdigest(),
                "offsets": f"{name}.idx",
                "offsets_sha256": hashlib.sha256(idx.data).hexdigest(),
            }
        )
        self._open()


class TokenShards:
    """A folder of token shards, memory-mapped: pages are read when touched and dropped when memory is wanted.

    num_documents, num_tokens (end-of-document tokens included), num_bytes (UTF-8 bytes of the texts), eod, vocab_size
    (of the tokenizer), tokenizer_sha256, tokenization (the rule by which texts became ids), index (the parsed
    index.json), fingerprint (its sha256, and so, through the hashes in it, that of all the data).
    """

    def __init__(self, path: str | Path, verify: bool = True, vocab_size: int | None = None) -> None:
        """verify: also hash every file (about a second per GB). vocab_size: a model's; ids beyond it are refused.

        Raises DataError for an incomplete folder, a file of another size or hash than the index says, or a token id
        that the model has no embedding for.
        """
        self.path = Path(path)
        self.index, self.fingerprint = read_index(self.path)
        self.num_documents = int(self.index["documents"])
        self.num_tokens = int(self.index["tokens"])
        self.num_bytes = int(self.index["bytes"])
        self.eod = int(self.index["eod"])
        self.vocab_size = int(self.index["vocab_size"])
        self.tokenizer_sha256 = str(self.index["tokenizer_sha256"])
        self.tokenization = of_index(self.index)
        self._limit = self.vocab_size if vocab_size is None else min(vocab_size, self.vocab_size)
        dtype = _DTYPES[self.index["dtype"]]
        self._shards: list[dict[str, Any]] = self.index["shards"]
        for shard in self._shards:
            _check_size(self.path / shard["file"], shard["tokens"] * dtype.itemsize)
            _check_size(self.path / shard["offsets"], shard["documents"] * 2 * _IDX.itemsize)
            if verify:
                _check_hash(self.path / shard["file"], shard["sha256"])
                _check_hash(self.path / shard["offsets"], shard["offsets_sha256"])
            if shard["max_token"] >= self._limit:
                self._refuse_token(shard, shard["max_token"])
        # Plain array views of the maps: slicing a np.memmap makes another np.memmap, ten times as slow.
        self._tokens = [np.asarray(np.memmap(self.path / s["file"], dtype=dtype, mode="r")) for s in self._shards]
        self._idx = [np.asarray(np.memmap(self.path / s["offsets"], dtype=_IDX, mode="r")) for s in self._shards]
        self._first_document = np.cumsum([0] + [s["documents"] for s in self._shards])

    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each document, its end-of-document token included, in file order: 4 bytes per document."""
        lengths = np.empty(self.num_documents, dtype=np.uint32)
        for shard, idx, first in zip(self._shards, self._idx, self._first_document.tolist(), strict=False):
            starts = idx[::2]
            counts = np.diff(starts, append=shard["tokens"])
            if starts[0] != 0 or counts.min() < 1:
                raise DataError(f"{self.path / shard['offsets']} is damaged: its offsets do not rise from 0.")
            lengths[first : first + len(starts)] = counts
        return lengths

    def lost(self) -> str:
        """What the tokenizer could not spell of the texts, in words; "" where that is nothing, or was not counted."""
        unknown, dropped = (int(self.index.get(key, 0)) for key in ("unknown_tokens", "dropped_characters"))
        words = [f"{unknown / self.num_tokens:.2%} of the tokens are unknown (<unk>)"] if unknown else []
        return ", ".join(words + ([f"{dropped:,} characters were left out as unknown (no <unk>)"] if dropped else []))

    def notes(self) -> list[str]:
        """What a user should know about the shards before they are trained or evaluated on, as lines of a log."""
        lost, notes = self.lost(), []
        if lost:
            notes.append(f"warning: {self.path}: {lost}; what was lost is not learned, and bits per byte are lossy.")
        if not self.tokenization.recorded:
            notes.append(
                f"{self.path} does not record how its texts became ids, so that a document ends at each end token "
                f"(id {self.eod}), also at one inside a text."
            )
        return notes

    def document_bytes(self, stop: int) -> int:
        """UTF-8 bytes of the texts of documents 0 to stop - 1."""
        parts = zip(self._idx, self._first_document.tolist(), strict=False)
        return sum(int(idx[1::2][: max(stop - first, 0)].sum()) for idx, first in parts)

    def read(
        self,
        document_P: NDArray[np.int64],
        start_P: NDArray[np.int64],
        stop_P: NDArray[np.int64],
        out_S: NDArray[np.int64],
    ) -> None:
        """Copy pieces of documents one after another into `out_S`; token numbers are within the document.

        Raises DataError for a token id beyond the vocabulary (data that changed after the shards were opened, or was
        opened unverified).
        """
        shard_P = np.searchsorted(self._first_document, document_P, side="right") - 1
        row_P = document_P - self._first_document[shard_P]
        at = 0
        pieces = zip(shard_P.tolist(), row_P.tolist(), start_P.tolist(), stop_P.tolist(), strict=True)
        for shard, row, start, stop in pieces:
            begin = int(self._idx[shard][2 * row])
            out_S[at : at + stop - start] = self._tokens[shard][begin + start : begin + stop]
            at += stop - start
        if int(out_S.max()) >= self._limit:
            piece = int(np.searchsorted(np.cumsum(stop_P - start_P), int(out_S.argmax()), side="right"))
            self._refuse_token(self._shards[int(shard_P[piece])], int(out_S.max()))

    def ends(
        self, start_P: NDArray[np.int64], stop_P: NDArray[np.int64], tokens_S: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of the tokens that `read` gave for these pieces are the last of a document, or of its piece."""
        if not self.tokenization.recorded:
            return tokens_S == self.eod
        ends_S = np.zeros(tokens_S.shape, dtype=np.bool_)
        ends_S[np.cumsum(stop_P - start_P) - 1] = True
        return ends_S

    def _refuse_token(self, shard: dict[str, Any], token: int) -> None:
        fix = "run prepare again with the tokenizer of the model."
        if self._limit < self.vocab_size:
            fix += (
                f" A model that is trained from scratch needs init.model.vocab_size={self.vocab_size} or more. Another "
                f"one whose own tokenizer was used has fewer rows than that has ids: {MORE_IDS_THAN_ROWS}"
            )
        raise DataError(
            f"{self.path / shard['file']} holds token id {token}, but the vocabulary has {self._limit} ids "
            f"(0 to {self._limit - 1}); {fix}"
        )


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """index.json, checked for what reading needs; and its sha256."""
    file = folder / "index.json"
    try:
        raw = file.read_bytes()
    except OSError as e:
        raise DataError(
            f"{folder} holds no readable index.json ({e.strerror}): write token shards with prepare."
        ) from e
    try:
        index = parse_json(raw)
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise DataError(
                f"{file} is of format {index['format']!r} version {index['version']!r}; this program reads {FORMAT!r} "
                f"version {VERSION}: run prepare again."
            )
        sound = index["dtype"] in _DTYPES and 0 <= index["eod"] < index["vocab_size"] and index["shards"]
        sound = sound and isinstance(index["tokenizer_sha256"], str)
        sound = sound and all(s["tokens"] > 0 and s["documents"] > 0 and s["max_token"] >= 0 for s in index["shards"])
        sound = sound and all(index[k] == sum(s[k] for s in index["shards"]) for k in _TOTALS)
        for shard in index["shards"]:
            sound = sound and all(Path(shard[k]).name == shard[k] for k in ("file", "offsets"))
            sound = sound and isinstance(shard["sha256"], str) and isinstance(shard["offsets_sha256"], str)
        of_index(index)
        sound = sound and all(isinstance(index.get(k, 0), int) for k in ("unknown_tokens", "dropped_characters"))
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{file} is not the index of token shards ({type(e).__name__}: {e}); run prepare again.") from e
    if not sound:
        raise DataError(f"{file} contradicts itself (totals, dtype or shards); run prepare again.")
    return index, hashlib.sha256(raw).hexdigest()


def _check_size(file: Path, want: int) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != want:
        have = "is missing" if size is None else f"has {size} bytes"
        raise DataError(f"{file} {have}, the index says {want}; copy it again, or run prepare again.")


def _check_hash(file: Path, want: str) -> None:
    have = sha256_file(file)
    if have != want:
        raise DataError(
            f"{file} is damaged: its sha256 is {have[:12]}..., the index says {want[:12]}...; "
            f"copy it again, or run prepare again."
        )
