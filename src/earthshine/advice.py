"""Advice for a path that holds no model, no tokenizer or no weights. Standard library only."""

import re
from pathlib import Path

_INDEX = "model.safetensors.index.json"
_OLDER_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def instead_of_model(path: Path) -> str:
    """A whole message about a path that is not the directory of a model: what it is, and what to give instead."""
    gguf = path if path.is_file() else next(iter(sorted(path.glob("*.gguf"))), None)
    if gguf is not None and (advice := gguf_advice(gguf)):
        return advice
    if path.is_file():
        return f"{path} is a file: give the directory of a model, with its config.json and weights."
    if path.is_dir():
        snapshots = sorted((path / "snapshots").glob("*/config.json"))
        if snapshots:
            return (
                f"{path} is a cache of the Hugging Face Hub: give the model's directory in it, {snapshots[-1].parent}."
            )
        return f"{path} has no config.json: give the directory of a model, with its config.json and weights."
    config = path / "config.json"
    return f"{config} does not exist: the directory of a model is needed, with its weights.{hub_advice(path)}"


def hub_advice(path: Path) -> str:
    """How to fetch a model from the Hub if the missing path looks like a name there, after a space; else ""."""
    if path.exists() or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path)):
        return ""
    return f" If it is a name on the Hugging Face Hub: hf download {path} --local-dir models/{path.name}"


def instead_of_tokenizer(path: Path) -> str:
    """How to get a tokenizer.json where there is none, after a space; "" where nothing is known."""
    older = [name for name in _OLDER_VOCABULARIES if (path / name).is_file()]
    # Without either of these files AutoTokenizer cannot tell which class reads the vocabulary.
    has_config = any((path / name).is_file() for name in ("config.json", "tokenizer_config.json"))
    if not (older and has_config):
        return hub_advice(path)
    code = f"A.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    return (
        f" It holds {older[0]}: make a tokenizer.json from it, with "
        f'python -c "from transformers import AutoTokenizer as A; {code}"'
    )


def gguf_advice(path: Path) -> str:
    """What to do with a GGUF file; "" for anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return ""
    if path.suffix != ".gguf" and magic != b"GGUF":
        return ""
    out = path.with_suffix("") if path.suffix else path.with_name(path.name + "-hf")
    code = f"from earthshine.checkpoint.gguf import convert_gguf; convert_gguf({str(path)!r}, {str(out)!r})"
    return f'{path} is a GGUF file: convert it to a Hugging Face directory first, with python -c "{code}".'


def instead_of_weights(directory: Path) -> str:
    """The end of a message about missing weights: what is there instead, and what to do."""
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if any(re.fullmatch(r".*-of-\d+\.safetensors", name) for name in shards):
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        return (
            f", but {shards[0]}{more}: the index of these shards is missing. "
            f"Fetch it again: hf download NAME {_INDEX} --local-dir {directory}"
        )
    if any(name.startswith("adapter") for name in shards):
        return f", but {shards[0]}: an adapter is not a model. Merge it into its base first (PEFT's merge_and_unload)."
    if any(name.startswith("consolidated") for name in shards):
        return f", but {shards[0]}, whose names are not Hugging Face's. Fetch model*.safetensors as well."
    if shards:
        return f", but {shards[0]}: rename it to model.safetensors if it holds all weights."
    if any(name.startswith("pytorch_model") for name in pickles):
        code = f"A.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained({str(directory)!r})"
        return (
            f", but {pickles[0]}: pickled weights are not read, because reading them runs code. Save them as "
            f'safetensors, with python -c "from transformers import AutoModelForCausalLM as A; {code}"'
        )
    if pickles:
        return f", but {pickles[0]}: pickled weights are not read. Fetch the model in the safetensors format."
    gguf = sorted(directory.glob("*.gguf"))
    return f", but {gguf_advice(gguf[0])}" if gguf else ": no weights to read. Fetch them again."
