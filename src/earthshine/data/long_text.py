"""A long text encoded in pieces, with the tokens that it would have as a whole. Torch-free.

`tokenizers` holds about 100 bytes per character, so a long text has to be cut. Where a cut does not matter is the
tokenizer's secret (words, runs of digits or spaces, a space put before every text), so it is asked: the text just
before a cut, the context, must end in the same tokens whether or not it continues, and the piece that ends there must
end as the context does. The next piece is encoded behind that context, whose tokens are then left out.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[Sequence[str]], list[list[int]]]

_CONTEXT_CHARS = 256
_AT_EACH_MARK = 12  # places to try after newlines, before spaces, and anywhere
_PIECES_TRIED = 6


def encode_in_pieces(text: str, limit: int, encode: Encode) -> list[NDArray[np.uint32]]:
    """The ids of a text in pieces of about `limit` characters at most; in one where no cut can be confirmed."""
    pieces: list[NDArray[np.uint32]] = []  # a Python int takes nine times the memory
    start, context_ids = 0, list[int]()
    while len(text) - start > limit:
        step = _next_piece(text, start, limit, context_ids, encode)
        if step is None:
            break
        ids, start, context_ids = step
        pieces.append(np.array(ids, dtype=np.uint32))
    last = encode([text[max(0, start - _CONTEXT_CHARS) :]])[0]
    if last[: len(context_ids)] != context_ids:  # what follows reaches back farther than the context
        return [np.array(encode([text])[0], dtype=np.uint32)]
    return [*pieces, np.array(last[len(context_ids) :], dtype=np.uint32)]


def _next_piece(
    text: str, start: int, limit: int, context_ids: list[int], encode: Encode
) -> tuple[list[int], int, list[int]] | None:
    """The piece that begins at `start`: its ids, where it ends, and the ids of the context there."""
    tried = 0
    for cut in _places(text, start, start + limit):
        context, ahead = text[max(0, cut - _CONTEXT_CHARS) : cut], text[cut : cut + _CONTEXT_CHARS]
        ids, further = encode([context, context + ahead])
        if not ids or further[: len(ids)] != ids:
            continue
        piece = encode([text[max(0, start - _CONTEXT_CHARS) : cut]])[0]
        settled = ids[len(ids) // 2 :]  # its first tokens differ where a tokenizer puts a space before a text
        if piece[: len(context_ids)] == context_ids and piece[-len(settled) :] == settled:
            return piece[len(context_ids) :], cut, ids
        tried += 1
        if tried == _PIECES_TRIED:
            break
    return None


def _places(text: str, start: int, stop: int) -> Iterator[int]:
    """Where to cut, best first: after a newline or before a space that visible characters adjoin, then anywhere."""
    return chain(
        islice(_marks(text, "\n", 1, start, stop), _AT_EACH_MARK),
        islice(_marks(text, " ", 0, start, stop), _AT_EACH_MARK),
        islice(range(stop, (start + stop) // 2, -1), _AT_EACH_MARK),
    )


def _marks(text: str, mark: str, keep: int, start: int, stop: int) -> Iterator[int]:
    """Places in the second half of text[start:stop] where a mark stands between visible characters, the last first."""
    low, at = (start + stop) // 2, stop - 1
    while (at := text.rfind(mark, low, at)) > low:
        if not text[at + 1].isspace() and not text[at - 1].isspace():
            yield at + keep
