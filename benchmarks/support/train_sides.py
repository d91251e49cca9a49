"""The two sides of `train_step.py`: the same model with the same weights in this package and in transformers.

Everything here runs in a process of its own: `prepare` (weights), `probe` (one side alone: its memory, and whether it
is worth timing) and `measure` (all sides in turns). Shapes: B sequences, S positions.
"""

import gc
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from earthshine.checkpoint.hf import read_config
from earthshine.checkpoint.load import load_model
from earthshine.console import log
from earthshine.device import DTYPES, environment, gemm_peak, peak_memory_bytes, total_memory_bytes
from earthshine.model.config import ModelConfig, MoEConfig
from earthshine.model.counts import count_parameters, train_flops_per_token
from earthshine.model.training_options import BalanceConfig, TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.build import build_optimizer
from earthshine.optim.config import OptimizerConfig

# Relative differences to transformers' own float32 loss and gradient norm. In bf16, and in float32 matmuls that may be
# rounded, a token near a tie between two experts may choose the other one; and transformers rounds its router too.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
LR = 1e-4
# The fraction of the machine's memory that one side may hold: beyond it the system would kill processes.
MEMORY_FRACTION = 0.8
PROFILE_ROWS = 15

_COMMON = {
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_MIXTRAL = _COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
# name -> (transformers' config class, its fields). The active parameters of the first three are alike.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _MIXTRAL | {"hidden_size": 256, "intermediate_size": 704}),
    "deepseek": (
        "DeepseekV3Config",
        _COMMON
        | {"hidden_size": 256, "intermediate_size": 704, "moe_intermediate_size": 176, "n_routed_experts": 64}
        | {"num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {"q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    ),
    "llama": ("LlamaConfig", _COMMON | {"hidden_size": 256, "intermediate_size": 1408}),
    "h512": ("MixtralConfig", _MIXTRAL | {"hidden_size": 512, "intermediate_size": 1408}),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, but for the sides. `directory` holds the weights, as transformers saved them."""

    model: str
    dtype: str
    threads: int
    device: str
    precision: str
    tokens: int
    seq_len: int
    directory: str = ""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One contender.

    experts: transformers' experts implementation, or this package's backend.
    attention: transformers' attention implementation; "" for this package, which chooses itself.
    autocast: of transformers: parameters in float32 and matmuls in bf16, as in this package.
    dense: not the model, but the dense one of equal active FLOPs.
    """

    library: str
    experts: str
    attention: str = ""
    compiled: bool = False
    autocast: bool = False
    dense: bool = False

    @property
    def ours(self) -> bool:
        return self.library == "earthshine"

    @property
    def name(self) -> str:
        words = [self.library, self.experts and f"{self.experts} experts", self.attention]
        words += ["compiled" if self.compiled else "", "autocast" if self.autocast else ""]
        words += ["DENSE of equal active FLOPs" if self.dense else ""]
        return ", ".join(filter(None, words))


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def batch(case: Case) -> Tensor:
    """int64 (B, S), the same in every process."""
    shape = (case.tokens // case.seq_len, case.seq_len)
    tokens_BS = torch.randint(3, _COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    return tokens_BS.to(case.device)


def dense_equivalent(config: ModelConfig) -> ModelConfig:
    """The dense model whose feed-forward networks are as wide as what one token passes through."""
    width = config.moe.top_k * config.moe.intermediate_size + config.moe.shared_intermediate_size
    return replace(config, moe=MoEConfig(), model_type="", intermediate_size=width)


def quiet_transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def build(side: Side, case: Case) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A side's model in training mode, and its mean loss over the next-token targets of `batch`."""
    tokens_BS = batch(case)
    if not side.ours:
        implementations = {"attn_implementation": side.attention}
        if side.experts:
            implementations["experts_implementation"] = side.experts
        dtype = torch.float32 if side.autocast else DTYPES[case.dtype]
        model = quiet_transformers().AutoModelForCausalLM.from_pretrained(
            case.directory, dtype=dtype, **implementations
        )
        model.to(case.device).train()
        run = torch.compile(model) if side.compiled else model
        cast = torch.autocast(torch.device(case.device).type, DTYPES[case.dtype], enabled=side.autocast)

        def loss() -> Tensor:
            with cast:
                return run(input_ids=tokens_BS, labels=tokens_BS).loss

        return model, loss
    loaded = load_model(case.directory)
    config = dense_equivalent(loaded.config) if side.dense else loaded.config
    backend = side.experts or "auto"
    no_loss = TrainingOptions(balance=BalanceConfig(loss="none"))  # as transformers' objective has none
    with torch.device(case.device):
        ours = Transformer(config, DTYPES[case.dtype], backend, training=no_loss)  # type: ignore[arg-type]
    if side.dense:
        initialize(ours, seed=0)
    else:
        ours.load_state_dict(loaded.state_dict())
    if side.compiled:
        ours.compile_blocks()
    targets_BS = torch.cat([tokens_BS[:, 1:], torch.full_like(tokens_BS[:, :1], -100)], dim=1)
    num_targets = targets_BS.numel() - targets_BS.shape[0]
    return ours, lambda: ours.losses(tokens_BS, targets_BS).nll / num_targets


def gradient_norm(model: nn.Module) -> float:
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(squares))


class Runner:
    """One side, ready to step. The first forward and backward pass, which may compile, is held to the reference.

    Raises ValueError where the loss or the gradient is not the reference's: a wrong model is not timed.
    """

    def __init__(self, side: Side, case: Case) -> None:
        self.side, self.device = side, case.device
        self.model, self.loss = build(side, case)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self.times: dict[str, list[float]] = {"forward": [], "backward": [], "adamw": []}
        start = self._now()
        first = self.loss()
        first.backward()
        self.first_seconds = self._now() - start
        self.first_loss, self.first_norm = first.item(), gradient_norm(self.model)
        self._check(case)
        self.adamw.step()
        self.adamw.zero_grad()

    def _check(self, case: Case) -> None:
        got = {"loss": self.first_loss, "gradient norm": self.first_norm}
        if not all(map(math.isfinite, got.values())):
            raise ValueError(f"not finite: {got}")
        if self.side.dense:
            return
        reference = json.loads(reference_path(case.directory).read_text())
        tolerances = TOLERANCES[case.dtype if case.precision == "highest" else "bfloat16"]
        for (what, value), tolerance in zip(got.items(), tolerances, strict=True):
            error = abs(value - reference[what]) / abs(reference[what])
            if error > tolerance:
                raise ValueError(
                    f"its {what} is {value:.6f}, but transformers' in float32 is {reference[what]:.6f}: "
                    f"{error:.1e} apart, where {tolerance:.0e} is allowed. A wrong model is not timed."
                )

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def step(self, before_zero: Callable[[], None] = lambda: None) -> float:
        """One timed training step; its seconds. `before_zero` is run, outside these, while there are gradients."""
        start = self._now()
        loss = self.loss()
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.adamw.step()
        end = self._now()
        before_zero()
        self.adamw.zero_grad()
        for name, seconds in (
            ("forward", forward - start),
            ("backward", backward - forward),
            ("adamw", end - backward),
        ):
            self.times[name].append(seconds)
        self.last_loss = loss.item()
        return end - start


class MatmulRate:
    """The rate of square matmuls in a dtype, of a size that reaches the device's peak."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.size = device, 256
        self._fill(dtype)
        while self._seconds() < 0.1 and self.size < 8192:
            self.size *= 2
            self._fill(dtype)

    def _fill(self, dtype: torch.dtype) -> None:
        self.matrix = torch.randn(self.size, self.size, generator=torch.Generator().manual_seed(0))
        self.matrix = self.matrix.to(self.device, dtype)
        self._seconds()  # cold

    def _seconds(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self.matrix @ self.matrix
        synchronize(self.device)
        return time.perf_counter() - start

    def rate(self) -> float:
        """FLOP/s, of the best of three."""
        return 2 * self.size**3 / min(self._seconds() for _ in range(3))


def reference_path(directory: str) -> Path:
    return Path(directory).with_suffix(".json")


def prepare(case: Case) -> dict[str, Any]:
    """Write the weights, and the loss and gradient norm of transformers' plainest implementations in float32.

    They are drawn so wide that scores are of the order of 1: with transformers' own 0.02, softmaxes are so flat that
    an error in the positions would hardly show in the loss.
    """
    name, fields = MODELS[case.model]
    transformers = quiet_transformers()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields, initializer_range=fields["hidden_size"] ** -0.5)
    eager = {"attn_implementation": "eager"} | ({} if case.model == "llama" else {"experts_implementation": "eager"})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    model.save_pretrained(case.directory)
    model.to(case.device).train()
    tokens_BS = batch(case)
    loss = model(input_ids=tokens_BS, labels=tokens_BS).loss
    loss.backward()
    reference = {"loss": loss.item(), "gradient norm": gradient_norm(model)}
    reference_path(case.directory).write_text(json.dumps(reference))
    return reference


def peaks(case: Case) -> dict[str, Any]:
    """GEMM rates, in FLOP/s, that decide whether bf16 is worth measuring."""
    return {name: gemm_peak(case.device, DTYPES[name]) for name in TOLERANCES}


def _resident_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def probe(case: Case, side: Side) -> dict[str, Any]:
    """The time of one step and the most memory held while stepping, less what the imports took.

    On a CPU with a bound on memory, so that an implementation that copies every expert's weights for every token fails
    here and does not take the machine down.
    """
    on_cpu = torch.device(case.device).type == "cpu"
    if not side.ours:  # imported before the memory is looked at
        getattr(quiet_transformers(), MODELS[case.model][0].replace("Config", "ForCausalLM"))
    if on_cpu:
        import resource

        with suppress(OSError, ValueError):  # not every system can
            limit = int(MEMORY_FRACTION * total_memory_bytes())
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    base = _resident_bytes() if on_cpu else 0
    runner = Runner(side, case)
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, without what loading took
    seconds = [runner.step() for _ in range(2)]
    peak = peak_memory_bytes(case.device)
    return {
        "peak_bytes": peak,
        "import_bytes": base,
        "memory_bytes": peak - base,
        "first_seconds": runner.first_seconds,
        "step_seconds": min(seconds),
    }


def measure(case: Case, sides: list[Side], rounds: int, profile: bool) -> dict[str, Any]:
    """All times of all sides, in rounds: in each a matmul, then every side's step, starting with another side.

    Muon steps on this package's model at a learning rate of 0, which does all of the work and changes no weight.
    """
    torch._dynamo.config.recompile_limit = 64  # one limit for all the sides that share a function
    runners = [Runner(side, case) for side in sides]
    matmul = MatmulRate(case.device, DTYPES[case.dtype])
    ours = next(r for r in runners if r.side.ours and not r.side.dense)
    muon, muon_times = build_optimizer(ours.model, OptimizerConfig(lr=0.0)), []

    def step_muon() -> None:
        start = time.perf_counter()
        muon.step()
        synchronize(case.device)
        muon_times.append(time.perf_counter() - start)

    for runner in runners:  # warm
        runner.step(step_muon if runner is ours else lambda: None)
        runner.times = {name: [] for name in runner.times}
    muon_times.clear()
    rates = []
    for i in range(rounds):
        log(f"  round {i + 1} of {rounds}")
        rates.append(matmul.rate())
        first = i % len(runners)
        for runner in runners[first:] + runners[:first]:
            gc.collect()
            runner.step(step_muon if runner is ours else lambda: None)
    if profile:  # whose step is slower: it is not one of the samples
        for runner in runners:
            samples = {name: list(times) for name, times in runner.times.items()}
            log(f"{runner.side.name}\n{profiled(runner)}")
            runner.times = samples
    config = read_config(case.directory)
    counts = count_parameters(config)
    return {
        "gemm_size": matmul.size,
        "gemm_flops_per_second": rates,
        "flops_per_token": train_flops_per_token(config, case.seq_len),
        "dense_flops_per_token": train_flops_per_token(dense_equivalent(config), case.seq_len) if config.is_moe else 0,
        "active_parameters": counts.active - config.vocab_size * config.hidden_size,  # the head, but not the embedding
        "total_parameters": counts.total,
        "muon_seconds": muon_times,
        "environment": environment(torch.device(case.device)),
        "sides": [
            {"first_seconds": r.first_seconds, "first_loss": r.first_loss, "last_loss": r.last_loss, **r.times}
            | {"first_gradient_norm": r.first_norm}
            for r in runners
        ],
    }


def profiled(runner: Runner) -> str:
    """Where one step's time goes, by operator."""
    kinds = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=kinds) as trace:
        runner.step()
    key = "self_cpu_time_total" if runner.device == "cpu" else "self_device_time_total"
    return str(trace.key_averages().table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=50))
