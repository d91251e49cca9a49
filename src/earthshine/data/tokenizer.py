"""Any Hugging Face `tokenizer.json`, through the library `tokenizers`. Torch-free.

We differ from the file's own behavior: nothing is added around a text unless asked for (`bos_ids` says what the file
puts before one), and a file's truncation and padding settings are switched off, because both would silently change
documents. A text can be encoded so that the spelling of a special token in it is text (`control_tokens`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from earthshine.advice import gguf_advice, instead_of_tokenizer
from earthshine.config import read_json
from earthshine.console import log
from earthshine.data.control_tokens import control_tokens, spelling_pattern, text_backend
from earthshine.errors import ConfigError, nearest
from earthshine.files import sha256_file

MAX_VOCAB_SIZE = 1 << 24  # far beyond any vocabulary; an id near 2**32 is damage, and would cost a row of a model each

MORE_IDS_THAN_ROWS = (
    "resize the embedding (resize_token_embeddings in transformers), or remove the added tokens from the tokenizer."
)


class Tokenizer:
    """Text to token ids and back.

    path: the tokenizer.json. sha256: of that file. vocab_size: one more than the largest id.
    """

    def __init__(self, path: str | Path, eod: str | int | None = None) -> None:
        """path: a tokenizer.json, or a folder with one. eod: see `load_tokenizer`."""
        import tokenizers

        given = Path(path)
        self.path = given / "tokenizer.json" if given.is_dir() else given
        if not self.path.is_file():
            fix = instead_of_tokenizer(given)
            raise ConfigError(f"tokenizer={given} is neither a tokenizer.json nor a folder that holds one.{fix}")
        if gguf := gguf_advice(self.path):
            raise ConfigError(f"tokenizer={gguf}")
        with self._failures_named("is not a tokenizer.json that can be read"):
            self._backend = tokenizers.Tokenizer.from_file(str(self.path))
            self._backend.no_truncation()
            self._backend.no_padding()
            ids = self._backend.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ConfigError(f"tokenizer={self.path} has an empty vocabulary; give another tokenizer.json.")
        self.vocab_size = max(ids) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(
                f"tokenizer={self.path} has the token id {max(ids)}: ids must be below {MAX_VOCAB_SIZE}, because a "
                f"model has a row for each; number its vocabulary from 0."
            )
        self.sha256 = sha256_file(self.path)
        self._eod = self._declared_eod() if eod is None else self._resolve(eod, "eod")

    @property
    def eod(self) -> int:
        """The id of the end-of-document token. Raises ConfigError when the tokenizer's folder names none."""
        if self._eod is None:
            special = [t.content for t in self._backend.get_added_tokens_decoder().values() if t.special]
            raise ConfigError(
                f"eod is not known for {self.path}: no tokenizer_config.json, special_tokens_map.json or config.json "
                f"beside it names an end token. Say which token ends a document (--eod)"
                f"{'; its special tokens: ' + ', '.join(special[:12]) if special else ''}."
            )
        return self._eod

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; with `special=False` a special token's spelling is text like any other."""
        return self.encode_batch([text], special=special)[0]

    def encode_prompt(self, text: str, *, special: bool = True, bos_ids: Sequence[int] | None = None) -> list[int]:
        """Token ids of a prompt, which begins as a document does; special: see `encode`.

        bos_ids: what a document begins with, the tokenizer's own `bos_ids` when absent; not repeated where special
            tokens are tokens and the text spells them itself.
        """
        beginning = list(self.bos_ids if bos_ids is None else bos_ids)
        ids = self.encode(text, special=special)
        return ids if special and ids[: len(beginning)] == beginning else beginning + ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of each text, as `encode`."""
        backend = self._backend if special else self._text_backend
        backend.encode_special_tokens = not special
        with self._failures_named("cannot encode this text"):
            return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that the file's post-processor puts before a text; () for none."""
        last = [self._backend.id_to_token(i) or "" for i in range(max(self.vocab_size - 8, 0), self.vocab_size)]
        for text in ("a", "0", ".", *last):
            try:
                self.encode(text)
            except ConfigError:
                continue  # it cannot spell this one
            with self._failures_named("cannot encode what its template puts around a text"):
                encoding = self._backend.encode(text, add_special_tokens=True)
            added = list(encoding.special_tokens_mask)
            if 0 in added:
                return tuple(encoding.ids[: added.index(0)])
        return ()

    @cached_property
    def control(self) -> dict[int, str]:
        """Id -> spelling of the special tokens."""
        return control_tokens(self._backend, self.path.parent)

    @cached_property
    def _text_backend(self) -> Any:
        with self._failures_named("cannot be used"):
            return text_backend(self._backend, self.path, self.control, self._eod)

    @cached_property
    def _spelling(self) -> "re.Pattern[str] | None":
        return re.compile(spelling_pattern(self.control.values())) if self.control else None

    def spelled(self, text: str) -> str:
        """The first spelling of a special token in a text; "" for none."""
        match = self._spelling.search(text) if self._spelling else None
        return match.group() if match else ""

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary cannot spell."""
        import tokenizers

        model = self._backend.model
        if isinstance(model, tokenizers.models.Unigram):
            number = read_json(self.path)["model"].get("unk_id")
            return int(number) if isinstance(number, int) else None
        unknown = getattr(model, "unk_token", None)
        return None if unknown is None else model.token_to_id(unknown)

    def dropped_characters(self, texts: Iterable[str]) -> int:
        """How many characters of the texts become nothing: BPE without an unknown token leaves out what it lacks."""
        if not self._drops:
            return 0
        lost = 0
        for text in texts:
            for character in set(text):
                if character not in self._kept:
                    self._kept[character] = character.isspace() or bool(self.encode(character, special=False))
                lost += 0 if self._kept[character] else text.count(character)
        return lost

    @cached_property
    def _drops(self) -> bool:
        import tokenizers

        self._kept: dict[str, bool] = {}
        if self.unknown_id is not None or not isinstance(self._backend.model, tokenizers.models.BPE):
            return False  # the others refuse a text that they cannot spell
        return not self.encode("\U0001f70f", special=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out unless `skip_special=False`."""
        with self._failures_named("cannot decode these ids"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    @contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        """The library raises bare Exception, and panics that are no Exception at all, for a file it cannot use."""
        try:
            yield
        except BaseException as e:
            if not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):
                raise  # an interrupt, an exit
            raise ConfigError(f"tokenizer={self.path} {what}: {e}. Repair the file, or give another one.") from e

    def decode_continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """The text of new ids after those of a prompt: with the space that a decoder takes off the start of a text."""
        prompt, text = self.decode(prompt_ids), self.decode([*prompt_ids, *new_ids])
        return text[len(prompt) :] if text.startswith(prompt) else self.decode(new_ids)

    def _declared_eod(self) -> int | None:
        """The end token that the files beside the tokenizer.json name, the most specific file first."""
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
            file = self.path.with_name(name)
            if not file.is_file():
                continue
            try:
                data = read_json(file)
            except (OSError, ValueError) as e:
                raise ConfigError(f"{file} is not readable JSON: {e}.") from e
            for key in ("eos_token", "eos_token_id"):
                value: Any = data.get(key) if isinstance(data, dict) else None
                value = value.get("content") if isinstance(value, dict) else value  # an AddedToken, written out
                value = value[0] if isinstance(value, list) and value else value  # Llama 3 declares several
                if isinstance(value, str | int):
                    return self._resolve(value, f"{key} in {file}")
        return None

    def _resolve(self, token: str | int, where: str) -> int:
        """A token's spelling, or its id (a number, or digits), to an id of this vocabulary."""
        if isinstance(token, int) or token.isdecimal():
            if not 0 <= int(token) < self.vocab_size:
                raise ConfigError(f"{where}={token} is not an id of {self.path}: ids are 0 to {self.vocab_size - 1}.")
            return int(token)
        number = self._backend.token_to_id(token)
        if number is None:
            special = [t.content for t in self._backend.get_added_tokens_decoder().values()]
            raise ConfigError(f"{where}={token!r} is not a token of {self.path}.{nearest(token, special[:20])}")
        return int(number)


def warn_of_other_tokenizer(model_dir: str | Path, shards: str | Path, tokenizer_sha256: str) -> None:
    """Log a warning when token shards were made with another file than the tokenizer.json of a model's directory.

    Ids that mean something else train and evaluate without an error. It is a warning because two files can hold the
    same vocabulary; a directory without a tokenizer says nothing.
    """
    file = Path(model_dir) / "tokenizer.json"
    if file.is_file() and sha256_file(file) != tokenizer_sha256:
        log(
            f"warning: {shards} was not made with {file}: unless the two files hold the same vocabulary, "
            f"losses and weights mean nothing."
        )


def warn_of_missing_rows(tokenizer: Tokenizer) -> None:
    """Log a warning when a model in the tokenizer's folder has fewer rows than the tokenizer has ids."""
    try:
        rows = read_json(tokenizer.path.with_name("config.json"))["vocab_size"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if type(rows) is int and tokenizer.vocab_size > rows:
        log(
            f"warning: {tokenizer.path} has {tokenizer.vocab_size} ids and the config.json beside it {rows} rows: "
            f"shards with an id from {rows} on cannot be used with that model. To repair that, {MORE_IDS_THAN_ROWS}"
        )


def load_tokenizer(path: str | Path, eod: str | int | None = None) -> Tokenizer:
    """A tokenizer.json, or a folder with one.

    eod: the end-of-document token, by spelling or by id (digits are an id); when absent, the end token that
        tokenizer_config.json, special_tokens_map.json or config.json beside it names.
    Raises ConfigError when the file is missing or damaged, or the token is not in the vocabulary.
    """
    return Tokenizer(path, eod)
