"""`TrainJob`: everything that defines a training run; and `derive`, every number that follows from it. No torch.

Names: B sequences, S positions; a step is one update of the parameters, made of one or more micro-batches.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from earthshine.checkpoint import manifest as manifests
from earthshine.config import decode, diff, encode
from earthshine.console import human_bytes, human_count, human_seconds, table
from earthshine.data.config import DataConfig
from earthshine.data.usage import MANY_EPOCHS, SourceUse, fingerprint, source_uses
from earthshine.errors import CheckpointError, ConfigError
from earthshine.files import expand_home
from earthshine.model.config import BalanceConfig, CapacityConfig, ModelConfig
from earthshine.model.counts import count_parameters, recomputed_flops_per_token, train_flops_per_token
from earthshine.model.hf_config import from_hf, read_hf_config
from earthshine.model.parameters import router_biases, weights
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.optim.cost import cost
from earthshine.optim.schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Start from a seeded random initialisation (`model.transformer.initialize`, with the job's seed)."""

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
    """Evaluation on other token shards: at step 0, every `every_steps` (0: not between) and at the end.

    path: a folder of token shards; "" for no evaluation. max_sequences: of `seq_len` tokens; 0 for all there are.
    """

    path: str = ""
    every_steps: int = 0
    max_sequences: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand_home(self.path))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saved every `every_steps` (0: not between), at the end and when interrupted; the newest `keep` stay (0: all)."""

    every_steps: int = 100
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run. Raises ConfigError where the fields contradict each other.

    On resume only these may differ from the run's config, because none changes a bit of a step: `name`, `tracker`,
    `checkpoint.*`, `heldout.every_steps`, `recompute`, `log_every`; `num_steps`, if every learning rate used so far
    stays what it was (a longer constant schedule, or WSD before its decay); and where data lie that are the same.

    Args:
        sequences_per_step: sequences in one update; the gradient is that of their mean loss per target token, and with
            experts of the losses of `balance` too (`train.step`).
        sequences_per_micro_batch: sequences in one forward and backward pass; it divides `sequences_per_step`.
        clip_grad_norm: largest global gradient norm (0: no clipping).
        seed: of the initialisation and of the order of the samples.
        compute_dtype: of activations and products; "auto" is decided once per run, at its first step.
        balance, capacity: how experts are kept evenly loaded, and how many tokens one takes; for models with experts.
        recompute: "block" keeps only the input of each decoder layer for the backward pass and computes the rest again:
            the same gradients to the bit, in less memory, for one more forward pass.
        compile: each decoder layer by `torch.compile`, which changes last bits.
        log_every: steps from one line of the log and of metrics.jsonl to the next; between them an accelerator is not
            waited for. Also after the last step, and before a checkpoint or an evaluation, there is one. A line's
            losses, norms and routing are those of its own step; its tokens, seconds, rates and samples are of all
            `steps` since the line before (named where it is more than one).
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
                f"{self.sequences_per_step}; use one of {_divisors(self.sequences_per_step)}."
            )
        if not (self.clip_grad_norm >= 0 and math.isfinite(self.clip_grad_norm)):
            raise ConfigError(f"clip_grad_norm={self.clip_grad_norm} must be 0 (no clipping) or a positive number.")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed} must not be negative, and be below 2**64.")
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
    settings for experts or a bias that it does not have, or an architecture that no Hugging Face class could hold."""
    if job.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"seq_len={job.seq_len} is more than model.max_position_embeddings={model.max_position_embeddings}."
        )
    _ = model.family  # raises for an architecture that could be trained and then not be exported
    _check_routing(job, model)


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
    if weighs_one and not all(_frozen(job.optimizer, name) for name in routers):
        other = "renormalize=false"
        if moe.gate == "topk_softmax":
            other = "gate='softmax_topk' with renormalize=false"
        raise ConfigError(
            f"model.moe.top_k=1 with gate={moe.gate!r} and renormalize=true gives the router no gradient: the weight "
            f"of the one expert is 1 whatever its logit, so routing would never be learned. Use top_k >= 2, "
            f'{other}, or freeze the routers (optimizer.freeze=["*.router.weight"]).'
        )


def _frozen(optimizer: OptimizerConfig, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in optimizer.freeze)


def _checkpoint_model(path: str) -> ModelConfig:
    """From the newest readable manifest; all checkpoints of one run hold the same architecture."""
    for folder in manifests.candidates(Path(path)):
        try:
            return manifests.read(folder).model
        except CheckpointError:
            continue  # `run_store.latest` decides, and says so, which checkpoint is used
    raise ConfigError(f"init.path={path!r} holds no checkpoint: give a run folder, or one of its checkpoints.")


# Prefixes of the fields that may change on resume; TrainJob's docstring says why.
_MAY_CHANGE = ("name", "tracker", "checkpoint", "heldout.every_steps", "recompute", "log_every")


def changes_on_resume(
    old: dict[str, Any], job: TrainJob, steps_done: int, same_data: frozenset[str] = frozenset()
) -> list[str]:
    """The differences between a run's saved config and `job` that would make it another run, as 'path: old -> new'.

    Args:
        old: the encoded job of the run folder. A field that it lacks, because it was added since, had its default.
        steps_done: steps of the checkpoint that would be resumed from.
        same_data: "data" and "heldout" where the data are the same, if in another place.
    """
    if not isinstance(old, dict):
        raise ConfigError(f"the saved config is a {type(old).__name__}, not that of a run: restore config.json.")
    old = completed(old)
    lines = diff(_in_their_old_place(old, encode(job), same_data), encode(job))
    refused = [line for line in lines if not _allowed(line.partition(": ")[0])]
    only_length = [line.partition(": ")[0] for line in refused] == ["num_steps"]
    before = old.get("num_steps")
    if only_length and isinstance(before, int) and job.num_steps >= steps_done and _same_rates(job, before, steps_done):
        return []
    return refused


def completed(old: dict[str, Any]) -> dict[str, Any]:
    """A saved job, encoded, with the defaults of the fields that were added since."""
    with suppress(ConfigError):  # a field that is no more, or a job that is none: the differences say it
        return dict(encode(decode(TrainJob, old)))
    return old


def _in_their_old_place(old: dict[str, Any], new: dict[str, Any], same_data: frozenset[str]) -> dict[str, Any]:
    """`old` with the paths of `new` where they lead to the same: another spelling, or data that were moved."""

    def settle(then: Any, now: Any, moved: bool) -> Any:
        if not isinstance(then, dict) or not isinstance(now, dict) or not (then.get("path") and now.get("path")):
            return then
        same = moved or Path(then["path"]).resolve() == Path(now["path"]).resolve()
        return {**then, "path": now["path"]} if same else then

    if not all(isinstance(old.get(key), dict) for key in ("init", "heldout", "data")):
        return old  # no job
    old = {**old, "init": settle(old["init"], new["init"], False)}
    old["heldout"] = settle(old["heldout"], new["heldout"], "heldout" in same_data)
    then = old["data"].get("sources")
    if isinstance(then, list) and len(then) == len(new["data"]["sources"]):
        pairs = zip(then, new["data"]["sources"], strict=True)
        old["data"] = {**old["data"], "sources": [settle(a, b, "data" in same_data) for a, b in pairs]}
    return old


def _allowed(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + ".") for prefix in _MAY_CHANGE)


def _same_rates(job: TrainJob, old_num_steps: int, steps_done: int) -> bool:
    return all(
        learning_rate(job.schedule, job.optimizer.lr, step, old_num_steps)
        == learning_rate(job.schedule, job.optimizer.lr, step, job.num_steps)
        for step in range(steps_done)
    )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What follows from a job before anything runs. FLOPs count 2 per multiply-accumulate of matrix products.

    Bytes are of one process that holds everything, without activations, which depend on the micro-batch.
    Frozen parameters are neither in gradients and optimizer nor in the FLOPs of their gradients; in the layers of
    `frozen_router_biases` the choice bias stays, too. `repeated_forward_flops_per_step` are those of recomputation and
    of the routing pass of balance.scope="step". `sources` is what the run takes of its data, () where they cannot be
    read here, and `heldout_sha256` the fingerprint of the held-out ones, "" likewise. `warnings` name what is allowed
    and probably not meant.
    """

    world: int
    num_steps: int
    tokens_per_step: int
    total_tokens: int
    sequences_per_rank: int
    micro_batches: int
    parameters: int
    active_parameters: int
    trainable_parameters: int
    muon_parameters: int
    adamw_parameters: int
    scion_parameters: int
    frozen_parameters: int
    frozen_router_biases: tuple[int, ...]
    forward_backward_flops_per_step: float
    repeated_forward_flops_per_step: float
    newton_schulz_flops_per_step: float
    total_flops: float
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    sources: tuple[SourceUse, ...]
    heldout_sha256: str
    warnings: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    def table(self, flops_per_second: float = 0.0) -> str:
        """For people; with a measured rate also the time at that rate, which no real run reaches."""
        once = self.forward_backward_flops_per_step

        def beside(flops: float) -> str:
            return f"{flops:.3g} ({flops / once:.1%} of forward and backward)"

        repeated, biases = self.repeated_forward_flops_per_step, self.frozen_router_biases
        rows: list[tuple[str, str]] = [
            ("parameters", f"{self.parameters:,}"),
            ("active per token", f"{self.active_parameters:,}"),
            ("trained by Muon", f"{self.muon_parameters:,}"),
            ("trained by AdamW", f"{self.adamw_parameters:,}"),
            *([("trained by Scion", f"{self.scion_parameters:,}")] if self.scion_parameters else []),
            *([("frozen", f"{self.frozen_parameters:,}")] if self.frozen_parameters else []),
            *([("router bias frozen in layers", ", ".join(map(str, biases)))] if biases else []),
            ("steps", f"{self.num_steps:,}"),
            ("tokens per step", f"{self.tokens_per_step:,} in {self.micro_batches} micro-batches"),
            ("tokens in all", human_count(self.total_tokens)),
            *((f"epochs of {use.path}", f"{use.epochs:.2f}") for use in self.sources),
            ("forward and backward, FLOPs per step", f"{once:.3g}"),
            ("Newton-Schulz, FLOPs per step", beside(self.newton_schulz_flops_per_step)),
            *([("forward once more, FLOPs per step", beside(repeated))] if repeated else []),
            ("FLOPs in all", f"{self.total_flops:.3g}"),
            ("memory: parameters", human_bytes(self.parameter_bytes)),
            ("memory: gradients", human_bytes(self.gradient_bytes)),
            ("memory: optimizer", human_bytes(self.optimizer_bytes)),
            ("memory: sum, before activations", human_bytes(self.state_bytes)),
        ]
        if flops_per_second:
            seconds = self.total_flops / flops_per_second
            rows.append((f"at {flops_per_second / 1e9:.0f} GFLOP/s", human_seconds(seconds)))
        return table(("derived", "value"), rows)


def derive(job: TrainJob, world: int = 1, model: ModelConfig | None = None) -> Derived:
    """Every derived number of a job on `world` processes.

    model: the architecture, where it is known; else `model_config(job)`, which for a warm start reads a JSON file. Of
    the data only index.json is read.
    Raises ConfigError when the sequences do not divide over the processes, for a pattern of `optimizer.freeze` that
    matches nothing or patterns that match everything, and as `check_model` does.
    """
    per_rank = job.sequences_per_step // world
    if job.sequences_per_step % world or per_rank % job.sequences_per_micro_batch:
        raise ConfigError(
            f"sequences_per_step={job.sequences_per_step} does not divide into {world} processes with micro-batches of "
            f"sequences_per_micro_batch={job.sequences_per_micro_batch}."
        )
    model, optimizer = model or model_config(job), job.optimizer
    check_model(job, model)
    counts, found = count_parameters(model), weights(model)
    names = [w.name for w in found] + list(router_biases(model).values())
    for pattern in optimizer.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"optimizer.freeze pattern {pattern!r} matches none of the {len(found)} parameters.")
    frozen = {w.name for w in found if _frozen(optimizer, w.name)}
    trained = [w for w in found if w.name not in frozen]
    if not trained:
        raise ConfigError(f"optimizer.freeze={list(optimizer.freeze)} leaves no parameter to train.")
    trainable, by = sum(w.elements for w in trained), cost(optimizer, trained)
    newton_schulz = by["muon"].newton_schulz_flops
    forward_backward = train_flops_per_token(model, job.seq_len, frozen=frozen) * job.tokens_per_step
    repeated = 0.0
    if job.balance.scope == "step":  # a routing pass through all blocks
        repeated += recomputed_flops_per_token(model, job.seq_len) * job.tokens_per_step
    if job.recompute == "block":
        repeated += recomputed_flops_per_token(model, job.seq_len, frozen=frozen) * job.tokens_per_step
    sources = source_uses(job.data, seq_len=job.seq_len, sequences=job.sequences_per_step * job.num_steps)
    return Derived(
        world=world,
        num_steps=job.num_steps,
        tokens_per_step=job.tokens_per_step,
        total_tokens=job.tokens_per_step * job.num_steps,
        sequences_per_rank=per_rank,
        micro_batches=per_rank // job.sequences_per_micro_batch,
        parameters=counts.total,
        active_parameters=counts.active,
        trainable_parameters=trainable,
        muon_parameters=by["muon"].elements,
        adamw_parameters=by["adamw"].elements,
        scion_parameters=by["scion"].elements,
        frozen_parameters=sum(w.elements for w in found if w.name in frozen),
        frozen_router_biases=_frozen_biases(optimizer, model),
        forward_backward_flops_per_step=forward_backward,
        repeated_forward_flops_per_step=repeated,
        newton_schulz_flops_per_step=newton_schulz,
        total_flops=(forward_backward + repeated + newton_schulz) * job.num_steps,
        parameter_bytes=4 * counts.total,
        gradient_bytes=4 * trainable,
        optimizer_bytes=sum(c.state_bytes for c in by.values()),
        sources=sources,
        heldout_sha256=fingerprint(job.heldout.path),
        warnings=_warnings(job, model, sources),
    )


def _frozen_biases(optimizer: OptimizerConfig, model: ModelConfig) -> tuple[int, ...]:
    """Layers whose router's choice bias stays: its weight is frozen, or itself (`model.moe.Router`)."""
    return tuple(
        layer
        for layer, name in router_biases(model).items()
        if _frozen(optimizer, name) or _frozen(optimizer, f"blocks.{layer}.moe.router.weight")
    )


def _warnings(job: TrainJob, model: ModelConfig, sources: Sequence[SourceUse]) -> tuple[str, ...]:
    found = [
        f"the {human_count(use.tokens)} tokens of {use.path} are gone through {use.epochs:.1f} times (epochs): beyond "
        f"about {MANY_EPOCHS:.0f}, repeated tokens teach much less than new ones. Prepare more text, or train for less."
        for use in sources
        if use.epochs > MANY_EPOCHS
    ]
    capacity, moe = job.capacity, model.moe
    if capacity.factor and not capacity.can_drop(moe.num_experts, moe.top_k):
        never = moe.num_experts / (moe.top_k if capacity.meaning == "per_assignment" else 1)
        found.append(
            f"capacity.factor={capacity.factor:g} can never drop a token: with {moe.num_experts} experts, "
            f"top-{moe.top_k}, an expert has room for every token from a factor of {never:g} on "
            f"(capacity.meaning={capacity.meaning!r}). capacity.factor=0 gives the same gradients."
        )
    if job.balance.scope == "micro_batch" and job.sequences_per_micro_batch < job.sequences_per_step:
        found.append(
            "balance.scope='micro_batch': the gradient depends on sequences_per_micro_batch="
            f"{job.sequences_per_micro_batch}. 'sequence' and 'step' give the same one for any."
        )
    return tuple(found)
