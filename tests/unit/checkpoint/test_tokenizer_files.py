"""Everything of a tokenizer, of templates and of licenses travels; weights, secrets and what a link fetches do not."""

import json
from pathlib import Path

import pytest

from earthshine.checkpoint.tokenizer_files import check_token_ids, has_tokenizer
from earthshine.checkpoint.tokenizer_files import tokenizer_and_license_files as files_of
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig

TRAVELS = [
    "LICENSE",
    "LICENSES/Apache-2.0.txt",
    "License.md",
    "Llama_Use_Policy.md",
    "MODEL_LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenization_moonshot.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
STAYS = [
    ".env",
    ".git/config",
    ".tokenizer.json.swp",
    "README.md",
    "additional_chat_templates/notes.txt",
    "checkpoint-1/tokenizer.json",
    "config.json",
    "configuration_deepseek.py",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_deepseek.py",
    "optimizer.pt",
    "pytorch_model.bin",
    "scheduler.pt",
    "token",
    "tokenizer.json~",
    "tokenizer.safetensors",
    "trainer_state.json",
    "training_args.bin",
]


def fill(directory: Path, names: list[str]) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"{name}"')
    return directory


def test_what_travels_and_what_stays(tmp_path: Path) -> None:
    directory = fill(tmp_path / "model", TRAVELS + STAYS)
    assert files_of(directory) == {name: f'"{name}"'.encode() for name in TRAVELS}
    assert files_of(None) == files_of(fill(tmp_path / "empty", ["config.json"])) == {}


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoTokenizer": ["tok_kimi.KimiTokenizer", None]},
        {"AutoTokenizer": [None, "tok_kimi.KimiFast"], "AutoModel": "modeling_deepseek.Model"},
        ["tok_kimi.KimiTokenizer", None],
        {"AutoProcessor": "tok_kimi.Processor", "AutoTokenizer": "org/other--elsewhere.Tokenizer"},
    ],
)
def test_code_that_the_tokenizer_names_travels_with_what_it_imports(auto_map: object, tmp_path: Path) -> None:
    directory = fill(tmp_path, [*STAYS, "tokenizer.json", "unrelated.py", "elsewhere.py"])
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (directory / "tok_kimi.py").write_text("import json\nfrom .tools import encode\nfrom transformers import X\n")
    (directory / "tools.py").write_text("from .deeper.down import x\nfrom .tok_kimi import y  # a circle\n")
    (directory / "deeper.py").write_text("")
    code = sorted(name for name in files_of(directory) if name.endswith(".py"))
    assert code == ["deeper.py", "tok_kimi.py", "tools.py"]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    model = fill(tmp_path / "model", ["real.json"])
    (model / "tokenizer.json").symlink_to("real.json")  # within: fine
    assert files_of(model) == {"tokenizer.json": b'"real.json"'}
    (model / "innocent.bin").symlink_to(secret)  # would not be copied anyway
    files_of(model)
    (model / "LICENSE").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"LICENSE is a link to .*secret.txt, outside of the model's folder"):
        files_of(model)
    (model / "LICENSE").unlink()
    fill(tmp_path / "elsewhere", ["a.jinja"])
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"additional_chat_templates/a.jinja is a link"):
        files_of(model)


def test_the_hubs_cache_is_links(tmp_path: Path) -> None:
    repository = fill(tmp_path / "models--org--name", ["blobs/c0ffee", "refs/main"])
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/c0ffee")
    (tmp_path / "linked").symlink_to(snapshot)  # the whole folder may be a link
    assert files_of(snapshot) == files_of(tmp_path / "linked") == {"tokenizer.json": b'"blobs/c0ffee"'}
    (snapshot / "LICENSE").symlink_to("../../refs/main")
    with pytest.raises(ConfigError, match="outside of the model's folder"):
        files_of(snapshot)


def test_whether_there_is_a_vocabulary() -> None:
    for name in ("tokenizer.json", "tekken.json", "tiktoken.model", "vocab.json", "tokenizer.model"):
        assert has_tokenizer({name: b"", "LICENSE": b""})
    assert not has_tokenizer(dict.fromkeys(["LICENSE", "generation_config.json", "chat_template.jinja", "a.py"], b""))


@pytest.mark.parametrize(
    "generation, message",
    [
        ({"eos_token_id": [1, 40]}, r"eos_token_id=40 is not in the vocabulary: with vocab_size=40 ids are 0 to 39"),
        ({"pad_token_id": 41}, "pad_token_id=41"),
        ({"decoder_start_token_id": -2}, "decoder_start_token_id=-2"),
    ],
)
def test_a_generation_config_with_tokens_that_the_model_has_not(
    generation: dict[str, object], message: str, dense: ModelConfig
) -> None:
    fine = {"eos_token_id": [1, 39], "pad_token_id": -1, "bos_token_id": None, "temperature": 100}
    check_token_ids({"generation_config.json": json.dumps(fine).encode()}, dense, "model")
    with pytest.raises(ConfigError, match=f"^model/generation_config.json: {message}"):
        check_token_ids({"generation_config.json": json.dumps(generation).encode()}, dense, "model")
    with pytest.raises(ConfigError, match="is not readable JSON"):
        check_token_ids({"generation_config.json": b"{"}, dense, "model")
