import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.heldout import HeldOut
from earthshine.data.loader import IGNORED, Batch, Loader
from earthshine.data.shards import TokenShards
from earthshine.data.tokenization import Tokenization
from earthshine.errors import CheckpointError, ConfigError, DataError

ShardMaker = Callable[..., Path]


def loader(config: DataConfig, **options: int) -> Loader:
    return Loader(config, **{"seq_len": 16, "sequences_per_step": 3, "seed": 5, "vocab_size": 300, **options})


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Every row of the batches as plain values."""
    return [
        (sample, tokens.tolist(), targets.tolist(), documents.tolist())
        for b in batches
        for sample, tokens, targets, documents in zip(
            b.sample_ids, b.tokens_BS, b.targets_BS, b.documents_BS, strict=True
        )
    ]


def test_shapes_and_types(two_sources: DataConfig) -> None:
    b = loader(two_sources).next_step()
    assert b.tokens_BS.shape == b.targets_BS.shape == b.documents_BS.shape == (3, 16)
    assert (b.tokens_BS.dtype, b.targets_BS.dtype, b.documents_BS.dtype) == (torch.int64, torch.int64, torch.int32)
    assert all(t.is_contiguous() for t in (b.tokens_BS, b.targets_BS, b.documents_BS))


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=8), seed=st.integers(0, 2**64 - 1))
def test_order_does_not_depend_on_how_steps_are_cut(two_sources: DataConfig, cuts: list[int], seed: int) -> None:
    """One sequence a step, against steps of changing size that each resume the state of the step before."""
    state = loader(two_sources, seed=seed).state_dict()
    got: list[Batch] = []
    for size in cuts:
        part = loader(two_sources, seed=seed, sequences_per_step=size)
        part.load_state_dict(json.loads(json.dumps(state)))
        got.append(part.next_step())
        state = part.state_dict()
    one = loader(two_sources, seed=seed, sequences_per_step=1)
    assert rows(got) == rows([one.next_step() for _ in range(sum(cuts))])
    assert sum(state["taken"]) == sum(cuts)
    assert state["steps"] == len(cuts)


def test_an_epoch_gives_every_sample_once_and_the_next_another_order(two_sources: DataConfig) -> None:
    config = DataConfig(sources=two_sources.sources[:1])
    samples = loader(config).summary[0]["samples_per_epoch"]
    assert isinstance(samples, int)
    assert samples > 10
    whole = loader(config, sequences_per_step=samples)
    first, second = whole.next_step(), whole.next_step()
    assert [s for s, *_ in rows([first])] == [(0, 0, i) for i in range(samples)]
    assert [s for s, *_ in rows([second])] == [(0, 1, i) for i in range(samples)]
    assert not torch.equal(first.tokens_BS, second.tokens_BS)


def test_inputs_and_tail_of_an_epoch_are_all_its_tokens(counting_shards: Path) -> None:
    config = DataConfig(sources=(SourceConfig(path=str(counting_shards)),))
    facts = loader(config, vocab_size=2000).summary[0]
    whole = loader(config, vocab_size=2000, sequences_per_step=facts["samples_per_epoch"])
    inputs = np.concatenate([whole.next_step().tokens_BS.numpy().ravel()])
    shards = TokenShards(counting_shards)
    assert len(inputs) + facts["left_out_per_epoch"] == shards.num_tokens == facts["tokens"]
    words = inputs[inputs != 0]
    assert len(set(words.tolist())) == len(words)  # ids other than the end token, 0, are unique in these shards
    assert np.count_nonzero(inputs == 0) <= shards.num_documents


RECORD = {"boundaries": "lengths", "special_spellings": "tokens", "bos_ids": []}


@pytest.mark.parametrize("record", [RECORD, None])
def test_documents_end_where_their_lengths_say(make_shards: ShardMaker, record: dict[str, object] | None) -> None:
    """An end token inside a text (id 0) ends no document; in shards that do not record the rule it does, as ever."""
    documents = [[7, 0, 8], [5, 6], [0, 0]]
    path = make_shards("d", documents, **({"tokenization": record} if record else {}))
    (b,) = HeldOut(path, seq_len=9).batches(1)
    assert b.tokens_BS.tolist() == [[7, 0, 8, 0, 5, 6, 0, 0, 0]]
    if record:
        assert b.documents_BS.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]
        assert b.targets_BS.tolist() == [[0, 8, 0, IGNORED, 6, 0, IGNORED, 0, 0]]
    else:
        assert b.documents_BS.tolist() == [[0, 0, 1, 1, 2, 2, 2, 3, 4]]
        assert b.targets_BS.tolist() == [[0, IGNORED, 0, IGNORED, 6, 0, IGNORED, IGNORED, IGNORED]]
    config = DataConfig(sources=(SourceConfig(path=str(path)),))
    trained = loader(config, seq_len=3, sequences_per_step=3).next_step()
    for tokens, targets in zip(trained.tokens_BS.tolist(), trained.targets_BS.tolist(), strict=True):
        assert [t for i, t in enumerate(targets) if tokens[i] == 7] == [0] * (7 in tokens)
        assert [t == IGNORED for i, t in enumerate(targets) if tokens[i] == 6] == [False] * (6 in tokens)


def test_both_rules_give_the_same_batches_where_only_ends_are_end_tokens(make_shards: ShardMaker) -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(1, 300, size=int(n)).tolist() for n in rng.integers(0, 30, size=60)]
    paths = [make_shards("old", documents), make_shards("new", documents, tokenization=RECORD)]
    old, new = (loader(DataConfig(sources=(SourceConfig(path=str(p)),))) for p in paths)
    for _ in range(10):
        assert rows([old.next_step()]) == rows([new.next_step()])


def test_the_rule_of_a_run_and_what_is_reported_of_it(make_shards: ShardMaker) -> None:
    text = make_shards("text", [[1] * 40], tokenization={**RECORD, "special_spellings": "text", "bos_ids": [9]})
    chat = make_shards("chat", [[1] * 40], tokenization={**RECORD, "bos_ids": [9]}, unknown_tokens=4)
    plain, old = make_shards("plain", [[1] * 40], tokenization=RECORD), make_shards("old", [[1] * 40])

    def of(*paths: Path) -> Loader:
        return loader(DataConfig(sources=tuple(SourceConfig(path=str(p)) for p in paths)))

    both = of(text, chat)
    assert both.tokenization == Tokenization(tokenizer_sha256="0" * 64, eod=0, bos_ids=(9,), special_spellings="tokens")
    assert ["9.76% of the tokens are unknown" in w for w in both.notes()] == [True]
    assert of(text).notes() == []
    assert "begin with a beginning token and those of others do not" in of(text, plain).notes()[0]
    assert not of(text, old).tokenization.recorded
    assert "old does not record how its texts became ids" in of(text, old).notes()[0]
    assert not any(note.startswith("warning") for note in of(old).notes())


def test_sources_are_mixed_by_weight(two_sources: DataConfig) -> None:
    mixed = loader(two_sources, sequences_per_step=1)
    taken = np.zeros(2)
    for n in range(1, 81):
        taken[mixed.next_step().sample_ids[0][0]] += 1
        assert abs(taken[1] - n / 4) < 1
    assert mixed.state_dict()["taken"] == [60, 20]


def test_seed_changes_the_order(two_sources: DataConfig) -> None:
    assert not torch.equal(loader(two_sources).next_step().tokens_BS, loader(two_sources, seed=6).next_step().tokens_BS)


def test_separate_documents(make_shards: ShardMaker) -> None:
    path = str(make_shards("d", [[1, 2], [3], [4, 5, 6], [7]]))
    config = DataConfig(sources=(SourceConfig(path=path),))
    (b,) = HeldOut(path, seq_len=10).batches(4)
    assert b.tokens_BS.tolist() == [[1, 2, 0, 3, 0, 4, 5, 6, 0, 7]]
    assert b.targets_BS.tolist() == [[2, 0, IGNORED, 0, IGNORED, 5, 6, 0, IGNORED, 0]]
    assert b.documents_BS.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3]]
    assert b.num_targets == 7
    joined = Loader(
        DataConfig(sources=config.sources, document_attention=False),
        seq_len=10,
        sequences_per_step=1,
        seed=0,
        vocab_size=300,
    ).next_step()
    assert joined.num_targets == 10
    assert int(joined.documents_BS.max()) == 0
    assert torch.equal(joined.tokens_BS[0, 1:], joined.targets_BS[0, :-1])


def test_rows_of_a_batch(two_sources: DataConfig) -> None:
    b = loader(two_sources, sequences_per_step=6).next_step()
    parts = [b.rows(0, 1), b.rows(1, 4), b.rows(4, 6)]
    assert rows(parts) == rows([b])
    assert sum(p.num_targets for p in parts) == b.num_targets
    assert parts[1].tokens_BS.data_ptr() == b.tokens_BS[1].data_ptr()  # views, not copies


class TestReadingAhead:
    def test_changes_neither_the_order_nor_the_state(self, two_sources: DataConfig) -> None:
        """Over more than an epoch of each source."""
        plain, ahead = (loader(two_sources, sequences_per_step=7) for _ in range(2))
        for _ in range(20):
            ahead.read_ahead()
            ahead.read_ahead()
            assert ahead.state_dict() == plain.state_dict()
            assert rows([ahead.next_step()]) == rows([plain.next_step()])
            assert ahead.state_dict() == plain.state_dict()
        assert all(
            taken > s["samples_per_epoch"] for taken, s in zip(plain.state_dict()["taken"], plain.summary, strict=True)
        )

    def test_is_forgotten_when_a_state_is_loaded(self, two_sources: DataConfig) -> None:
        plain, ahead = loader(two_sources), loader(two_sources)
        state = plain.state_dict()
        expected = rows([plain.next_step()])
        for _ in range(3):
            ahead.next_step()
        ahead.read_ahead()
        ahead.load_state_dict(state)
        assert rows([ahead.next_step()]) == expected

    def test_what_cannot_be_read_is_left_to_the_step_that_needs_it(
        self, two_sources: DataConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ahead = loader(two_sources)
        state = ahead.state_dict()
        with monkeypatch.context() as patch:
            patch.setattr(TokenShards, "read", lambda *args: (_ for _ in ()).throw(OSError("gone")))
            ahead.read_ahead()
            assert ahead.state_dict() == state
            with pytest.raises(OSError, match="gone"):
                ahead.next_step()
        assert rows([ahead.next_step()]) == rows([loader(two_sources).next_step()])


class TestRefusals:
    def test_numbers(self, two_sources: DataConfig) -> None:
        for name, value in (("seq_len", 0), ("sequences_per_step", 0), ("seed", -1), ("seed", 2**64)):
            with pytest.raises(ConfigError, match=f"{name}={value} must"):
                loader(two_sources, **{name: value})

    def test_no_sources(self) -> None:
        with pytest.raises(ConfigError, match=r"data.sources=\[\] names no token shards"):
            loader(DataConfig())

    def test_vocabulary(self, two_sources: DataConfig) -> None:
        with pytest.raises(DataError, match="shard-00000.bin holds token id .* the vocabulary has 100 ids"):
            loader(two_sources, vocab_size=100)

    def test_too_short(self, make_shards: ShardMaker) -> None:
        path = str(make_shards("short", [[1] * 15]))
        config = DataConfig(sources=(SourceConfig(path=path),))
        with pytest.raises(DataError, match="has 16 tokens, a sample of seq_len=16 needs 17"):
            loader(config)
        with pytest.raises(DataError, match="has 16 tokens"):
            HeldOut(path, seq_len=16)

    @pytest.mark.parametrize("other", [{"tokenizer_sha256": "1" * 64}, {"eod": 1}])
    def test_two_tokenizers(self, make_shards: ShardMaker, other: dict[str, object]) -> None:
        paths = [make_shards("one", [[1] * 40]), make_shards("two", [[1] * 40], **other)]
        with pytest.raises(DataError, match="two and .*one were prepared with different tokenizers"):
            loader(DataConfig(sources=tuple(SourceConfig(path=str(p)) for p in paths)))

    def test_state_of_other_settings(self, two_sources: DataConfig) -> None:
        state = loader(two_sources).state_dict()
        with pytest.raises(CheckpointError, match="seed=6, but the loader's state was saved with seed=5"):
            loader(two_sources, seed=6).load_state_dict(state)
        with pytest.raises(CheckpointError, match="seq_len=8, but"):
            loader(two_sources, seq_len=8).load_state_dict(state)
        with pytest.raises(CheckpointError, match="has 1 sources, but the loader's state was saved with 2"):
            loader(DataConfig(sources=two_sources.sources[:1])).load_state_dict(state)
        with pytest.raises(CheckpointError, match="not one of this program's"):
            loader(two_sources).load_state_dict({"step": 1})

    def test_state_of_other_data(self, two_sources: DataConfig) -> None:
        state = loader(two_sources).state_dict()
        swapped = DataConfig(sources=two_sources.sources[::-1])
        with pytest.raises(DataError, match="holds other data than when the loader's state was saved"):
            loader(swapped).load_state_dict(state)
