"""Every tensor of a Hugging Face directory is matched once: with one that its config demands, or with a reason to stay
out."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from earthshine.checkpoint.name_tables import IGNORED, LAYER, TIED_COPY, Entry, Location, entries
from earthshine.checkpoint.safetensors_store import Store, row_blocks
from earthshine.console import log
from earthshine.errors import WeightsError, nearest
from earthshine.model.config import ModelConfig


@dataclass(frozen=True)
class TensorMatch:
    """How a store's tensors fit a config.

    entries: every tensor that the config demands. locations: where each is in the store, by its Hugging Face name.
    unused: the reason for each stored tensor that is left out, by its name.
    """

    entries: list[Entry]
    locations: dict[str, Location]
    unused: dict[str, str]


def match_tensors(store: Store, config: ModelConfig) -> TensorMatch:
    """Match a store's tensors with those that `config` demands, per expert or stacked as transformers 5 holds them.

    These may stay unused: buffers computed from the config, the copy of a tied matrix, tensors without elements, and
    DeepSeek's layers for multi-token prediction (arXiv:2412.19437, section 2.2), which stand beside the model. These
    layers are known by their `eh_proj`; any other layer beyond the config's number is refused.

    Raises WeightsError for a tensor that is missing, that nothing consumes, of another shape, or not of a
    floating-point dtype of at least 16 bits.
    """
    demanded = entries(config)
    locations = {e.hf: location for e in demanded for location in reversed(e.locations) if location.name in store}
    missing = [e.hf for e in demanded if e.hf not in locations]
    consumed: Counter[str] = Counter()
    for entry in demanded:
        if entry.hf in locations:
            consumed[locations[entry.hf].name] += math.prod(entry.shape)
    unused = {}
    for name in store.names():
        if name in consumed:
            continue
        why = _why_unused(store, config, name)
        if why is None:
            raise WeightsError(
                f"{store.directory} holds the tensor {name}, which nothing in a {config.family} of its config.json "
                f"consumes.{nearest(name, missing) if missing else ''}"
            )
        unused[name] = why
    if missing:
        raise WeightsError(
            f"{store.directory} has no tensor {missing[0]}, which its config.json demands.{_tied(missing)}"
        )
    for location in locations.values():
        info = store.info(location.name)
        if info.shape != location.shape:
            raise WeightsError(
                f"{store.directory}: tensor {location.name} has shape {list(info.shape)}, "
                f"but its config.json demands {list(location.shape)}."
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise WeightsError(
                f"{store.directory}: tensor {location.name} is {info.dtype}: weights must be float16 to float64."
            )
        if consumed[location.name] != math.prod(info.shape):
            raise WeightsError(f"{store.directory} has parts of tensor {location.name} a second time, per expert.")
    return TensorMatch(demanded, locations, unused)


def _tied(missing: list[str]) -> str:
    """What to do when only the output matrix is missing: most often it is the embedding."""
    if missing != ["lm_head.weight"]:
        return ""
    return (
        " If the output matrix is the embedding's, set tie_word_embeddings to true in config.json; "
        "else the file that holds it is missing: fetch it again."
    )


def _why_unused(store: Store, config: ModelConfig, name: str) -> str | None:
    if IGNORED.fullmatch(name):
        return "computed from the config"
    if name in TIED_COPY and config.tie_word_embeddings:
        return f"a copy of the tied {TIED_COPY[name]}"
    if 0 in store.info(name).shape:
        return "without elements"
    beyond = LAYER.match(name)
    if beyond and int(beyond[1]) >= config.num_hidden_layers and f"{beyond[0]}eh_proj.weight" in store:
        return "of a layer for multi-token prediction, beside the model"
    return None


def log_unused(path: Path, unused: Mapping[str, str]) -> None:
    """Log what is left out of a directory, one line for each reason."""
    for why in dict.fromkeys(unused.values()):
        names = [name for name, reason in unused.items() if reason == why]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log(f"{path}: {', '.join(names[:3])}{more} left out: {why}.")


def check_tied_copies(store: Store, unused: Mapping[str, str]) -> None:
    """Raises WeightsError when a stored copy of a tied matrix differs from it: leaving it out would lose something."""
    for name in set(unused) & set(TIED_COPY):
        copy, original = store.info(name), store.info(TIED_COPY[name])
        same = copy.shape == original.shape and copy.dtype == original.dtype
        for rows in row_blocks(copy.shape, copy.dtype.itemsize):
            same = same and torch.equal(store.read(name, rows), store.read(original.name, rows))
        if not same:
            raise WeightsError(
                f"{store.directory}: {name} differs from {original.name}, but config.json ties them: "
                f"set tie_word_embeddings to false, or remove {name}."
            )
