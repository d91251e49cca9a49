"""The order of samples: a pure function of (seed, source, epoch, index), packing included.

An epoch of a source is one stream: its documents in an order shuffled by (seed, source, epoch), end to end. Window w is
the seq_len + 1 tokens from w * seq_len on (the last token of one window is the first of the next: a target here, an
input there), and sample i of the epoch is the window that a second shuffle puts in place i, without which one long
document would fill whole batches. The ragged end, too short for a window, is left out and counted.

Shuffles sort raw Philox words: numpy promises that a bit generator's raw words never change between versions, and
promises no such thing of `Generator.permutation`.

Shapes: N documents of a source, M windows of an epoch, P pieces of documents in a window.
"""

import numpy as np
from numpy.typing import NDArray

DOCUMENTS, WINDOWS = 0, 1  # which of an epoch's two shuffles


def permutation(size: int, *, seed: int, source: int, epoch: int, what: int) -> NDArray[np.int64]:
    """A shuffle of range(size), keyed by its arguments; 16 bytes per element while it is made, 8 after."""
    key = np.array([seed, (source << 32) | epoch], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[0, 0, 0, what]).random_raw(size)
    return np.argsort(words, kind="stable")


def cut(num_tokens: int, seq_len: int) -> tuple[int, int]:
    """How a stream is cut: its whole windows, and the tokens at its end that are no window's input.

    The first of the tokens left out is still the last window's last target.
    """
    num_windows = max(num_tokens - 1, 0) // seq_len
    return num_windows, num_tokens - num_windows * seq_len


class Packing:
    """Documents laid end to end and cut into windows.

    Holds the order and the cumulative lengths of the documents: 16 bytes per document, none per token.
    num_windows: see `cut`.
    """

    def __init__(self, lengths_N: NDArray[np.integer], seq_len: int, order_N: NDArray[np.int64] | None = None) -> None:
        """lengths_N: tokens of each document. order_N: the documents' order in the stream; file order when absent."""
        self._lengths_N = lengths_N
        self._order_N = order_N
        self._ends_N = np.cumsum(lengths_N if order_N is None else lengths_N[order_N], dtype=np.int64)
        self._seq_len = seq_len
        self.num_windows, _ = cut(int(self._ends_N[-1]) if len(self._ends_N) else 0, seq_len)

    def pieces(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What window `window` is made of: documents [P], and of each the tokens from start [P] to stop [P]."""
        begin = window * self._seq_len
        end = begin + self._seq_len + 1
        first = int(np.searchsorted(self._ends_N, begin, side="right"))
        last = int(np.searchsorted(self._ends_N, end, side="left"))
        place_P = np.arange(first, last + 1)
        document_P = place_P if self._order_N is None else self._order_N[place_P]
        length_P = self._lengths_N[document_P].astype(np.int64)
        document_begin_P = self._ends_N[first : last + 1] - length_P
        return document_P, np.maximum(begin - document_begin_P, 0), np.minimum(end - document_begin_P, length_P)


class Epoch:
    """One epoch of one source: `sample(i)` says what sample i is made of, 0 <= i < num_samples.

    Holds one number per document and window more than `Packing`: 24 bytes per document and 8 per sample in total.
    """

    def __init__(self, lengths_N: NDArray[np.integer], *, seq_len: int, seed: int, source: int, epoch: int) -> None:
        order_N = permutation(len(lengths_N), seed=seed, source=source, epoch=epoch, what=DOCUMENTS)
        self._packing = Packing(lengths_N, seq_len, order_N)
        self.num_samples = self._packing.num_windows
        self._window_M = permutation(self.num_samples, seed=seed, source=source, epoch=epoch, what=WINDOWS)

    def sample(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The pieces of sample `index`, as `Packing.pieces`."""
        return self._packing.pieces(int(self._window_M[index]))
