"""A prompt has the ids that its text would have in the data of the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from earthshine.checkpoint import run_store
from earthshine.data.prepare import prepare
from earthshine.data.shards import TokenShards
from earthshine.data.tokenization import Tokenization
from earthshine.data.tokenizer import load_tokenizer
from earthshine.errors import ConfigError
from earthshine.evaluate.prompts import Prompts
from earthshine.model.presets import PRESETS
from token_documents import document_tokens

RunMaker = Callable[[Tokenization | None], Path]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Letters as tokens; `<s>` (id 1) begins a text, `</s>` (id 0) ends a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(["</s>", "<s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "tok").mkdir()
    t.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return tmp_path / "tok"


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    def make(rule: Tokenization | None) -> Path:
        tensors, config = {"model.x": torch.zeros(1)}, PRESETS["llama3_tiny"]()
        run = tmp_path / "run"
        run_store.save(run, step=1, tensors=tensors, state={}, model=config, job={}, keep=1, tokenization=rule)
        return run

    return make


@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_prompt_is_encoded_as_the_data(
    tokenizer: Path, make_run: RunMaker, tmp_path: Path, special_tokens: bool
) -> None:
    text = "<s>user: 2+2?</s>"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", workers=1, special_tokens=special_tokens)
    shards = TokenShards(tmp_path / "out")
    prompts = Prompts(make_run(shards.tokenization), tokenizer)
    ids = prompts.encode(text)
    assert document_tokens(shards, 0).tolist() == (
        ids if special_tokens else [*ids, 0]
    )  # marks that spell an end have it
    assert prompts.encode("hi")[0] == 1


def test_marks_can_be_asked_for_and_what_they_are_is_reported(
    tokenizer: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    t = load_tokenizer(tokenizer)
    run = make_run(Tokenization(tokenizer_sha256=t.sha256, eod=0, bos_ids=(1,)))
    assert 0 not in Prompts(run, tokenizer).encode("a</s>")
    assert "the prompt spells '</s>', which is text" in capsys.readouterr().err
    assert Prompts(run, tokenizer, special_tokens=True).encode("a</s>") == [1, *t.encode("a"), 0]
    assert capsys.readouterr().err == ""


def test_without_a_record_a_prompt_begins_as_the_tokenizer_says(
    tokenizer: Path, make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    t = load_tokenizer(tokenizer)
    assert Prompts(tokenizer).encode("a") == [1, *t.encode("a")]  # a Hugging Face directory
    assert capsys.readouterr().err == ""
    old = Tokenization(tokenizer_sha256=t.sha256, eod=0, boundaries="eod")
    for rule in (old, None):
        assert Prompts(make_run(rule), tokenizer).encode("a") == [1, *t.encode("a")]
        assert "do not record how texts became ids: a prompt begins with" in capsys.readouterr().err
    bare = Tokenization(tokenizer_sha256=t.sha256, eod=0)
    assert Prompts(make_run(bare), tokenizer).encode("a") == t.encode("a")


def test_another_tokenizer_than_the_runs_is_refused(
    tokenizer: Path, make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.json has the sha256 .* sha256 b{64}: .* \(--tokenizer\)"):
        Prompts(make_run(Tokenization(tokenizer_sha256="b" * 64, eod=99999)), tokenizer)
    with pytest.raises(ConfigError, match=r"run is a run, which holds none; name the one of its data \(--tokenizer\)"):
        Prompts(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    Prompts(tmp_path / "model", tokenizer)
    assert "unless the two hold the same vocabulary" in capsys.readouterr().err


def test_a_continuation_keeps_the_space_that_a_decoder_takes_off(tmp_path: Path) -> None:
    """As Llama 2: a space before every text, taken off again; and letters of several bytes, each a token."""
    ids = {"<unk>": 0, **{f"<0x{i:02X}>": 1 + i for i in range(256)}}
    for c in "\u2581abc":
        ids[c] = len(ids)
    t = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(parts)
    t.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(tmp_path)
    for whole in ("ab c ab", "ab  c", "a \u5730\u7403 b", "ab", "a\u00e9", " a", "a "):
        ids_whole = words.encode(whole)
        for n in range(len(ids_whole) + 1):
            prompt = words.decode(ids_whole[:n])
            if "\ufffd" not in prompt:
                assert prompt + words.decode_continuation(ids_whole[:n], ids_whole[n:]) == words.decode(ids_whole)
