"""Held-out loss against a plain computation, and its standard error against known cases."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from earthshine.data import shards as shards_module
from earthshine.data.heldout import HeldOut
from earthshine.data.prepare import prepare
from earthshine.data.shards import ShardWriter, TokenShards
from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.evaluate.perplexity import bytes_per_token, heldout_loss, ratio_stderr
from earthshine.model.presets import PRESETS
from earthshine.model.training_options import CapacityConfig, TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from token_documents import document_tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    words = {f"w{i}": i for i in range(50)} | {"<eod>": 50}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eod>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))
    for d in range(6):
        (root / f"{d}.txt").write_text(" ".join(f"w{(i * i + d) % 50}" for i in range(15 + 4 * d)))
    prepare(sorted(root.glob("*.txt")), root / "tokenizer.json", root / "shards", eod="<eod>", workers=1)
    return root / "shards"


def test_equals_torch_document_by_document(shards: Path) -> None:
    """With attention inside documents and one window that holds several, each document counts as if it were alone."""
    model = Transformer(PRESETS["llama3_tiny_e8t2"]())
    initialize(model, seed=0)
    result = heldout_loss(model, shards, seq_len=20, max_sequences=0, batch=3)
    data = TokenShards(shards)
    stream = [document_tokens(data, i).astype("int64") for i in range(data.num_documents)]
    flat = torch.from_numpy(np.concatenate(stream))
    document = torch.cat([torch.full((len(d),), i) for i, d in enumerate(stream)])
    total, tokens = 0.0, 0
    for start in range(0, len(flat) - 20, 20):
        window, owner = flat[start : start + 21], document[start : start + 21]
        for d in owner[:20].unique():
            inside = (owner[:20] == d).nonzero().flatten()
            pairs = [int(i) for i in inside if owner[i + 1] == d]
            if pairs:
                logits = model(window[inside].unsqueeze(0))[0, : len(pairs)]
                total += F.cross_entropy(logits, window[[i + 1 for i in pairs]], reduction="sum").item()
                tokens += len(pairs)
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
    texts = [file.read_text() for file in sorted(shards.parent.glob("*.txt"))]
    num_bytes = tokens * sum(map(len, texts)) / sum(len(text.split()) + 1 - 1 for text in texts)  # an end, no first
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert result["bytes"] == round(num_bytes) and result["lost"] == ""
    again = sum(x * n for x, n in zip(result["sequence_losses"], result["sequence_tokens"], strict=True))
    assert again == pytest.approx(result["loss"] * tokens)


def test_bits_per_byte_of_a_text_that_cannot_be_spelled_are_marked(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "w": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w x w y " * 20)
    prepare([tmp_path / "a.txt"], tmp_path / "tokenizer.json", tmp_path / "shards", eod="</s>", workers=1)
    model = Transformer(PRESETS["llama3_tiny"]())
    initialize(model, seed=0)
    assert heldout_loss(model, tmp_path / "shards", seq_len=20)["lost"] == "49.38% of the tokens are unknown (<unk>)"


def test_attention_across_documents_is_the_plain_loss_of_the_stream(shards: Path) -> None:
    """Every token is a target then, documents' first ones too; the result says which text it is of."""
    model = Transformer(PRESETS["llama3_tiny"]()).train()
    initialize(model, seed=0)
    result = heldout_loss(model, shards, seq_len=20, max_sequences=3, document_attention=False)
    data = TokenShards(shards)
    flat = torch.from_numpy(
        np.concatenate([document_tokens(data, i) for i in range(data.num_documents)]).astype("int64")
    )
    logits = model(flat[:60].view(3, 20)).flatten(0, 1)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, flat[1:61]).item(), rel=1e-5)
    assert result["tokens"] == 60 and result["sha256"] == data.fingerprint and model.training


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 66 / 9),  # of all documents: 12 tokens, of which each document's first is no target
        ({"seq_len": 3, "max_sequences": 1}, 6 / 3),  # four tokens, the first document to its end
        ({"seq_len": 4, "max_sequences": 1}, 26 / 5),  # one token of the second document counts it whole
        ({"seq_len": 3, "max_sequences": 2}, 26 / 5),
        ({"seq_len": 7, "max_sequences": 1}, 66 / 9),
        ({"seq_len": 3, "max_sequences": 1000}, 66 / 9),
        ({"seq_len": 3, "max_sequences": 0}, 66 / 9),
        ({"document_attention": False}, 66 / 12),
        ({"seq_len": 4, "max_sequences": 1, "document_attention": False}, 26 / 7),
    ],
)
def test_bytes_per_token(limits: dict, expected: float, tmp_path: Path) -> None:
    """Documents of 4, 3 and 5 tokens, the end included, hold 2, 10 and 10 bytes per target."""
    writer = ShardWriter(tmp_path, vocab_size=16, max_tokens_per_shard=5)
    tokens = np.array([1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 0])
    writer.add(tokens, np.array([4, 3, 5]), np.array([6, 20, 40]))
    writer.finish(eod=0, tokenizer_sha256="0" * 64)
    assert bytes_per_token(HeldOut(tmp_path, **({"seq_len": 1} | limits))) == expected


def test_shards_are_opened_and_hashed_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, hashed = [], []
    read_index, sha256_file = shards_module.read_index, shards_module.sha256_file
    monkeypatch.setattr(shards_module, "read_index", lambda path: opened.append(path) or read_index(path))
    monkeypatch.setattr(shards_module, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
    model = Transformer(PRESETS["llama3_tiny"]())
    initialize(model, seed=0)
    heldout_loss(model, shards, seq_len=20, max_sequences=2)
    assert opened == [shards]
    assert hashed == ["shard-00000.bin", "shard-00000.idx"]


@pytest.mark.parametrize("name", ["llama3_tiny_e8t2", "moonlight_tiny"])
def test_evaluation_drops_nothing_and_changes_nothing(shards: Path, name: str) -> None:
    """In the middle of a step of training, with hardly any capacity: no count, no bias, no mode, no loss is another."""
    capacity = TrainingOptions(capacity=CapacityConfig(factor=0.1))
    free, tight = Transformer(PRESETS[name]()), Transformer(PRESETS[name](), training=capacity).train()
    initialize(free, seed=0)
    initialize(tight, seed=0)
    tokens_BS = torch.arange(48).view(2, 24)
    tight.losses(tokens_BS, tokens_BS.roll(-1, 1)).nll.backward()
    counts, dropped = tight.expert_counts(), tight.dropped_counts()
    assert sum(dropped.values()) > 0
    state = {key: tensor.clone() for key, tensor in tight.state_dict().items()}
    result = heldout_loss(tight, shards, seq_len=20)
    assert result == heldout_loss(free, shards, seq_len=20)
    assert tight.training and tight.dropped_counts() == dropped
    assert all(torch.equal(counts_E, counts[layer]) for layer, counts_E in tight.expert_counts().items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in tight.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 513}, "seq_len=513 must be between 1 and the model's 512 positions"),
        ({"seq_len": 0}, "seq_len=0 must be"),
        ({"seq_len": 8, "max_sequences": -1}, "max_sequences=-1"),
    ],
)
def test_windows_that_have_no_meaning(shards: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heldout_loss(Transformer(PRESETS["llama3_tiny"]()), shards, **options)


def test_stderr_of_equal_sequences_is_that_of_a_mean() -> None:
    sums, counts = [10.0, 20.0, 30.0, 60.0], [10, 10, 10, 10]
    means = torch.tensor(sums) / 10
    assert ratio_stderr(sums, counts) == pytest.approx(float(means.std() / 2))
    assert ratio_stderr([1.0], [3]) == 0
    # A sequence twice as long with the same mean is no noise.
    assert ratio_stderr([2.0, 4.0], [1, 2]) == 0


def test_a_loss_that_is_not_finite_is_not_a_result(shards: Path) -> None:
    """The first window without a number is named, whatever the batch it is in."""
    model = Transformer(replace(PRESETS["llama3_tiny"](), tie_word_embeddings=False)).train()
    initialize(model, seed=0)
    data = TokenShards(shards)
    flat = np.concatenate([document_tokens(data, i) for i in range(data.num_documents)])
    first = next(i for i in range(20, len(flat)) if flat[i] not in flat[:20])
    with torch.no_grad():
        model.embed.weight[int(flat[first])] = torch.nan
    with pytest.raises(TrainingDivergedError, match=rf"loss of sequence {first // 20 + 1} on .* is nan: the weights"):
        heldout_loss(model, shards, seq_len=20, max_sequences=0, batch=3)
    assert model.training
