"""Token shards, a document at a time."""

import numpy as np
from numpy.typing import NDArray

from earthshine.data.shards import TokenShards


def document_tokens(shards: TokenShards, i: int) -> NDArray[np.int64]:
    """The tokens of document i, its end-of-document token included."""
    length = int(shards.lengths()[i])
    tokens = np.empty(length, dtype=np.int64)
    shards.read(np.array([i]), np.array([0]), np.array([length]), tokens)
    return tokens
