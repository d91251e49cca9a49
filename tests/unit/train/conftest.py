"""Tiny jobs on shards made by hand, and `import whole_runs`, for the tests of train/."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train.job import CheckpointConfig, HeldoutConfig, Scratch, TrainJob

sys.path.insert(0, str(Path(__file__).parent))
VOCAB, EOD = 64, 0


@pytest.fixture(scope="session")
def micro_model() -> Callable[[bool], ModelConfig]:
    return _micro_model


def _micro_model(moe: bool = False) -> ModelConfig:
    """Two layers; with `moe` the second one has four experts."""
    experts = MoEConfig(num_experts=4, top_k=2, intermediate_size=24, layers=(1,), shared_intermediate_size=8)
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        moe=experts if moe else MoEConfig(),
    )


@pytest.fixture(scope="session")
def moonlight_model() -> ModelConfig:
    """Two layers with latent attention; the second one has six experts behind a sigmoid gate with a bias."""
    return replace(
        _micro_model(),
        num_key_value_heads=2,
        head_dim=12,
        mla=MLAConfig(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        moe=MoEConfig(
            num_experts=6,
            top_k=2,
            intermediate_size=16,
            layers=(1,),
            gate="sigmoid_bias",
            routed_scaling=1.4,
            shared_intermediate_size=16,
            shared_gated=False,
        ),
    )


def write_shards(folder: Path, *, seed: int, documents: int = 60) -> Path:
    """Documents of 1 to 40 tokens in which each token mostly follows from the one before: something to learn."""
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(2, 42, size=documents)
    tokens = (rng.integers(1, VOCAB) + np.arange(lengths_N.sum()) * 5 + rng.integers(0, 2, lengths_N.sum())) % VOCAB
    tokens[tokens == EOD] = 1
    tokens[np.cumsum(lengths_N) - 1] = EOD
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocab_size=VOCAB, max_tokens_per_shard=1 << 20)
    writer.add(tokens, lengths_N, 3 * (lengths_N - 1))
    writer.finish(tokenizer_sha256="0" * 64, eod=EOD)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "train", seed=1)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "heldout", seed=2, documents=20)


JobMaker = Callable[..., TrainJob]


@pytest.fixture
def make_job(shards: Path, heldout: Path) -> JobMaker:
    """make_job(moe=False, **changes): six steps of four sequences of 16 tokens."""

    def make(moe: bool = False, **changes: object) -> TrainJob:
        fields: dict[str, object] = {
            "name": "micro",
            "init": Scratch(model=_micro_model(moe)),
            "seq_len": 16,
            "sequences_per_step": 4,
            "sequences_per_micro_batch": 2,
            "num_steps": 6,
            "optimizer": OptimizerConfig(lr=5e-3, ns_dtype="float32"),
            "schedule": ScheduleConfig(kind="cosine", warmup_steps=2),
            "data": DataConfig(sources=(SourceConfig(path=str(shards)),)),
            "heldout": HeldoutConfig(path=str(heldout), every_steps=3, max_sequences=4),
            "compute_dtype": "float32",
            "checkpoint": CheckpointConfig(every_steps=2, keep=2),
        }
        return TrainJob(**(fields | changes))  # type: ignore[arg-type]

    return make
