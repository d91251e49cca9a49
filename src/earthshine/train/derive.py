"""`derive`: every number that follows from a job before anything runs. No torch import."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from earthshine.console import human_bytes, human_count, human_seconds, table
from earthshine.data.usage import MANY_EPOCHS, SourceUse, fingerprint, source_uses
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.counts import count_parameters, recomputed_flops_per_token, train_flops_per_token
from earthshine.model.parameters import parameter_shapes, router_biases
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.cost import cost
from earthshine.train.job import TrainJob, check_model, is_frozen, model_config, qk_clip_layers


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What follows from a job before anything runs. FLOPs count 2 per multiply-accumulate of matmuls.

    Bytes are of one process that holds everything, without activations, which depend on the micro-batch.
    Frozen parameters are neither in gradients and optimizer nor in the FLOPs of their gradients; in the layers of
    `frozen_router_biases` the choice bias stays, too. `repeated_forward_flops_per_step` are those of recomputation and
    of the routing pass of balance.scope="step". `qk_clip_layers` have heads that QK-Clip clips, () where it is off; its
    FLOPs, at most one of attention's matmuls, are not counted. `sources` is what the run takes of its data, () where
    they cannot be read here, and `heldout_sha256` the fingerprint of the held-out ones, "" likewise. `warnings` name
    what is allowed and probably not meant.
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
    qk_clip_threshold: float
    qk_clip_layers: tuple[int, ...]
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
        """Human-readable; with a measured rate also the time at that rate, a lower bound: no real run reaches it."""
        once = self.forward_backward_flops_per_step

        def beside(flops: float) -> str:
            return f"{flops:.3g} ({flops / once:.1%} of forward and backward)"

        repeated, biases = self.repeated_forward_flops_per_step, self.frozen_router_biases
        micro_batches = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        rows: list[tuple[str, str]] = [
            ("parameters", f"{self.parameters:,}"),
            ("active per token", f"{self.active_parameters:,}"),
            ("trained by Muon", f"{self.muon_parameters:,}"),
            ("trained by AdamW", f"{self.adamw_parameters:,}"),
            *([("trained by Scion", f"{self.scion_parameters:,}")] if self.scion_parameters else []),
            *([("frozen", f"{self.frozen_parameters:,}")] if self.frozen_parameters else []),
            *([("router bias frozen in layers", ", ".join(map(str, biases)))] if biases else []),
            *([("QK-Clip", self._clipping())] if self.qk_clip_threshold else []),
            ("steps", f"{self.num_steps:,}"),
            ("tokens per step", f"{self.tokens_per_step:,} in {micro_batches}"),
            ("total tokens", human_count(self.total_tokens)),
            *((f"epochs of {use.path}", f"{use.epochs:.2f}") for use in self.sources),
            ("forward and backward, FLOPs per step", f"{once:.3g}"),
            ("Newton-Schulz, FLOPs per step", beside(self.newton_schulz_flops_per_step)),
            *([("forward once more, FLOPs per step", beside(repeated))] if repeated else []),
            ("total FLOPs", f"{self.total_flops:.3g}"),
            ("memory: parameters", human_bytes(self.parameter_bytes)),
            ("memory: gradients", human_bytes(self.gradient_bytes)),
            ("memory: optimizer", human_bytes(self.optimizer_bytes)),
            ("memory: sum, before activations", human_bytes(self.state_bytes)),
        ]
        if flops_per_second:
            seconds = self.total_flops / flops_per_second
            rate = f"{flops_per_second / 1e9:,.0f} GFLOP/s"
            rows.append((f"time at the measured {rate} (lower bound)", human_seconds(seconds)))
        return table(("derived", "value"), rows)

    def _clipping(self) -> str:
        layers = len(self.qk_clip_layers)
        return f"attention logits above {self.qk_clip_threshold:g}, in {layers} layer{'s' if layers > 1 else ''}"


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
    counts, parameters = count_parameters(model), parameter_shapes(model)
    names = [w.name for w in parameters] + list(router_biases(model).values())
    for pattern in optimizer.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"optimizer.freeze pattern {pattern!r} matches none of the {len(parameters)} parameters.")
    frozen = {w.name for w in parameters if is_frozen(optimizer, w.name)}
    trained = [w for w in parameters if w.name not in frozen]
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
        frozen_parameters=sum(w.elements for w in parameters if w.name in frozen),
        frozen_router_biases=_frozen_biases(optimizer, model),
        qk_clip_threshold=optimizer.qk_clip_threshold,
        qk_clip_layers=qk_clip_layers(optimizer, model),
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
        if is_frozen(optimizer, name) or is_frozen(optimizer, f"blocks.{layer}.moe.router.weight")
    )


def _warnings(job: TrainJob, model: ModelConfig, sources: Sequence[SourceUse]) -> tuple[str, ...]:
    warnings = [
        f"the {human_count(use.tokens)} tokens of {use.path} are read {use.epochs:.1f} times (epochs): beyond "
        f"about {MANY_EPOCHS:.0f}, repeated tokens teach much less than new ones. Prepare more text, or train for less."
        for use in sources
        if use.epochs > MANY_EPOCHS
    ]
    capacity, moe = job.capacity, model.moe
    if capacity.factor and not capacity.can_drop(moe.num_experts, moe.top_k):
        never = moe.num_experts / (moe.top_k if capacity.relative_to == "per_assignment" else 1)
        warnings.append(
            f"capacity.factor={capacity.factor:g} can never drop a token: with {moe.num_experts} experts, "
            f"top-{moe.top_k}, an expert has room for every token from a factor of {never:g} on "
            f"(capacity.relative_to={capacity.relative_to!r}). capacity.factor=0 gives the same gradients."
        )
    if job.balance.scope == "micro_batch" and job.sequences_per_micro_batch < job.sequences_per_step:
        warnings.append(
            "balance.scope='micro_batch': the gradient depends on sequences_per_micro_batch="
            f"{job.sequences_per_micro_batch}. 'sequence' and 'step' give the same one for any."
        )
    if job.optimizer.qk_clip_threshold:
        clipped = qk_clip_layers(job.optimizer, model)
        frozen = [layer for layer in range(model.num_hidden_layers) if layer not in clipped]
        if frozen:
            warnings.append(
                f"QK-Clip skips layers whose queries or keys are frozen ({', '.join(map(str, frozen))}): their logits "
                f"are not in max_attention_logit."
            )
    return tuple(warnings)
