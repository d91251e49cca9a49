"""Special tokens, which steer a model rather than spell text, kept out of the reach of texts. Torch-free.

The library's own `encode_special_tokens` is not enough: it leaves alone the special tokens that stand in the model's
vocabulary (Unigram, WordLevel and WordPiece find their spelling there, as does BPE that may skip its merges) and the
added tokens that are not marked special. SentencePiece never matches its control pieces in a text; what is done here
has that effect for any tokenizer.json: the tokens get a name that no text can spell, and keep their ids.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earthshine.config import read_json
from earthshine.console import log

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_PREFIXES_WITHIN = 20  # prefixes within prefixes, each a level of parentheses, that a pattern has at most
_LISTED = ("additional_special_tokens", "extra_special_tokens")


def control_tokens(backend: "Backend", folder: Path) -> dict[int, str]:
    """Id -> spelling of the tokens that are marked special, and of those that the files beside name as such."""
    contents = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for content in _named(folder / name):
            token_id = backend.token_to_id(content)
            if token_id is not None:
                contents[token_id] = content
    return {i: content for i, content in contents.items() if content}


def _named(file: Path) -> list[str]:
    """The special tokens that a file names; what cannot be read names none."""
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return []
    if not isinstance(data, dict):
        return []
    values: list[Any] = [data.get(key) for key in _NAMED]
    for key in _LISTED:
        listed = data.get(key)
        values += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
    contents = [v.get("content") if isinstance(v, dict) else v for v in values]
    return [c for c in contents if isinstance(c, str) and c]


def text_backend(backend: "Backend", file: Path, control: Mapping[int, str], eod: int | None) -> "Backend":
    """The tokenizer for which a control token's spelling is text like any other; `backend` itself where it is that.

    eod: an end token that is no control token, but a plain entry of the vocabulary that somebody chose: it is hidden
    like the others if texts can do without it. A token that cannot be hidden is logged.
    """
    hidden = dict(control)
    if eod is not None and eod not in control:
        hidden[eod] = str(backend.id_to_token(eod))
    backend.encode_special_tokens = True
    if not _within_reach(backend, hidden):
        return backend
    spec = read_json(file)
    hidden = {i: c for i, c in hidden.items() if i in control or not _is_built_upon(c, spec["model"])}
    while hidden:
        renamed = _renamed(spec, hidden)
        lost = {
            i: c for i, c in hidden.items() if renamed is None or _is_lost(renamed, c, must_stay_text=i not in control)
        }
        if renamed is not None and not lost:
            return renamed
        if any(i in control for i in lost):
            log(f"warning: {file} can spell {_listed(lost.values())} only as that token: in texts it stays what it is.")
        hidden = {i: c for i, c in hidden.items() if i not in lost}
    return backend


def _within_reach(backend: "Backend", hidden: Mapping[int, str]) -> bool:
    """Whether a text can become one of the tokens."""
    from tokenizers.models import BPE

    # Which pieces Unigram takes depends on the text around them, so being in its vocabulary is being within reach.
    if not isinstance(backend.model, BPE) and any(backend.model.token_to_id(c) is not None for c in hidden.values()):
        return True
    spelled = [backend.decode([i], skip_special_tokens=False) for i in hidden]  # an entry "Ġthe" is spelled " the"
    texts = [text for c in (*hidden.values(), *spelled) for text in (c, f"a{c}a", f"a {c} a")]
    return not {i for text in texts for i in _encoded(backend, text)}.isdisjoint(hidden)


def _encoded(backend: "Backend", text: str) -> list[int]:
    """Its ids; none where the library refuses the text for want of an unknown token."""
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except BaseException as e:  # the library raises bare Exception, and panics that are no Exception
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            return []
        raise


def _is_built_upon(content: str, model: Mapping[str, Any]) -> bool:
    """Whether a merge of BPE takes the token as a part, so that others could not be made without it."""
    return any(content in _parts(merge) for merge in model.get("merges", ()))


def _parts(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _renamed(spec: Mapping[str, Any], hidden: Mapping[int, str]) -> "Backend | None":
    """The tokenizer with other names for some tokens; None when the library would give them other ids."""
    from tokenizers import Tokenizer as Backend

    secret = secrets.token_hex(16)  # noncharacters and a number that nobody knows: no text holds it
    names = {content: f"\U0010ffff\ufdd0{secret}{i}" for i, content in hidden.items()}
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(content, content): i for content, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [m for m in model["merges"] if not _touches(_parts(m), prefix, names)]
    added = [t | {"content": names.get(t["content"], t["content"])} for t in spec.get("added_tokens") or ()]
    renamed: Backend = Backend.from_str(
        json.dumps({**spec, "model": model, "added_tokens": added, "post_processor": None})
    )
    renamed.no_truncation()
    renamed.no_padding()
    renamed.encode_special_tokens = True
    if any(renamed.token_to_id(names[content]) != i for i, content in hidden.items()):
        return None
    return renamed


def _touches(parts: tuple[str, str], prefix: str, names: Mapping[str, str]) -> bool:
    left, right = parts
    return left in names or right in names or left + right.removeprefix(prefix) in names


def _is_lost(renamed: "Backend", content: str, *, must_stay_text: bool) -> bool:
    """Whether a text loses the spelling of a hidden token: nothing is left of it, or no longer the same text."""
    ids = _encoded(renamed, content)
    if not ids or not must_stay_text:
        return not ids
    return "".join(renamed.decode(ids, skip_special_tokens=False).split()) != "".join(content.split())


def spelling_pattern(contents: Iterable[str]) -> str:
    """A regular expression for any of the spellings, the longest first.

    What they begin with in common is tried once: of a thousand `<SPECIAL_7>` side by side each would be tried at every
    `<` of a text.
    """
    return _alternatives(sorted(set(contents)), 0)


def _alternatives(contents: list[str], depth: int) -> str:
    """The pattern for sorted spellings that differ."""
    if depth == _PREFIXES_WITHIN:
        return "(?:" + "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) + ")"
    shared = commonprefix(contents)
    rests = [content[len(shared) :] for content in contents if content != shared]
    branches = [_alternatives(list(group), depth + 1) for _, group in groupby(rests, key=lambda rest: rest[0])]
    optional = "?" if len(rests) < len(contents) else ""
    return re.escape(shared) + (f"(?:{'|'.join(branches)}){optional}" if branches else "")


def _listed(contents: Iterable[str]) -> str:
    shown = [repr(c) for c in contents]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
