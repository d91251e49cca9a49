"""What to do with a directory whose weights are not where they are looked for."""

import re
from pathlib import Path

_INDEX = "model.safetensors.index.json"


def instead_of_weights(directory: Path) -> str:
    """The end of a message about missing weights: what is there in their place, and what to do."""
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if any(re.fullmatch(r".*-of-\d+\.safetensors", name) for name in shards):
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        return (
            f", but {shards[0]}{more}: the index of these shards is missing. "
            f"Fetch it again: hf download NAME {_INDEX} --local-dir {directory}"
        )
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
    return ": no weights to read. Fetch them again."
