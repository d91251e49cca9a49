"""How texts become token ids, as a folder of shards records it and a run's checkpoints carry it. Torch-free.

One rule for data, evaluation and prompts: what a special token's spelling inside a text is, which ids begin a text,
which id ends a document, and what tells where a document ends. Shards written before the index recorded it, or by a
`ShardWriter` that was told nothing of it, keep the old rule: a document ends at each end token.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from earthshine.config import decode
from earthshine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """The rule of one folder of shards, or of a run's data.

    tokenizer_sha256: of the tokenizer.json. eod: the id that closes each document. bos_ids: what each document begins
    with. special_spellings: whether a special token's spelling inside a text is text like any other, or the token.
    boundaries: "lengths" where a document ends where its length says; "eod" (nothing was recorded) at each end token.
    """

    tokenizer_sha256: str
    eod: int
    bos_ids: tuple[int, ...] = ()
    special_spellings: Literal["text", "tokens"] = "text"
    boundaries: Literal["lengths", "eod"] = "lengths"

    @property
    def recorded(self) -> bool:
        """Whether the shards say how their texts became ids."""
        return self.boundaries == "lengths"

    def in_index(self) -> dict[str, Any]:
        """What index.json holds of it beside `tokenizer_sha256` and `eod`, which it always held."""
        record = asdict(self)
        return {key: record[key] for key in ("boundaries", "special_spellings", "bos_ids")}


def of_index(index: dict[str, Any]) -> Tokenization:
    """The rule of a parsed index.json. Raises ConfigError for a record that makes no sense."""
    known = {key: index[key] for key in ("tokenizer_sha256", "eod")}
    record = index.get("tokenization")
    if record is None:
        return Tokenization(**known, boundaries="eod")
    if not isinstance(record, dict):
        raise ConfigError(f"tokenization={record!r} must be an object.")
    rule = decode(Tokenization, known | record)
    if not all(0 <= i < index["vocab_size"] for i in rule.bos_ids):
        raise ConfigError(f"tokenization.bos_ids={list(rule.bos_ids)} are not ids of a vocabulary of that size.")
    return rule


def of_sources(rules: list[Tokenization]) -> Tokenization:
    """The rule of a mixture of sources that share a tokenizer and an end token: the first's.

    Spellings are tokens where they are in any source: who trains on chats and plain text prompts with the marks of
    chats. The sources must agree in `bos_ids` for prompts to begin as every document does; `Loader` says when not.
    """
    first = rules[0]
    spellings: Literal["text", "tokens"] = "tokens" if any(r.special_spellings == "tokens" for r in rules) else "text"
    boundaries: Literal["lengths", "eod"] = "lengths" if all(r.recorded for r in rules) else "eod"
    return Tokenization(
        tokenizer_sha256=first.tokenizer_sha256,
        eod=first.eod,
        bos_ids=first.bos_ids,
        special_spellings=spellings,
        boundaries=boundaries,
    )


def unlike(rule: Tokenization, others: list[Tokenization]) -> str:
    """How a rule differs from all the others, in words; "" where it equals one of them, or nothing was recorded."""
    others = [other for other in others if other.recorded]
    if not rule.recorded or not others:
        return ""
    differences = []
    if rule.bos_ids not in [other.bos_ids for other in others]:
        differences.append(f"its documents begin with the ids {list(rule.bos_ids)}, not {list(others[0].bos_ids)}")
    if rule.special_spellings not in [other.special_spellings for other in others]:
        differences.append(f"special tokens spelled in its texts are {rule.special_spellings}")
    return " and ".join(differences)
