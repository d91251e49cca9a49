"""Real input in small: a Llama with its tokenizer, and token shards of text, made once."""

import json
from pathlib import Path

import pytest

from earthshine.cli.main import main

TEXT = (
    "The Moon has no light of its own. Its night side, when it is a thin crescent, shows sunlight that the Earth has "
    "reflected. A cloudy Earth reflects more of it, and the ashen light is brighter then. "
)


@pytest.fixture
def run(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = int(e.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-pair tokenizer of 320 entries that names its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


@pytest.fixture(scope="session")
def dense_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """A Llama of three layers over that vocabulary, seeded, as a Hugging Face directory."""
    from earthshine.checkpoint.hf import save_model
    from earthshine.model.config import ModelConfig
    from earthshine.model.transformer import Transformer, initialize

    config = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_ids=(0,),
    )
    model = Transformer(config)
    initialize(model, seed=0)
    out = tmp_path_factory.mktemp("models") / "dense"
    save_model(model, config, out, tokenizer_dir=tokenizer_dir)
    return out


@pytest.fixture(scope="session")
def shards(tokenizer_dir, tmp_path_factory) -> Path:
    """Token shards of 30 documents, about 5,000 tokens."""
    from earthshine.data.prepare import prepare

    source = tmp_path_factory.mktemp("text")
    for i in range(30):
        (source / f"{i:02}.txt").write_text(f"Night {i}. " + TEXT * 2)
    out = tmp_path_factory.mktemp("data") / "shards"
    prepare([source], tokenizer_dir, out, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_job() -> tuple[str, ...]:
    """The recipe `tiny`, cut to four steps of 128 tokens."""
    return (
        "tiny",
        "init.model.vocab_size=320",
        "seq_len=32",
        "sequences_per_step=4",
        "sequences_per_micro_batch=2",
        "num_steps=4",
        "schedule.warmup_steps=1",
        "compute_dtype=float32",
        "checkpoint.every_steps=2",
    )
