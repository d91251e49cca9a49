"""Hugging Face directories: their config, the rows of their tensors, and how one is written."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from earthshine.checkpoint.name_tables import Entry, Place, entries
from earthshine.checkpoint.safetensors_store import (
    FileRecord,
    Store,
    TensorInfo,
    WriteOptions,
    check_finite,
    check_fits,
    row_blocks,
    write_recorded,
    write_sharded,
)
from earthshine.checkpoint.tokenizer_files import check_token_ids, tokenizer_and_license_files
from earthshine.console import log
from earthshine.errors import WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import from_hf, read_hf_config, to_hf, without_effect
from earthshine.staging import staged_directory

if TYPE_CHECKING:
    from earthshine.model.transformer import Transformer


def read_config(directory: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory. Raises ConfigError or UnsupportedModelError.

    What its config.json sets without effect is logged.
    """
    hf = read_hf_config(directory)
    config = from_hf(hf)
    for line in without_effect(hf):
        log(f"{directory}/config.json: {line}")
    return config


def read_blocks(store: Store, entry: Entry, place: Place) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """A tensor's rows in order, as stored, with their slices. Raises WeightsError for a NaN or an infinity."""
    for rows in row_blocks(entry.shape, store.info(place.name).dtype.itemsize):
        part = store.read(place.name, place.within(rows))
        check_finite(place.name, part)
        yield rows, part if place.expert < 0 else part.squeeze(0)


def save_model(
    model: "Transformer | Mapping[str, Tensor]",
    config: ModelConfig,
    out_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    tokenizer_dir: str | Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a model, or a state dict with our names, as a Hugging Face directory; experts under their own names.

    A router's bias is written in float32 whatever `dtype` says.

    Args:
        tokenizer_dir: a directory whose tokenizer, generation config and license files are copied.
        extra: further text files, name -> contents.
    Raises OutputExistsError, DiskFullError; WeightsError when the state has other tensors than `config` demands, or
    values that `dtype` cannot hold.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    blocks = state_blocks(state, config, dtype)
    beside = tokenizer_and_license_files(tokenizer_dir)
    check_token_ids(beside, config, tokenizer_dir or "")
    files: dict[str, str | bytes] = {**beside, **(extra or {})}
    with staged_directory(Path(out_dir)) as staging:
        write_model(staging, config, {e.hf: e.dtype(dtype) for e in entries(config)}, blocks, files)


def state_blocks(
    state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype
) -> Callable[[Entry], Iterator[Tensor]]:
    """The rows of each Hugging Face tensor out of a state dict with our names, as `write_model` asks for them.

    Raises WeightsError when the state has other tensors or shapes than `config` demands; the rows, when a value is
    beyond `dtype`.
    """
    wanted = entries(config)
    names = {e.ours for e in wanted}
    if names != set(state):
        missing, surplus = sorted(names - set(state)), sorted(set(state) - names)
        raise WeightsError(f"the state does not fit its config: missing {missing[:3]}, not consumed {surplus[:3]}.")
    experts = config.moe.num_experts
    for entry in wanted:
        shape, demanded = tuple(state[entry.ours].shape), entry.shape if entry.expert < 0 else (experts, *entry.shape)
        if shape != demanded:
            raise WeightsError(f"{entry.ours} has shape {list(shape)}, but its config demands {list(demanded)}.")

    def blocks(entry: Entry) -> Iterator[Tensor]:
        tensor = state[entry.ours] if entry.expert < 0 else state[entry.ours][entry.expert]
        stored = entry.dtype(dtype)
        for rows in row_blocks(entry.shape, stored.itemsize):
            check_fits(entry.ours, tensor[rows].detach(), stored)
            yield tensor[rows].detach().to("cpu", stored)

    return blocks


def write_model(
    directory: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    blocks: Callable[[Entry], Iterable[Tensor]],
    files: Mapping[str, str | bytes],
    **options: Unpack[WriteOptions],
) -> dict[str, FileRecord]:
    """Stream a model's tensors, its config and further files into `directory`; returns the record of every file.

    `blocks(entry)` yields a tensor's rows in order, in the dtype that `dtypes` has for its name; `options` go to
    `write_sharded`.
    """
    by_name = {e.hf: e for e in entries(config)}
    tensors = [TensorInfo(e.hf, dtypes[e.hf], e.shape) for e in by_name.values()]
    records = write_sharded(directory, tensors, lambda tensor: blocks(by_name[tensor.name]), **options)
    ((main, _),) = Counter(dtypes.values()).most_common(1)
    text = json.dumps(to_hf(config, str(main).removeprefix("torch.")), indent=2)
    records["config.json"] = write_recorded(directory / "config.json", text + "\n")
    for name, contents in files.items():
        records[name] = write_recorded(directory / name, contents)
    return records
