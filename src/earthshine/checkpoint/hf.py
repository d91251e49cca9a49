"""Hugging Face directories and this package's models: load, save, and the accounting of every tensor."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Unpack

import torch
from torch import Tensor

from earthshine.checkpoint.companions import check_token_ids, companion_files
from earthshine.checkpoint.name_tables import IGNORED, LAYER, TIED_COPY, Entry, Place, entries
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
from earthshine.console import log
from earthshine.errors import WeightsError, nearest
from earthshine.model.config import ModelConfig, TrainingOptions
from earthshine.model.hf_config import from_hf, read_hf_config, to_hf, without_effect
from earthshine.run_folder import is_run
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


class Accounts(NamedTuple):
    """The tensors that a config demands, where in a store each stands, and what of it stays unused, with the reason."""

    wanted: list[Entry]
    places: dict[str, Place]
    unused: dict[str, str]


def account(store: Store, config: ModelConfig) -> Accounts:
    """Match a store's tensors with those that `config` demands, per expert or stacked as transformers 5 holds them.

    Unused may stay: buffers computed from the config, the copy of a tied matrix, tensors without elements, and a
    DeepSeek's multi-token prediction layers, which predict further tokens beside the model (arXiv:2412.19437, section
    2.2). They are known by their `eh_proj`: any other layer beyond the config's number is refused.

    Raises WeightsError for a tensor that is missing, that nothing consumes, of another shape, or not of a
    floating-point type of at least 16 bits.
    """
    wanted = entries(config)
    places = {e.hf: place for e in wanted for place in reversed(e.places) if place.name in store}
    missing = [e.hf for e in wanted if e.hf not in places]
    consumed: Counter[str] = Counter()
    for entry in wanted:
        if entry.hf in places:
            consumed[places[entry.hf].name] += math.prod(entry.shape)
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
    for place in places.values():
        info = store.info(place.name)
        if info.shape != place.shape:
            raise WeightsError(
                f"{store.directory}: tensor {place.name} has shape {list(info.shape)}, "
                f"but its config.json demands {list(place.shape)}."
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise WeightsError(
                f"{store.directory}: tensor {place.name} is {info.dtype}: weights must be float16 to float64."
            )
        if consumed[place.name] != math.prod(info.shape):
            raise WeightsError(f"{store.directory} has parts of tensor {place.name} a second time, per expert.")
    return Accounts(wanted, places, unused)


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
    """Say what is left out of a directory, one line for each reason."""
    for why in dict.fromkeys(unused.values()):
        names = [name for name, reason in unused.items() if reason == why]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log(f"{path}: {', '.join(names[:3])}{more} left out: {why}.")


def read_blocks(store: Store, entry: Entry, place: Place) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """A tensor's rows in order, as stored, with their slices. Raises WeightsError for a NaN or an infinity."""
    for rows in row_blocks(entry.shape, store.info(place.name).dtype.itemsize):
        part = store.read(place.name, place.within(rows))
        check_finite(place.name, part)
        yield rows, part if place.expert < 0 else part.squeeze(0)


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


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    *,
    trust: bool = False,
    training: TrainingOptions | None = None,
) -> "Transformer":
    """A Hugging Face directory or a run's latest checkpoint as a model; `model(tokens_BS) -> logits_BSV`.

    Args:
        dtype: of the parameters; a router's bias is float32 in any model.
        compute_dtype: of activations and matmuls; `dtype` when None.
        trust: read a run's checkpoint that was not made on this machine.
        training: for a model that will be trained.
    Raises ConfigError or UnsupportedModelError for the config, WeightsError for any tensor that is missing, extra,
    misshapen or not finite, or whose values `dtype` cannot hold; CheckpointError for a damaged checkpoint.
    """
    from earthshine.model.transformer import Transformer  # here, so that reading configs and weights builds no model

    path = Path(path)
    config: ModelConfig

    def build() -> Transformer:
        with torch.device(device):
            return Transformer(config, compute_dtype or dtype, training=training).to(dtype)

    if is_run(path):
        from earthshine.checkpoint.run_store import load_model_state

        config, state = load_model_state(path, trust=trust)
        model = build()
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            check_finite(name, tensor)
            check_fits(name, tensor, dtypes.get(name, tensor.dtype))
        model.load_state_dict(state)
        return model
    config, store = read_config(path), Store(path)
    accounts = account(store, config)  # before memory is taken for what the config claims
    check_tied_copies(store, accounts.unused)
    model = build()
    log_unused(path, accounts.unused)
    state = model.state_dict()  # shares the memory of parameters and buffers
    assert set(state) == {e.ours for e in accounts.wanted}, "the name tables do not cover the model"
    for entry in accounts.wanted:
        target = state[entry.ours] if entry.expert < 0 else state[entry.ours][entry.expert]
        for rows, part in read_blocks(store, entry, accounts.places[entry.hf]):
            check_fits(entry.hf, part, target.dtype)
            target[rows].copy_(part)
    return model


def save_model(
    model: "Transformer | Mapping[str, Tensor]",
    config: ModelConfig,
    out_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    companions: str | Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a model, or a state dict with our names, as a Hugging Face directory; experts under their own names.

    A router's bias is written in float32 whatever `dtype` says.

    Args:
        companions: a directory whose tokenizer, generation config and licence files are copied.
        extra: further text files, name -> contents.
    Raises OutputExistsError, DiskFullError; WeightsError when the state has other tensors than `config` demands, or
    values that `dtype` cannot hold.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    blocks = state_blocks(state, config, dtype)
    beside = companion_files(companions)
    check_token_ids(beside, config, companions or "")
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
