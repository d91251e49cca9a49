"""A tiny tokenizer and shards made by hand, for the tests of data/."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter

EOD = 0


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 290 tokens with GPT-2's pre-tokenizer; `<|end|>` (id 0) ends documents."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the moon is lit by the earth, and the earth by the sun\n    return self\n"] * 20, trainer
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return folder


ShardMaker = Callable[..., Path]


@pytest.fixture
def make_shards(tmp_path: Path) -> ShardMaker:
    """make_shards(name, documents, ...) -> folder; a document is a sequence of token ids, EOD is appended."""
    return lambda name, documents, **options: write_shards(tmp_path / name, documents, **options)


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 300,
    max_tokens_per_shard: int = 1 << 20,
    tokenizer_sha256: str = "0" * 64,
    eod: int = EOD,
    num_bytes: Sequence[int] | None = None,
    **facts: object,
) -> Path:
    """num_bytes: of each document's text; three for every token when absent."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocab_size=vocab_size, max_tokens_per_shard=max_tokens_per_shard)
    tokens = np.array([t for d in documents for t in (*d, eod)])
    lengths_N = np.array([len(d) + 1 for d in documents])
    writer.add(tokens, lengths_N, 3 * (lengths_N - 1) if num_bytes is None else np.array(num_bytes))
    writer.finish(tokenizer_sha256=tokenizer_sha256, eod=eod, **facts)
    return folder


@pytest.fixture
def counting_shards(make_shards: ShardMaker) -> Path:
    """30 documents of 1 to 40 tokens over several shards; every token but EOD is unlike every other."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 41, size=30).tolist()
    ids = iter(range(1, 2000))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    return make_shards("counting", documents, vocab_size=2000, max_tokens_per_shard=97)


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("sources")
    for name, documents in (("a", 20), ("b", 5)):
        texts = [rng.integers(1, 300, size=int(n)).tolist() for n in rng.integers(1, 60, size=documents)]
        write_shards(folder / name, texts, max_tokens_per_shard=120)
    return DataConfig(sources=(SourceConfig(path=f"{folder}/a", weight=3), SourceConfig(path=f"{folder}/b", weight=1)))


TokenizerMaker = Callable[[str], Path]


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> TokenizerMaker:
    """tokenizer_of(kind) -> a folder with a small tokenizer of that kind, whose end token is `</s>`."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            KINDS[kind]().save(str(made[kind] / "tokenizer.json"))
            (made[kind] / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
        return made[kind]

    return folder_of


WORDS = "the moon is lit by the earth, and the earth by the sun.\n\n    return 12345 + self\n"
SPECIAL = ["<unk>", "<s>", "</s>"]


def _byte_level(vocab_size: int = 300, special: list[str] | None = None) -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special or [], initial_alphabet=alphabet, show_progress=False
    )
    t.train_from_iterator([WORDS] * 20, trainer)
    return t


def gpt2() -> Tokenizer:
    return _byte_level(special=["</s>"])


def llama3() -> Tokenizer:
    """Digits by three, a template that begins every text, and special tokens outside the model's vocabulary."""
    t = _byte_level(290)
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.add_special_tokens(["<s>", "</s>"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    t.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return t


def llama2() -> Tokenizer:
    """No pre-tokenizer: a space is put before the text, which is one word for BPE; unknown characters are bytes."""
    ids = {token: i for i, token in enumerate(SPECIAL)} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for c in "\u2581abcdefghijklmnopqrstuvwxyz.":
        ids[c] = len(ids)
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("\u2581", "m"),
        ("o", "n"),
        ("\u2581m", "o"),
        ("\u2581mo", "on"),
    ]
    for a, b in merges:
        ids.setdefault(a + b, len(ids))
    t = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(parts)
    t.add_special_tokens(SPECIAL)
    return t


def metaspace(scheme: str = "first") -> Tokenizer:
    t = llama2()
    t.normalizer = None  # type: ignore[assignment]
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return t


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("\u2581the", -3.0), ("\u2581moon", -4.0)]
    pieces += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz.<>/,"]
    t = Tokenizer(models.Unigram(pieces, unk_id=0))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.add_special_tokens(["<unk>", "</s>"])
    return t


def unigram_unmarked() -> Tokenizer:
    """The end token is a piece and nothing more."""
    t = unigram()
    spec = json.loads(t.to_str())
    return Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))


def word_level() -> Tokenizer:
    words = ["<unk>", "</s>", "the", "moon", "is", "lit"]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(["<unk>", "</s>"])
    return t


def word_piece() -> Tokenizer:
    words = ["[UNK]", "</s>", "the", "moon", "is", "lit", "##s", "s", "##>", "<", "##/"]
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    t.add_special_tokens(["[UNK]"])
    return t


def not_special() -> Tokenizer:
    """An end token that was added without being marked special."""
    t = _byte_level()
    t.add_tokens([AddedToken("</s>", normalized=False, special=False)])
    return t


def merged() -> Tokenizer:
    """Merges of BPE make the end token out of its letters."""
    t = _byte_level()
    spec = json.loads(t.to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for a, b in (("<", "/"), ("s", ">"), ("</", "s>")):
        vocab[a + b] = len(vocab)
        merges.append([a, b])
    spec["pre_tokenizer"]["use_regex"] = False
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens(["</s>"])
    return t


def ignoring_merges() -> Tokenizer:
    """As Llama 3's BPE: a word that is in the vocabulary is that token, whatever the merges make."""
    t = _byte_level()
    spec = json.loads(t.to_str())
    spec["model"]["vocab"]["</s>"] = len(spec["model"]["vocab"])
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"]["use_regex"] = False
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens(["</s>"])
    return t


KINDS: dict[str, Callable[[], Tokenizer]] = {
    f.__name__: f
    for f in (
        gpt2, llama3, llama2, metaspace, unigram, unigram_unmarked, word_level, word_piece, not_special, merged,
        ignoring_merges,
    )
} | {"metaspace_always": lambda: metaspace("always")}  # fmt: skip
