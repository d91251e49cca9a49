"""How often a run goes through its data: from index.json alone, before anything is loaded; numpy only when asked."""

from dataclasses import dataclass
from pathlib import Path

from earthshine.data.config import DataConfig
from earthshine.errors import DataError

MANY_EPOCHS = 4.0  # up to here repeated tokens are almost worth new ones (Muennighoff et al., arXiv:2305.16264, sec. 5)


@dataclass(frozen=True)
class SourceUse:
    """A source of a run: its tokens, how often all of them are gone through, and the sha256 of its index.json."""

    path: str
    tokens: int
    epochs: float
    sha256: str


def source_uses(data: DataConfig, *, seq_len: int, sequences: int) -> tuple[SourceUse, ...]:
    """What a run of that many sequences takes of each source; () where one cannot be read, or holds no sequence."""
    from earthshine.data.packing import cut

    total = sum(s.weight for s in data.sources)
    uses = []
    for source in data.sources:
        tokens, sha256, _ = _index(source.path)
        windows, _ = cut(tokens, seq_len)
        if windows == 0:
            return ()
        uses.append(SourceUse(source.path, tokens, sequences * (source.weight / total) / windows, sha256))
    return tuple(uses)


def fingerprint(path: str) -> str:
    """The sha256 of a folder's index.json, and so of all its data; "" for no folder, or one that cannot be read."""
    return _index(path)[1] if path else ""


def vocabulary(path: str) -> int:
    """The number of token ids of a folder's shards; 0 for no folder, an unreadable one, or a number beyond any."""
    from earthshine.data.tokenizer import MAX_VOCAB_SIZE

    size = _index(path)[2] if path else 0
    return size if size <= MAX_VOCAB_SIZE else 0


def _index(path: str) -> tuple[int, str, int]:
    """Tokens, sha256 and vocabulary; 0, "" and 0 where nothing can be read: whoever trains on it says what is wrong."""
    from earthshine.data.shards import read_index

    try:
        index, sha256 = read_index(Path(path))
    except (DataError, OSError):
        return 0, "", 0
    return int(index["tokens"]), sha256, int(index["vocab_size"])
