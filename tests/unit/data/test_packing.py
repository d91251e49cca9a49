import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data.packing import DOCUMENTS, WINDOWS, Epoch, Packing, cut, permutation

KEY = {"seed": 7, "source": 1, "epoch": 3, "what": DOCUMENTS}
lengths = st.lists(st.integers(1, 25), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_permutation_holds_every_number_once(size: int, seed: int, source: int, epoch: int) -> None:
    order = permutation(size, seed=seed, source=source, epoch=epoch, what=WINDOWS)
    assert sorted(order.tolist()) == list(range(size))


def test_permutation_never_changes() -> None:
    """Written down, because a run resumed under another numpy must see the same order."""
    assert permutation(8, **KEY).tolist() == [3, 2, 1, 5, 7, 6, 4, 0]


@pytest.mark.parametrize("name", sorted(KEY))
def test_permutation_depends_on_each_argument(name: str) -> None:
    assert permutation(50, **KEY).tolist() != permutation(50, **{**KEY, name: KEY[name] + 1}).tolist()


def read(pieces: tuple[np.ndarray, np.ndarray, np.ndarray], stream_of: list[list[int]]) -> list[int]:
    return [t for d, a, b in zip(*(p.tolist() for p in pieces), strict=True) for t in stream_of[d][a:b]]


@settings(deadline=None, max_examples=80)
@given(lengths, st.integers(1, 12), st.integers(0, 5))
def test_every_token_of_an_epoch_is_an_input_once(sizes: list[int], seq_len: int, epoch: int) -> None:
    """Inputs of all samples + the counted ragged tail = all tokens, each exactly once; targets are one further."""
    ids = iter(range(10_000))
    documents = [[next(ids) for _ in range(n)] for n in sizes]
    one = Epoch(np.array(sizes), seq_len=seq_len, seed=1, source=0, epoch=epoch)
    order = permutation(len(sizes), seed=1, source=0, epoch=epoch, what=DOCUMENTS)
    stream = [t for d in order.tolist() for t in documents[d]]

    windows = [read(one.sample(i), documents) for i in range(one.num_samples)]
    assert all(len(w) == seq_len + 1 for w in windows)
    inputs = sorted(t for w in windows for t in w[:-1])
    tail = stream[one.num_samples * seq_len :]
    assert cut(len(stream), seq_len) == (one.num_samples, len(tail))
    assert 1 <= len(tail) <= seq_len
    assert sorted(inputs + tail) == sorted(stream)
    assert all(stream[stream.index(w[0]) :][: seq_len + 1] == w for w in windows)  # a window is whole and in order


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(1, 12))
def test_file_order_without_a_shuffle(sizes: list[int], seq_len: int) -> None:
    ids = iter(range(10_000))
    documents = [[next(ids) for _ in range(n)] for n in sizes]
    packing = Packing(np.array(sizes, dtype=np.uint32), seq_len)
    for w in range(packing.num_windows):
        assert read(packing.pieces(w), documents) == list(range(w * seq_len, w * seq_len + seq_len + 1))


def test_windows_of_one_long_document_are_shuffled() -> None:
    one = Epoch(np.array([1001]), seq_len=10, seed=0, source=0, epoch=0)
    starts = [int(one.sample(i)[1][0]) for i in range(one.num_samples)]
    assert sorted(starts) == list(range(0, 1000, 10))
    assert starts != sorted(starts)


@pytest.mark.parametrize(
    ("tokens", "windows", "left"), [(0, 0, 0), (1, 0, 1), (4, 0, 4), (5, 1, 1), (8, 1, 4), (9, 2, 1)]
)
def test_cut(tokens: int, windows: int, left: int) -> None:
    assert cut(tokens, 4) == (windows, left)
