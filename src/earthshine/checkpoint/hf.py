"""Hugging Face directories and this package's models: load, save, and the accounting of every tensor."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from earthshine.checkpoint.name_tables import IGNORED, TIED_COPY, Entry, entries
from earthshine.checkpoint.safetensors_store import (
    FileRecord,
    Store,
    TensorInfo,
    check_finite,
    row_blocks,
    write_recorded,
    write_sharded,
)
from earthshine.checkpoint.staging import staged_directory
from earthshine.config import nearest
from earthshine.console import log
from earthshine.errors import ConfigError, WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import from_hf, to_hf

if TYPE_CHECKING:
    from earthshine.model.transformer import Transformer

COMPANIONS = (  # what else a model's directory holds and its conversion keeps
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model's directory. Raises ConfigError when there is none or it is not an object."""
    path = Path(directory) / "config.json"
    try:
        hf = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not a readable Hugging Face config: {e}.") from e
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(hf).__name__}.")
    return hf


def read_config(directory: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory. Raises ConfigError or UnsupportedModelError."""
    return from_hf(read_hf_config(directory))


def account(store: Store, config: ModelConfig) -> tuple[list[Entry], dict[str, str]]:
    """Match a store's tensors with those that `config` demands.

    Returns the demanded entries, and the tensors that are left unused with the reason for each (buffers computed from
    the config, the copy of a tied matrix). Raises WeightsError for a tensor that is missing, that nothing consumes, of
    another shape, or not of a floating-point type of at least 16 bits.
    """
    wanted = entries(config)
    names = {e.hf for e in wanted}
    unused = {}
    for name in store.names():
        if name in names:
            continue
        if IGNORED.fullmatch(name):
            unused[name] = "a buffer computed from the config"
        elif name in TIED_COPY and config.tie_word_embeddings:
            unused[name] = f"a copy of the tied {TIED_COPY[name]}"
        else:
            raise WeightsError(
                f"{store.directory} holds the tensor {name}, which nothing in a {config.family} of its config.json "
                f"consumes.{nearest(name, names - set(store.names())) if names - set(store.names()) else ''}"
            )
    for entry in wanted:
        if entry.hf not in store:
            raise WeightsError(f"{store.directory} has no tensor {entry.hf}, which its config.json demands.")
        info = store.info(entry.hf)
        if info.shape != entry.shape:
            raise WeightsError(
                f"{store.directory}: tensor {entry.hf} has shape {list(info.shape)}, "
                f"but its config.json demands {list(entry.shape)}."
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise WeightsError(
                f"{store.directory}: tensor {entry.hf} is {info.dtype}: weights must be float16 to float64."
            )
    return wanted, unused


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


def is_run(path: Path) -> bool:
    """Whether a path is a training run's folder, or one of its checkpoints, rather than a Hugging Face directory."""
    return (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    *,
    trust: bool = False,
    **training: Any,
) -> "Transformer":
    """A Hugging Face directory or a run's latest checkpoint as a model; `model(tokens_BS) -> logits_BSV`.

    Args:
        dtype: of the parameters.
        compute_dtype: of activations and products; `dtype` when None.
        trust: read a run's checkpoint that was not made on this machine.
        training: what `Transformer` takes besides, for a model that will be trained: balance, capacity, recompute.
    Raises ConfigError or UnsupportedModelError for the config, WeightsError for any tensor that is missing, extra,
    misshapen or not finite, CheckpointError for a damaged checkpoint.
    """
    from earthshine.model.transformer import Transformer  # here, so that reading configs and weights builds no model

    path = Path(path)
    config: ModelConfig

    def build() -> Transformer:
        with torch.device(device):
            return Transformer(config, compute_dtype or dtype, **training).to(dtype)

    if is_run(path):
        from earthshine.checkpoint.run_store import load_model_state

        config, state = load_model_state(path, trust=trust)
        for name, tensor in state.items():
            check_finite(name, tensor)
        model = build()
        model.load_state_dict(state)
        return model
    config, store = read_config(path), Store(path)
    wanted, unused = account(store, config)  # before memory is taken for what the config claims
    check_tied_copies(store, unused)
    model = build()
    for name, why in unused.items():
        log(f"{path}: {name} is not loaded: it is {why}.")
    parameters = dict(model.named_parameters())
    assert set(parameters) == {e.ours for e in wanted}, "the name tables do not cover the model"
    with torch.no_grad():
        for entry in wanted:
            target = parameters[entry.ours] if entry.expert < 0 else parameters[entry.ours][entry.expert]
            for rows in row_blocks(entry.shape, store.info(entry.hf).dtype.itemsize):
                part = store.read(entry.hf, rows)
                check_finite(entry.hf, part)
                target[rows].copy_(part)
                if torch.finfo(dtype).max < torch.finfo(part.dtype).max and not target[rows].isfinite().all():
                    raise WeightsError(f"{path}: tensor {entry.hf} holds values that {dtype} cannot: take a wider one.")
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

    Args:
        companions: a directory whose tokenizer, generation config and licence files are copied.
        extra: further text files, name -> contents.
    Raises OutputExistsError, DiskFullError; WeightsError when the state has other tensors than `config` demands.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    blocks = state_blocks(state, config, dtype)
    with staged_directory(Path(out_dir)) as staging:
        write_model(staging, config, {e.hf: dtype for e in entries(config)}, blocks, companions, extra)


def state_blocks(
    state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype
) -> Callable[[Entry], Iterator[Tensor]]:
    """The rows of each Hugging Face tensor out of a state dict with our names, as `write_model` asks for them.

    Raises WeightsError when the state has other tensors or shapes than `config` demands.
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
        for rows in row_blocks(entry.shape, dtype.itemsize):
            yield tensor[rows].detach().to("cpu", dtype)

    return blocks


def write_model(
    directory: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    blocks: Callable[[Entry], Iterable[Tensor]],
    companions: str | Path | None = None,
    extra: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, FileRecord]:
    """Stream a model's tensors, its config and its companions into `directory`; returns the record of every file.

    `blocks(entry)` yields a tensor's rows in order, in the dtype that `dtypes` has for its name; `options` go to
    `write_sharded`.
    """
    by_name = {e.hf: e for e in entries(config)}
    tensors = [TensorInfo(e.hf, dtypes[e.hf], e.shape) for e in by_name.values()]
    records = write_sharded(directory, tensors, lambda tensor: blocks(by_name[tensor.name]), **options)
    ((main, _),) = Counter(dtypes.values()).most_common(1)
    text = json.dumps(to_hf(config, str(main).removeprefix("torch.")), indent=2)
    records["config.json"] = write_recorded(directory / "config.json", text + "\n")
    for name, contents in companion_files(companions).items():
        records[name] = write_recorded(directory / name, contents)
    for name, words in (extra or {}).items():
        records[name] = write_recorded(directory / name, words)
    return records


def companion_files(directory: str | Path | None) -> dict[str, bytes]:
    """Contents of the tokenizer, generation config and licence files of a directory, by name."""
    if directory is None:
        return {}
    found = {p for pattern in COMPANIONS for p in Path(directory).glob(pattern) if p.is_file()}
    return {p.name: p.read_bytes() for p in sorted(found)}
