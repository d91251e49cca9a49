"""Everything a checkpoint holds: model, optimizer, loader, step, tokens and random state."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthshine.checkpoint import run_store
from earthshine.checkpoint.load import load_model
from earthshine.checkpoint.manifest import newest
from earthshine.checkpoint.run_store import MODEL_PREFIX, Checkpoint
from earthshine.config import diff, encode
from earthshine.console import log
from earthshine.data.loader import Loader
from earthshine.data.tokenization import Tokenization
from earthshine.data.tokenizer import warn_of_other_tokenizer
from earthshine.device import Readings, resolve_ns_dtype
from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.model.config import ModelConfig
from earthshine.model.training_options import TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.build import build_optimizer
from earthshine.optim.muon import Muon
from earthshine.optim.qk_clip import QKClip
from earthshine.train.job import FromCheckpoint, FromHuggingFace, Scratch, TrainJob

_OPTIMIZER_PREFIX = "optimizer."
_RNG_CPU = "rng.cpu"
_RNG_DEVICE = "rng.device"


@dataclass
class TrainState:
    """What changes while training. `resolved_dtypes`: resolved at the first start and kept on resume."""

    model: Transformer
    optimizer: Muon
    loader: Loader
    device: torch.device
    resolved_dtypes: dict[str, str]
    qk_clip: QKClip | None = None
    step: int = 0
    total_tokens: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name. Those of model and optimizer are the live ones: filling them restores the state."""
        tensors = {MODEL_PREFIX + name: tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER_PREFIX}{name}.{key}"] = value
        tensors[_RNG_CPU] = torch.get_rng_state()
        if self.device.type != "cpu":
            tensors[_RNG_DEVICE] = torch.get_device_module(self.device).get_rng_state(self.device)
        return tensors

    def metadata(self) -> dict[str, Any]:
        """What is not a tensor, JSON-ready."""
        return {
            "step": self.step,
            "total_tokens": self.total_tokens,
            "choices": self.resolved_dtypes,
            "loader": self.loader.state_dict(),
            "optimizer_groups": encode(self.optimizer.state_dict()["param_groups"]),
        }

    def restore(self, checkpoint: Checkpoint, *, allow_config_change: bool) -> None:
        """Become the state that was saved, bit for bit.

        The random state of an accelerator is restored where the checkpoint has one of this kind of device: a run that
        began on a CPU resumes on an accelerator, and back.

        Raises CheckpointError when tensors or (unless allowed) hyper-parameters are not those of the checkpoint,
        DataError when the token shards are not.
        """
        saved = checkpoint.state
        tensors = self.tensors()
        left_out = run_store.read_into(checkpoint, tensors, optional=(_RNG_DEVICE,))
        torch.set_rng_state(tensors[_RNG_CPU])
        if left_out:
            log(
                f"{checkpoint.folder} was saved on another kind of device than {self.device}: of the random states "
                f"only the CPU's is restored."
            )
        elif _RNG_DEVICE in tensors:
            torch.get_device_module(self.device).set_rng_state(tensors[_RNG_DEVICE], self.device)
        if not allow_config_change:  # compares every hyper-parameter; the tensors are already in place
            live = self.optimizer.state_dict()["state"]
            self.optimizer.load_state_dict({"state": live, "param_groups": saved["optimizer_groups"]})
        self.loader.load_state_dict(saved["loader"])
        self.step, self.total_tokens = saved["step"], saved["total_tokens"]

    def check_finite(self) -> None:
        """Raise TrainingDivergedError when a tensor is not finite, so that no checkpoint ever holds one.

        The optimizer's too: a second moment that overflowed would stop its parameter for good, silently.
        """
        floating = {name: tensor for name, tensor in self.tensors().items() if tensor.is_floating_point()}
        finite = Readings(*(torch.isfinite(tensor).all() for tensor in floating.values()))
        for name, (holds,) in zip(floating, finite.values, strict=True):
            if not holds:
                raise TrainingDivergedError(f"after step {self.step} the tensor {name} is not finite.")


def build_state(
    job: TrainJob,
    device: torch.device,
    compute_dtype: torch.dtype,
    checkpoint: Checkpoint | None,
    *,
    trust: bool,
    allow_config_change: bool,
) -> TrainState:
    """The state at step 0 of the job, or that of `checkpoint` of the same run.

    Raises what loading weights and opening token shards raise, ConfigError or CheckpointError for a checkpoint of
    another model, and ConfigError where `compile` lacks a compiler.
    """
    if job.compile:
        _check_compiler(device)
    if checkpoint is None:
        model = _initial_model(job, device, compute_dtype, trust)
    else:
        model = _empty_model(job, _same_model(job, checkpoint), device, compute_dtype)
    ns_dtype: Any = job.optimizer.ns_dtype
    if ns_dtype == "auto":
        ns_dtype = (
            checkpoint.state["choices"]["ns_dtype"] if checkpoint else _dtype_name(resolve_ns_dtype("auto", device))
        )
    loader = Loader(
        job.data,
        seq_len=job.seq_len,
        sequences_per_step=job.sequences_per_step,
        seed=job.seed,
        vocab_size=model.config.vocab_size,
    )
    if checkpoint is None:
        first = loader.summary[0]  # all sources have one tokenizer
        _warn_of_other_ids(job, str(first["path"]), str(first["tokenizer_sha256"]))
    for note in loader.notes():
        log(note)
    ends = model.config.eos_token_ids
    model.config = _with_ends(model.config, loader.tokenization, from_scratch=isinstance(job.init, Scratch))
    if ends and ends != model.config.eos_token_ids:
        eod = loader.tokenization.eod
        log(f"the data's documents end with id {eod}: it becomes an end token, beside or instead of {ends}")
    optimizer = build_optimizer(model, replace(job.optimizer, ns_dtype=ns_dtype))
    threshold = job.optimizer.qk_clip_threshold
    qk_clip = QKClip(model, threshold) if threshold else None
    resolved_dtypes = {"compute_dtype": _dtype_name(compute_dtype), "ns_dtype": ns_dtype}
    state = TrainState(model, optimizer, loader, device, resolved_dtypes, qk_clip)
    if checkpoint is not None:
        state.restore(checkpoint, allow_config_change=allow_config_change)
    if job.compile:
        model.compile_blocks()
    return state


def _check_compiler(device: torch.device) -> None:
    """torch.compile generates C++ for a CPU; without a compiler the first step would fail, with a long traceback."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile=true needs a C++ compiler, and {compiler!r} was not found: install it, name another in the "
            f"environment variable CXX, or set compile=false."
        )


def _initial_model(job: TrainJob, device: torch.device, compute_dtype: torch.dtype, trust: bool) -> Transformer:
    match job.init:
        case Scratch(model=config):
            model = _empty_model(job, config, device, compute_dtype)
            initialize(model, job.seed)
        case FromHuggingFace(path=path):
            model = load_model(path, device=device, compute_dtype=compute_dtype, training=_training_options(job))
        case FromCheckpoint(path=path):
            config, tensors = run_store.load_model_state(path, trust=trust)
            model = _empty_model(job, config, device, compute_dtype)
            model.load_state_dict(tensors)
    return model


def _empty_model(job: TrainJob, config: ModelConfig, device: torch.device, compute_dtype: torch.dtype) -> Transformer:
    with device:
        return Transformer(config, compute_dtype, training=_training_options(job))


def _training_options(job: TrainJob) -> TrainingOptions:
    return TrainingOptions(balance=job.balance, capacity=job.capacity, recompute=job.recompute == "block")


def _same_model(job: TrainJob, checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint's architecture: resuming does not need a warm start's source. Raises ConfigError for another."""
    if isinstance(job.init, Scratch):
        saved = checkpoint.model
        wanted = replace(job.init.model, bos_token_id=saved.bos_token_id, eos_token_ids=saved.eos_token_ids)
        if wanted != saved:  # those ids are the data's, by `_with_ends`
            lines = diff(encode(saved), encode(wanted), "init.model")
            raise ConfigError(f"{checkpoint.folder} holds another model: {'; '.join(lines)}.")
    return checkpoint.model


def _with_ends(config: ModelConfig, rule: Tokenization, *, from_scratch: bool) -> ModelConfig:
    """The config with the token that ends the data's documents among those that end a text.

    from_scratch: the weights know no other tokenizer than the data's, so that another's ids (of a preset) end nothing.
    """
    if rule.eod in config.eos_token_ids or rule.eod >= config.vocab_size:
        return config
    if not from_scratch:
        return replace(config, eos_token_ids=(*config.eos_token_ids, rule.eod))
    return replace(config, eos_token_ids=(rule.eod,), bos_token_id=rule.bos_ids[0] if rule.bos_ids else -1)


def _warn_of_other_ids(job: TrainJob, shards: str, tokenizer_sha256: str) -> None:
    """Warn when a warm start's weights and the data were made with different tokenizers."""
    match job.init:
        case FromHuggingFace(path=path):
            warn_of_other_tokenizer(path, shards, tokenizer_sha256)
        case FromCheckpoint(path=path):
            source = newest(Path(path))
            if source and source.tokenization and source.tokenization.tokenizer_sha256 != tokenizer_sha256:
                log(
                    f"warning: {shards} was made with another tokenizer than the data of {path}: unless the two hold "
                    f"the same vocabulary, losses and weights mean nothing."
                )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
