"""Held-out text (a validation set): its windows in file order, and whether a run may be judged by it.

Shapes: B sequences, T = S + 1 tokens of a window of sequence length S, N documents.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from earthshine.console import log
from earthshine.data.loader import Batch, Loader, batch_of_windows, require_one_tokenizer, samples_per_epoch
from earthshine.data.packing import Packing
from earthshine.data.shards import TokenShards
from earthshine.data.tokenization import unlike
from earthshine.errors import ConfigError


class HeldOut:
    """The first `max_sequences` windows (0: all) of a folder of token shards, in file order; opened and hashed once.

    num_sequences: how many windows that is. The ragged end, too short for a window, is left out.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seq_len: int,
        max_sequences: int = 0,
        document_attention: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        """document_attention: as in training. vocab_size: the model's.

        Raises ConfigError for numbers that make no sense, DataError for shards that cannot be used or hold no window.
        """
        if seq_len < 1:
            raise ConfigError(f"seq_len={seq_len} must be at least 1.")
        if max_sequences < 0:
            raise ConfigError(f"max_sequences={max_sequences} must not be negative; 0 takes all.")
        self.seq_len, self.max_sequences, self.document_attention = seq_len, max_sequences, document_attention
        self.shards = TokenShards(path, vocab_size=vocab_size)
        num_windows, _ = samples_per_epoch(self.shards, seq_len)
        self.num_sequences = min(num_windows, max_sequences or num_windows)
        self.lengths_N = self.shards.lengths()

    def batches(self, batch: int) -> Iterator[Batch]:
        """The windows, at most `batch` at a time; the last batch may be smaller. Raises ConfigError for less than 1."""
        if batch < 1:
            raise ConfigError(f"batch={batch} must be at least 1.")
        packing = Packing(self.lengths_N, self.seq_len)
        for first in range(0, self.num_sequences, batch):
            stop = min(first + batch, self.num_sequences)
            window_BT = np.empty((stop - first, self.seq_len + 1), dtype=np.int64)
            ends_BT = np.empty(window_BT.shape, dtype=np.bool_)
            for i, row_T, end_T in zip(range(first, stop), window_BT, ends_BT, strict=True):
                document_P, start_P, stop_P = packing.pieces(i)
                self.shards.read(document_P, start_P, stop_P, row_T)
                end_T[:] = self.shards.ends(start_P, stop_P, row_T)
            sample_ids = [(0, 0, i) for i in range(first, stop)]
            yield batch_of_windows(window_BT, ends_BT, sample_ids, self.document_attention)


def check_beside_training(path: str, loader: Loader) -> str:
    """The fingerprint of shards on which a run is evaluated between steps.

    Raises DataError when they cannot be used or were prepared with another tokenizer than the training data; warns
    when they are training data, or were prepared in another way.
    """
    shards = TokenShards(path, vocab_size=loader.vocab_size)
    samples_per_epoch(shards, loader.seq_len)
    require_one_tokenizer([*loader.shards, shards])
    if shards.fingerprint in [s.fingerprint for s in loader.shards]:
        log(f"warning: heldout.path={path} is training data: its loss says nothing about other text.")
    differences = unlike(shards.tokenization, [s.tokenization for s in loader.shards])
    if differences:
        log(f"warning: heldout.path={path} was not prepared like the training data: {differences}.")
    return shards.fingerprint
