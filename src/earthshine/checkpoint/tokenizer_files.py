"""What travels beside the weights: tokenizer, templates, generation config and licenses of a model's directory.

Never weights, optimizer state or hidden files, and no link that leads out of the model's folder.
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from earthshine.config import parse_object, read_json
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (  # patterns of names in lower case; a folder's files are named with it
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*.txt",
    "encoder.json",
    "tekken*.json",
    "tiktoken*",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "*preprocessor_config.json",
)
LICENSE_FILES = (
    "*license*",
    "*licence*",
    "notice*",
    "copying*",
    "copyright*",
    "*use_policy*",
    "*terms_of_use*",
    "attribution*",
    "eula*",
    "licenses/*",
    "third_party*",
    "third-party*",
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_FOLDERS = ("additional_chat_templates", "licenses")
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)(?:\.\w+)*\s+import|import\s+\.(\w+))", re.MULTILINE)


def tokenizer_and_license_files(directory: str | Path | None) -> dict[str, bytes]:
    """Contents of the tokenizer, generation config and license files of a directory, by name within it.

    Raises ConfigError for a file that is a link to somewhere outside of the model's folder.
    """
    if directory is None:
        return {}
    root = Path(directory)
    names = [name for name, path in _files(root) if _travels(name, path)]
    names += [name for name in _code(root) if name not in names]
    return {name: _inside(root, root / name).read_bytes() for name in sorted(names)}


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether there is any vocabulary among the files."""
    return any(is_tokenizer_file(name) and not _is_setting(name) for name in files)


def is_tokenizer_file(name: str) -> bool:
    """Whether one of the files is the tokenizer's, and no generation config or license."""
    return name != GENERATION and not _matches(name, LICENSE_FILES)


def check_token_ids(files: Mapping[str, bytes], config: ModelConfig, where: str | Path) -> None:
    """Raises ConfigError when the generation config among the files has a token without a row in the embedding."""
    if GENERATION not in files:
        return
    generation = parse_object(files[GENERATION], Path(where) / GENERATION)
    for key, value in generation.items():
        for token_id in value if isinstance(value, list) else (value,):
            if key.endswith("_token_id") and type(token_id) is int and not -1 <= token_id < config.vocab_size:
                raise ConfigError(
                    f"{Path(where) / GENERATION}: {key}={token_id} is not in the vocabulary: with vocab_size="
                    f"{config.vocab_size} ids are 0 to {config.vocab_size - 1}. Correct it, or remove the field."
                )


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """The files at the top of a directory and in the folders that matter, with their names in it."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_file():
            yield path.name, path
        elif path.name.lower() in _FOLDERS and path.is_dir():
            yield from ((f"{path.name}/{inner.name}", inner) for inner in sorted(path.iterdir()) if inner.is_file())


def _travels(name: str, path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith("~") or path.suffix.lower() in _WEIGHTS:
        return False
    return name == GENERATION or _matches(name, (*TOKENIZER_FILES, *LICENSE_FILES))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), p) and name.count("/") == p.count("/") for p in patterns)


def _is_setting(name: str) -> bool:
    """Whether a tokenizer file has no vocabulary: a template, code, or the settings of a processor."""
    return name.endswith((".jinja", ".py", "processor_config.json")) or name.startswith("chat_template")


def _code(root: Path) -> list[str]:
    """The Python files that a tokenizer or processor needs: those its `auto_map` names, and what they import."""
    wanted: list[str] = []
    for name in (TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json"):
        try:
            settings = read_json(root / name)
        except (OSError, ValueError):
            continue
        auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
        kinds = auto_map.items() if isinstance(auto_map, dict) else [("AutoTokenizer", auto_map)]
        for value in (value for kind, value in kinds if not kind.startswith(("AutoModel", "AutoConfig"))):
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "--" not in reference:  # that would be another repository's
                    wanted.append(reference.split(".")[0] + ".py")
    wanted += [name for name, path in _files(root) if path.suffix == ".py" and _travels(name, path)]
    collected: list[str] = []
    while wanted:
        name = wanted.pop()
        if name in collected or "/" in name or not (root / name).is_file():
            continue
        collected.append(name)
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        wanted += [f"{a or b}.py" for a, b in _RELATIVE_IMPORT.findall(text)]
    return collected


def _inside(root: Path, path: Path) -> Path:
    """`path`, unless it is a link out of the model's folder.

    In the cache of the Hugging Face Hub a model's folder holds `snapshots/REVISION`, whose files are links to `blobs`.
    """
    home, target = root.resolve(), path.resolve()
    if home.parent.name == "snapshots" and target.is_relative_to(home.parents[1] / "blobs"):
        return path
    if not target.is_relative_to(home):
        raise ConfigError(
            f"{path} is a link to {target}, outside of the model's folder: it would be copied into what is written. "
            f"Put the file itself in its place (cp {target} {path} --remove-destination), or remove the link."
        )
    return path
