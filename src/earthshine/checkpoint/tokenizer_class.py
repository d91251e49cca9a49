"""Which class transformers reads a tokenizer with, and how a new `model_type` keeps it.

AutoTokenizer of transformers 5 decides by `model_type`, by the class that the files declare, and by what is in
tokenizer.json: some classes take its vocabulary only and rebuild the rest, so that the same files give other ids under
another `model_type`. `AS_IT_STANDS` reads tokenizer.json as we do. The rule is that of transformers 5.23 (models/auto/
tokenization_auto.py); `verify hf` compares what the installed version makes of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from earthshine.checkpoint.tokenizer_files import TOKENIZER_CONFIG, has_tokenizer
from earthshine.config import parse_json
from earthshine.console import log
from earthshine.model.hf_families import Family

AS_IT_STANDS = "TokenizersBackend"
PORTABLE = "PreTrainedTokenizerFast"  # how versions 4 and 5 can name it
_REGISTERED: dict[str, str] = {
    "mistral": AS_IT_STANDS,
    "mixtral": AS_IT_STANDS,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
_OVERRULED = ("qwen2",)  # whose declared class transformers ignores
_REBUILD = (  # classes that rebuild a tokenizer; any other name is read as it stands
    "AlbertTokenizer",
    "BertTokenizer",
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "GemmaTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "Qwen3_5Tokenizer",
    "RobertaTokenizer",
    "T5Tokenizer",
    "XGLMTokenizer",
    "XLMRobertaTokenizer",
)


@dataclass(frozen=True)
class Reading:
    """Who reads a directory's tokenizer. `own_code` is the class of the directory's own Python file, where it has one.

    before, after: the classes under the old and the new `model_type`. declared: the class that the files named, "" for
    none; written: the one that was written in its place to keep it, "" when nothing had to be. bare: there is no
    tokenizer.json.
    """

    model_type: str
    declared: str
    before: str
    after: str
    written: str = ""
    own_code: str = ""
    bare: bool = False

    @property
    def sentence(self) -> str:
        """For the plan and the log."""
        if self.own_code:
            return f"transformers reads the tokenizer with its own code, {self.own_code}, where that is trusted"
        if self.before != self.after and self.bare:
            return (
                f"warning: transformers reads the tokenizer with {self.after}, where it took {self.before} for the "
                f"{self.model_type}: that needs a tokenizer.json, and there is none. To make one, in the folder of the "
                f"tokenizer: AutoTokenizer.from_pretrained('.').save_pretrained('.')"
            )
        if self.before != self.after:
            return (
                f"warning: transformers reads the tokenizer with {self.after}, where it took {self.before} for the "
                f"{self.model_type}: some texts may get other ids; `earthshine verify hf` shows which"
            )
        reason = f", for which tokenizer_class={self.written} was written" if self.written else ""
        return f"transformers reads the tokenizer with {self.after}, as before{reason}"


def class_of(model_type: str | None, declared: str, byte_level: bool) -> str:
    """The class that AutoTokenizer takes. byte_level: tokenizer.json has a ByteLevel part."""
    name = declared.removesuffix("Fast")
    named = name if name in _REBUILD else AS_IT_STANDS
    registered = _REGISTERED.get(model_type or "")
    if registered == "Qwen2Tokenizer" and (not declared or model_type in _OVERRULED):
        return registered
    if registered == AS_IT_STANDS or not declared:
        return AS_IT_STANDS
    return AS_IT_STANDS if named == "LlamaTokenizer" and byte_level else named


def keep_class(
    files: Mapping[str, bytes], source_type: str | None, target: Family, declared_by_config: str = ""
) -> tuple[dict[str, bytes], Reading | None]:
    """The files with the tokenizer class that `target` needs to read them as `source_type` did.

    source_type: `model_type` of the config.json beside the files; None when there is none. declared_by_config: the
    `tokenizer_class` in that config.json, which counts where the files declare none, and which is not copied.
    Returns the files, tokenizer_config.json with another class where that helps, and who reads them; None without any.
    """
    if not has_tokenizer(files):
        return dict(files), None
    settings = _settings(files)
    code = _own_code(settings)
    setting = settings.get("tokenizer_class")
    in_files = setting if isinstance(setting, str) else ""
    declared = in_files or declared_by_config
    byte_level = b'"ByteLevel"' in files.get("tokenizer.json", b"")
    before = class_of(source_type, declared, byte_level)
    for name in dict.fromkeys((in_files, before.replace(AS_IT_STANDS, PORTABLE))):
        if code or class_of(target, name, byte_level) == before:
            break
    else:
        name = in_files
    after = class_of(target, name, byte_level)
    written = name if name != in_files else ""
    bare = "tokenizer.json" not in files
    reading = Reading(source_type or "", declared, before, before if code else after, written, code, bare)
    if not written:
        return dict(files), reading
    text = json.dumps(settings | {"tokenizer_class": written}, indent=2, ensure_ascii=False) + "\n"
    return dict(files) | {TOKENIZER_CONFIG: text.encode()}, reading


def warn_of_ids_beyond(files: Mapping[str, bytes], vocab_size: int, where: object) -> None:
    """Log a warning when the tokenizer among the files has ids for which the model has no rows."""
    ids = num_ids(files.get("tokenizer.json", b""))
    if ids > vocab_size:
        log(
            f"warning: the tokenizer of {where} has {ids} ids and the model {vocab_size} rows: a text with one of the "
            f"ids from {vocab_size} on is refused. Resize the embedding (model.resize_token_embeddings({ids}) in "
            f"transformers), or remove the added tokens."
        )


def num_ids(tokenizer_json: bytes) -> int:
    """One more than the largest id of a tokenizer.json; 0 for what is not one."""
    try:
        parsed = parse_json(tokenizer_json)
        vocab = parsed["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in parsed.get("added_tokens") or ()]
        return max(ids, default=-1) + 1
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json; empty when there is none, or none that can be read (which is then copied as it is)."""
    try:
        settings = parse_json(files.get(TOKENIZER_CONFIG, b"{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _own_code(settings: dict[str, Any]) -> str:
    auto_map = settings.get("auto_map")
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    names = [name for name in (classes if isinstance(classes, list) else [classes]) if isinstance(name, str)]
    return names[-1] if names else ""
