"""Hugging Face directories: their config, the rows of their tensors, and how one is written."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from earthshine.checkpoint.name_tables import Entry, Location, entries
from earthshine.checkpoint.safetensors_store import Store, check_finite, check_fits, row_blocks
from earthshine.checkpoint.safetensors_writer import (
    FileRecord,
    OutputTensor,
    WriteOptions,
    write_recorded,
    write_sharded,
)
from earthshine.checkpoint.tokenizer_files import check_token_ids, tokenizer_and_license_files
from earthshine.console import log
from earthshine.errors import WeightsError
from earthshine.files import require_space
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import from_hf, read_hf_config, to_hf, without_effect
from earthshine.staging import staged_directory

if TYPE_CHECKING:
    from earthshine.model.transformer import Transformer

SPARE_BYTES = 64 << 20  # for the small files and the file system's own needs


def read_config(directory: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory. Raises ConfigError or UnsupportedModelError.

    What its config.json sets without effect is logged.
    """
    hf = read_hf_config(directory)
    config = from_hf(hf)
    for line in without_effect(hf):
        log(f"{directory}/config.json: {line}")
    return config


def read_blocks(store: Store, entry: Entry, location: Location) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """A tensor's rows in order, as stored, with their slices. Raises WeightsError for a NaN or an infinity."""
    for rows in row_blocks(entry.shape, store.info(location.name).dtype.itemsize):
        part = store.read(location.name, location.within(rows))
        check_finite(location.name, part)
        yield rows, part if location.expert < 0 else part.squeeze(0)


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
    tensors = tensors_of_state(state, config, dtype)
    beside = tokenizer_and_license_files(tokenizer_dir)
    check_token_ids(beside, config, tokenizer_dir or "")
    files: dict[str, str | bytes] = {**beside, **(extra or {})}
    require_space_for(Path(out_dir), tensors)
    with staged_directory(Path(out_dir)) as staging:
        write_model(staging, config, tensors, files)


def tensors_of_state(state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> list[OutputTensor]:
    """The Hugging Face tensors of a state dict with our names, as `write_model` takes them.

    Raises WeightsError when the state has other tensors or shapes than `config` demands; making the rows raises it for
    a value beyond `dtype`.
    """
    demanded = entries(config)
    names = {e.ours for e in demanded}
    if names != set(state):
        missing, surplus = sorted(names - set(state)), sorted(set(state) - names)
        raise WeightsError(f"the state does not fit its config: missing {missing[:3]}, not consumed {surplus[:3]}.")
    experts = config.moe.num_experts
    for entry in demanded:
        shape, expected = tuple(state[entry.ours].shape), entry.shape if entry.expert < 0 else (experts, *entry.shape)
        if shape != expected:
            raise WeightsError(f"{entry.ours} has shape {list(shape)}, but its config demands {list(expected)}.")

    def rows_of(entry: Entry) -> Iterator[Tensor]:
        tensor = state[entry.ours] if entry.expert < 0 else state[entry.ours][entry.expert]
        stored = entry.dtype(dtype)
        for rows in row_blocks(entry.shape, stored.itemsize):
            check_fits(entry.ours, tensor[rows].detach(), stored)
            yield tensor[rows].detach().to("cpu", stored)

    return [OutputTensor(e.hf, e.dtype(dtype), e.shape, partial(rows_of, e)) for e in demanded]


def require_space_for(out_dir: Path, tensors: Iterable[OutputTensor]) -> None:
    """Raises DiskFullError, before anything is written, when a directory of these tensors cannot fit."""
    needed = sum(t.num_bytes for t in tensors) + SPARE_BYTES
    require_space(out_dir, needed, "Free some space, or choose another folder.")


def write_model(
    directory: Path,
    config: ModelConfig,
    tensors: Sequence[OutputTensor],
    files: Mapping[str, str | bytes],
    **options: Unpack[WriteOptions],
) -> dict[str, FileRecord]:
    """Stream a model's tensors, its config and further files into `directory`; returns the record of every file.

    tensors: one for each of `entries(config)`, in that order. options: those of `write_sharded`.
    """
    records = write_sharded(directory, tensors, **options)
    ((main, _),) = Counter(t.dtype for t in tensors).most_common(1)
    text = json.dumps(to_hf(config, str(main).removeprefix("torch.")), indent=2)
    records["config.json"] = write_recorded(directory / "config.json", text + "\n")
    for name, contents in files.items():
        records[name] = write_recorded(directory / name, contents)
    return records
