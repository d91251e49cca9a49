"""`OptimizerConfig` and `ScheduleConfig`, without torch."""

from dataclasses import dataclass
from typing import Literal

from earthshine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters of `optim.muon.Muon`. The defaults are Moonlight's (arXiv:2502.16982 sections 2 and 3).

    algorithm: "muon" gives matrices to Muon and the rest to AdamW; "adamw" gives everything to AdamW.
    lr: peak learning rate, shared by both halves: `update_rms` puts Muon's step on AdamW's scale.
    weight_decay: decoupled, multiplied by the unscaled lr, on every parameter including norms and embeddings.
    momentum, nesterov, update_rms: of Muon; the update is update_rms * sqrt(max(rows, cols)) * Newton-Schulz.
    beta1, beta2, eps: of AdamW.
    ns_coefficients, ns_steps: the table of `ops.orthogonalize.COEFFICIENTS` and how many of its steps are taken.
    ns_dtype: type of Newton-Schulz; "auto" is fp32 on a CPU unless bf16 is measured faster, bf16 elsewhere.
    ns_form: "standard" is torch.optim.Muon's order of operations; "gram" iterates on the small Gram matrix (fp32
        only); "auto" takes the cheaper by the rule of `ops.orthogonalize.choose_form`.
    freeze: name patterns (fnmatch) of parameters that are not trained.
    Raises ConfigError for a value outside its range.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    lr: float = 4.2e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    update_rms: float = 0.2
    ns_coefficients: Literal["keller5"] = "keller5"
    ns_steps: int = 5
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    ns_form: Literal["standard", "gram", "auto"] = "standard"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps", "update_rms"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"optimizer.{name}={value} must be a finite number of at least 0.")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"optimizer.{name}={value} must be at least 0 and below 1.")
        if not 1 <= self.ns_steps <= 100:
            raise ConfigError(f"optimizer.ns_steps={self.ns_steps} must be between 1 and 100; Moonlight uses 5.")
        choices = {
            "algorithm": ("muon", "adamw"),
            "ns_coefficients": ("keller5",),
            "ns_dtype": ("auto", "float32", "bfloat16"),
            "ns_form": ("standard", "gram", "auto"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if self.ns_form == "gram" and self.ns_dtype == "bfloat16":
            raise ConfigError(
                'optimizer.ns_form="gram" with ns_dtype="bfloat16" diverges (singular values above 2): '
                'use ns_dtype="float32", or ns_form="standard" or "auto".'
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves; `optim.schedule.learning_rate` evaluates it.

    kind: "constant"; "cosine" from the peak to final_fraction of it; "wsd" (warm-up, stable, decay: linear to
        final_fraction over the last decay_steps).
    warmup_steps: linear from peak/warmup_steps at step 0; before every kind. 0 for none.
    decay_steps: only for "wsd", where it must be positive.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ConfigError(f"schedule.kind={self.kind!r} must be one of cosine, wsd, constant.")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} must not be negative."
            )
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"schedule.final_fraction={self.final_fraction} must be between 0 and 1 (of the peak).")
        if self.kind == "wsd" and self.decay_steps == 0:
            raise ConfigError("schedule.decay_steps=0 must be positive for kind='wsd': how many last steps decay.")
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(
                f"schedule.decay_steps={self.decay_steps} only means something for kind='wsd': set it to 0."
            )
