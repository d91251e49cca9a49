"""`verify hf` compares what AutoTokenizer makes of the files with what it made of the source's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from earthshine.checkpoint.hf import save_model
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle
from earthshine.verify.tokenizers import tokenizer_rows

pytest.importorskip("transformers", reason="transformers is not installed")
Maker = Callable[..., Path]


@pytest.fixture
def upcycled(tmp_path: Path) -> Maker:
    """A tiny Llama with pieces, as Llama 2 has them, and what becomes of it: some layers give a Qwen2-MoE."""

    def make(layers: tuple[int, ...] = (1,), **settings: object) -> Path:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(["The Moon has no light of its own. Hello, world! a b c"] * 20, trainer)
        model = Transformer(PRESETS["llama3_tiny"]())
        initialize(model, seed=0)
        save_model(model, model.config, tmp_path / "dense")
        tokenizer.save(str(tmp_path / "dense" / "tokenizer.json"))
        if settings:
            (tmp_path / "dense" / "tokenizer_config.json").write_text(json.dumps(settings))
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(experts=2, layers=layers))
        return tmp_path / "moe"

    return make


def test_the_class_that_was_written_keeps_the_ids_and_without_it_they_differ(upcycled: Maker) -> None:
    moe = upcycled()
    unchanged, ids = tokenizer_rows(moe)
    assert unchanged["ok"] and ids["ok"] and ids["name"] == "texts whose ids differ from the source's"
    assert ids["note"].startswith("TokenizersBackend -> TokenizersBackend")
    (moe / "tokenizer_config.json").unlink()
    unchanged, ids = tokenizer_rows(moe)
    assert not unchanged["ok"] and not ids["ok"] and "TokenizersBackend -> Qwen2Tokenizer" in ids["note"]


def test_a_class_that_no_mixtral_can_name_is_measured(upcycled: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    moe = upcycled((), tokenizer_class="LlamaTokenizer", legacy=True)
    assert "warning: transformers reads the tokenizer with TokenizersBackend, where it took" in capsys.readouterr().err
    _, ids = tokenizer_rows(moe)
    assert not ids["ok"] and "LlamaTokenizer -> TokenizersBackend" in ids["note"]


def test_another_tokenizer_file_is_noticed(upcycled: Maker) -> None:
    moe = upcycled()
    file = moe / "tokenizer.json"
    file.write_text(file.read_text().replace('"Moon"', '"Sun"') + " ")
    assert [r["ok"] for r in tokenizer_rows(moe)] == [False, True]


def test_what_autotokenizer_raises_does_not_hold(upcycled: Maker) -> None:
    moe = upcycled()
    (moe / "config.json").write_text('{"model_type": "qwen2_moe", "vocab_size": "many"}')
    rows = tokenizer_rows(moe)
    assert [r["name"] for r in rows][1:] == ["errors of AutoTokenizer"] and not rows[1]["ok"]


def test_a_tokenizer_that_raises_at_a_text_is_compared_by_its_words(upcycled: Maker) -> None:
    """CodeLlama's raises at a second spelling of its fill token."""
    unchanged, ids = tokenizer_rows(upcycled(tokenizer_class="CodeLlamaTokenizer"))
    assert unchanged["ok"] and ids["ok"] and "CodeLlamaTokenizer -> CodeLlamaTokenizer" in ids["note"]


@pytest.mark.parametrize(
    "change, holds",
    [
        ({"tokenizer": {"read_by": "x"}}, [True]),
        ({"tokenizer": None}, [True]),
        ({"files": []}, [True]),
        ({"files": {"tokenizer.json": 3}}, [False, True]),
    ],
)
def test_a_manifest_of_another_shape(upcycled: Maker, change: dict[str, object], holds: list[bool]) -> None:
    moe = upcycled()
    manifest = json.loads((moe / "earthshine.json").read_text()) | change
    (moe / "earthshine.json").write_text(json.dumps(manifest))
    assert [r["ok"] for r in tokenizer_rows(moe)] == holds


def test_without_a_record_another_reading_is_logged(upcycled: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    moe = upcycled()
    (moe / "earthshine.json").unlink()
    assert tokenizer_rows(moe) == [] and capsys.readouterr().err.count("other ids than tokenizer.json itself") == 0
    (moe / "tokenizer_config.json").unlink()
    assert tokenizer_rows(moe) == []
    assert "AutoTokenizer reads the tokenizer with Qwen2Tokenizer, which gives other ids" in capsys.readouterr().err
