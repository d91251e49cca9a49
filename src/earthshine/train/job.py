"""`TrainJob`: everything that defines a training run, and what of it is refused. No torch import.

Names: B sequences, S positions; a step is one update of the parameters, made of one or more micro-batches.
"""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from earthshine.checkpoint import manifest as manifests
from earthshine.config import diff, encode
from earthshine.data.config import DataConfig
from earthshine.errors import CheckpointError, ConfigError, divisors
from earthshine.files import expand_home
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import from_hf, read_hf_config
from earthshine.model.parameters import query_key_projections
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.run_folder import checkpoint_folders


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Start from a seeded random initialization (`model.transformer.initialize`, with the job's seed)."""

    kind: Literal["scratch"] = "scratch"
    model: ModelConfig


@dataclass(frozen=True, kw_only=True)
class FromHuggingFace:
    """Warm start from a Hugging Face directory, with a fresh optimizer."""

    kind: Literal["huggingface"] = "huggingface"
    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint:
    """Warm start from the latest valid checkpoint of another run folder, with a fresh optimizer."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """Evaluation on held-out (validation) token shards: at step 0, every `every_steps` (0: not between) and at the end.

    path: a folder of token shards; "" for no evaluation. max_sequences: of `seq_len` tokens; 0 for all.
    """

    path: str = ""
    every_steps: int = 0
    max_sequences: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saved every `every_steps` (0: not between), at the end and when interrupted; keeps the newest `keep` (0: all)."""

    every_steps: int = 100
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run. Raises ConfigError where the fields contradict each other.

    On resume only these may differ from the run's config, because none changes a bit of a step: `name`, `tracker`,
    `checkpoint.*`, `heldout.every_steps`, `recompute`, `log_every`; `num_steps`, if every learning rate used so far
    stays what it was (a longer constant schedule, or WSD before its decay); and where the same data are stored.

    Args:
        sequences_per_step: sequences in one update; the gradient is that of their mean loss per target token, and with
            experts of the losses of `balance` too (`train.step`).
        sequences_per_micro_batch: sequences in one forward and backward pass; it divides `sequences_per_step`.
        clip_grad_norm: largest global gradient norm (0: no clipping).
        seed: of the initialization and of the order of the samples.
        compute_dtype: of activations and matmuls; "auto" is resolved at the first start and kept on resume.
        balance, capacity: how experts are kept evenly loaded, and how many tokens one takes; for MoE models.
        recompute: "block" keeps only the input of each decoder layer for the backward pass and computes the rest again:
            the same gradients to the bit, in less memory, for one more forward pass.
        compile: `torch.compile` each decoder layer, which changes last bits.
        log_every: steps per line of the log and of metrics.jsonl; in between, nothing waits for the accelerator. The
            last step, and the step before a checkpoint or an evaluation, has a line too. A line's losses, norms and
            routing are those of its own step; its tokens, seconds, rates and samples are of all `steps` since the line
            before (named where there is more than one).
    """

    name: str
    init: Scratch | FromHuggingFace | FromCheckpoint
    seq_len: int
    sequences_per_step: int
    sequences_per_micro_batch: int
    num_steps: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig = field(default_factory=DataConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    clip_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    recompute: Literal["none", "block"] = "none"
    compile: bool = False
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: Literal["none", "tensorboard"] = "none"
    log_every: int = 1

    def __post_init__(self) -> None:
        for name in ("seq_len", "sequences_per_step", "sequences_per_micro_batch", "num_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.sequences_per_step % self.sequences_per_micro_batch:
            raise ConfigError(
                f"sequences_per_micro_batch={self.sequences_per_micro_batch} does not divide sequences_per_step="
                f"{self.sequences_per_step}; use one of {divisors(self.sequences_per_step)}."
            )
        if not (self.clip_grad_norm >= 0 and math.isfinite(self.clip_grad_norm)):
            raise ConfigError(f"clip_grad_norm={self.clip_grad_norm} must be 0 (no clipping) or a positive number.")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed} must be from 0 to 2**64 - 1.")
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise ConfigError(f"name={self.name!r} must be usable as a folder name, without slashes.")
        counts = {
            "heldout.every_steps": self.heldout.every_steps,
            "heldout.max_sequences": self.heldout.max_sequences,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.keep": self.checkpoint.keep,
        }
        for name, value in counts.items():
            if value < 0:
                raise ConfigError(f"{name}={value} must not be negative; 0 turns it off.")
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.num_steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} and schedule.decay_steps="
                f"{self.schedule.decay_steps} are more than num_steps={self.num_steps}; shorten them or train longer."
            )

    @property
    def tokens_per_step(self) -> int:
        """Token positions that one step passes through the model (targets may be fewer, where they are masked)."""
        return self.sequences_per_step * self.seq_len


def model_config(job: TrainJob) -> ModelConfig:
    """The architecture that the job trains; for a warm start, from the JSON beside the weights.

    Raises ConfigError when that is not there, and as `check_model` does.
    """
    match job.init:
        case Scratch(model=model):
            pass
        case FromHuggingFace(path=path):
            try:
                model = from_hf(read_hf_config(path))
            except ConfigError as e:
                raise type(e)(f"init.path={path!r}: {e}") from e
        case FromCheckpoint(path=path):
            model = _checkpoint_model(path)
    check_model(job, model)
    return model


def check_model(job: TrainJob, model: ModelConfig) -> None:
    """Raise ConfigError for a model that the job cannot train: positions too few, routers that would not learn,
    settings for experts or a bias that it does not have, QK-Clip where it could not lower a logit, or an architecture
    that no Hugging Face class could hold."""
    if job.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"seq_len={job.seq_len} is more than model.max_position_embeddings={model.max_position_embeddings}."
        )
    _ = model.family  # raises for an architecture that could be trained and then not be exported
    _check_routing(job, model)
    _check_qk_clip(job.optimizer, model)


def _check_routing(job: TrainJob, model: ModelConfig) -> None:
    moe, balance = model.moe, job.balance
    if not model.is_moe:
        changed = diff(encode(BalanceConfig()), encode(balance), "balance")
        changed += diff(encode(CapacityConfig()), encode(job.capacity), "capacity")
        if changed:
            raise ConfigError(
                f"the model is dense, and {changed[0].partition(': ')[0]} is for models with experts: leave it out, or "
                f"train a model with model.moe."
            )
        return
    if moe.gate != "sigmoid_bias" and (balance.bias == "deepseek" or balance.bias_rate != BalanceConfig.bias_rate):
        raise ConfigError(
            f"balance.bias={balance.bias!r} and balance.bias_rate={balance.bias_rate} are for model.moe.gate="
            f"'sigmoid_bias', not {moe.gate!r}, which has no bias: leave them out."
        )
    weighs_one = moe.top_k == 1 and moe.renormalize  # "topk_softmax" always does
    routers = [f"blocks.{layer}.moe.router.weight" for layer in moe.layers]
    if weighs_one and not all(is_frozen(job.optimizer, name) for name in routers):
        other = "renormalize=false"
        if moe.gate == "topk_softmax":
            other = "gate='softmax_topk' with renormalize=false"
        raise ConfigError(
            f"model.moe.top_k=1 with gate={moe.gate!r} and renormalize=true gives the router no gradient: the weight "
            f"of the one expert is 1 whatever its logit, so routing would never be learned. Use top_k >= 2, "
            f'{other}, or freeze the routers (optimizer.freeze=["*.router.weight"]).'
        )


def _check_qk_clip(optimizer: OptimizerConfig, model: ModelConfig) -> None:
    if not optimizer.qk_clip_threshold:
        return
    if model.qk_norm:
        raise ConfigError(
            f"optimizer.qk_clip_threshold={optimizer.qk_clip_threshold:g} is not for model.qk_norm=true: queries and "
            f"keys are normalized after their projections, so that scaling these lowers no logit, and the norms bound "
            f"the logits already. Set it to 0."
        )
    if not qk_clip_layers(optimizer, model):
        raise ConfigError(
            f"optimizer.qk_clip_threshold={optimizer.qk_clip_threshold:g} has nothing to scale: optimizer.freeze keeps "
            f"queries or keys of every layer. Set it to 0, or train both projections of a layer."
        )


def qk_clip_layers(optimizer: OptimizerConfig, model: ModelConfig) -> tuple[int, ...]:
    """The layers that QK-Clip clips: those whose query and key projections are all trained."""
    return tuple(
        layer
        for layer, names in query_key_projections(model).items()
        if optimizer.qk_clip_threshold and not any(is_frozen(optimizer, name) for name in names)
    )


def is_frozen(optimizer: OptimizerConfig, name: str) -> bool:
    """Whether a pattern of `optimizer.freeze` matches the parameter."""
    return any(fnmatchcase(name, pattern) for pattern in optimizer.freeze)


def _checkpoint_model(path: str) -> ModelConfig:
    """From the newest readable manifest; all checkpoints of one run hold the same architecture."""
    for folder in checkpoint_folders(Path(path)):
        try:
            return manifests.read(folder).model
        except CheckpointError:
            continue  # `run_store.latest` decides, and logs, which checkpoint is used
    raise ConfigError(f"init.path={path!r} holds no checkpoint: give a run folder, or one of its checkpoints.")
