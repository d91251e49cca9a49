"""A recipe's vocabulary and its token shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter
from earthshine.data.tokenizer import MAX_VOCAB_SIZE
from earthshine.recipes.tiny import tiny, tiny_moe
from earthshine.train.job import FromHuggingFace, HeldoutConfig, TrainJob
from earthshine.train.vocabulary import fit_vocabulary


def shards(folder: Path, vocab_size: int) -> str:
    """Four tokens; the size is what their index says."""
    folder.mkdir()
    writer = ShardWriter(folder, vocab_size=vocab_size, max_tokens_per_shard=100)
    writer.add(np.array([1, 2, 3, 0]), np.array([4]), np.array([3]))
    writer.finish(tokenizer_sha256="0" * 64, eod=0)
    return str(folder)


def on(job: TrainJob, *sources: str, heldout: str = "") -> TrainJob:
    data = DataConfig(sources=tuple(SourceConfig(path=path) for path in sources))
    return replace(job, data=data, heldout=HeldoutConfig(path=heldout))


@pytest.mark.parametrize(
    ("sizes", "heldout", "overrides", "size"),
    [
        ((2049,), 0, (), 2049),
        ((3000, 5000, 4000), 0, (), 5000),
        ((300,), 2050, (), 2050),
        ((300,), 2050, ("optimizer.lr=1", "init.model.rope_theta=1.0", 'init.model={"rope_theta": 1.0}'), 2050),
        ((300,), 0, (), 2048),
        ((2048,), 0, (), 2048),
        ((), 0, (), 2048),
        ((3000,), 0, ("init.model.vocab_size=2048",), 2048),
        ((3000,), 0, ('init.model={"vocab_size": 2048}',), 2048),
        ((3000,), 0, ('init={"model": {"vocab_size": 2048}}',), 2048),
        ((MAX_VOCAB_SIZE + 1,), 0, (), 2048),
    ],
)
def test_a_recipe_gets_the_rows_that_its_shards_need(
    tmp_path: Path, sizes: tuple[int, ...], heldout: int, overrides: tuple[str, ...], size: int
) -> None:
    sources = [shards(tmp_path / f"{i}", n) for i, n in enumerate(sizes)]
    job = on(tiny_moe(), *sources, heldout=shards(tmp_path / "heldout", heldout) if heldout else "")
    fitted, line = fit_vocabulary(job, overrides)
    assert fitted.init.model.vocab_size == size
    assert replace(fitted.init.model, vocab_size=2048) == job.init.model and replace(fitted, init=job.init) == job
    assert line == (
        f"init.model.vocab_size: 2048 -> {size}, the number of token ids in the shards" if size > 2048 else ""
    )


def test_weights_and_unreadable_shards_decide_nothing(tmp_path: Path) -> None:
    warm = on(replace(tiny(), init=FromHuggingFace(path="models/llama")), shards(tmp_path / "a", 3000))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.json").write_text("{}")
    for job in (warm, on(tiny(), str(tmp_path / "none"), str(tmp_path / "b"))):
        assert fit_vocabulary(job) == (job, "")
