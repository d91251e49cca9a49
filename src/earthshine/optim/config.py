"""`OptimizerConfig` and `ScheduleConfig`, without torch."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from earthshine.errors import ConfigError

# Steps that each table of `ops.orthogonalize.COEFFICIENTS` is made for; repeated here so that a job needs no torch.
NS_STEPS = {"keller5": 5, "you5": 5, "polar_express": 5, "deepseek_v4": 10}
_SCALES = ("match_rms_adamw", "original", "spectral")
_NS_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Numbers of at least 0; those of the second line are also below 1.
_SIZES = ("lr", "weight_decay", "eps", "update_rms", "schatten_p")
_FRACTIONS = ("momentum", "beta1", "beta2", "normuon_beta2")


def check_number(name: str, value: Any) -> None:
    """ConfigError where the value of a numeric option is no number, or none in its range."""
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers among them
        hint = "; YAML reads 1e-3 as text, and 1.0e-3 as a number" if isinstance(value, str) else ""
        raise ConfigError(f"optimizer.{name}={value!r} is of type {type(value).__name__}: it must be a number{hint}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if name in _FRACTIONS and not 0 <= number < 1:
        raise ConfigError(f"optimizer.{name}={value} must be at least 0 and below 1.")
    if name in _SIZES and not (number >= 0 and (math.isfinite(number) or name == "schatten_p")):
        raise ConfigError(f"optimizer.{name}={value} must be a finite number of at least 0.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters of `optim.muon.Muon`. The defaults are Moonlight's (arXiv:2502.16982 sections 2 and 3).

    algorithm: "muon" gives matrices to Muon and the rest to `rest`; "adamw" gives everything to AdamW.
    rest: who gets embeddings, head, norms and vectors: "adamw", or "scion" (its norm-ball steps, `optim.scion`).
    router: who gets the routers' matrices: "muon" as Moonlight does, or "adamw".
    heads: "whole" orthogonalizes a projection as it is stored, "split" each attention head's rows by themselves.
    lr: peak learning rate, shared by all: `update_rms` puts Muon's step on AdamW's scale.
    weight_decay: decoupled, multiplied by the unscaled lr, on every parameter including norms and embeddings.
    momentum, nesterov: of Muon. momentum_dtype: the type it is kept in; "float32" means at least that.
    scale: what the orthogonal matrix is multiplied by: "match_rms_adamw" (Moonlight) update_rms * sqrt(max(rows,
        cols)), "original" (K. Jordan) sqrt(max(1, rows / cols)), "spectral" sqrt(rows / cols), or the name of a
        rule registered by `optim.rules.register_scale`.
    exact_rms: measure the update and give it RMS update_rms exactly (Moonlight's "Update Norm").
    norm, schatten_p: "spectral" is Muon; "schatten" the steepest step under the Schatten-p norm, by SVD, 1 < p.
    beta1, beta2, eps: of AdamW.
    normuon_beta2: above 0 switches NorMuon on (arXiv:2510.05491; it takes 0.95).
    cautious_weight_decay: decay only elements that the update shrinks as well (arXiv:2510.12402).
    skip_idle: no update for a matrix whose gradient is zero everywhere (an expert without tokens): see `optim.muon`.
    ns_coefficients: a table of `ops.orthogonalize.COEFFICIENTS`, or "table": the rows (a, b, c) of `ns_table`.
    ns_steps: how many steps are taken; 0 for as many as the table is made for.
    ns_dtype: type of Newton-Schulz; "auto" is fp32 on a CPU unless bf16 is measured faster, bf16 elsewhere.
    ns_form: "standard" is torch.optim.Muon's order of operations; "gram" iterates on the small Gram matrix;
        "auto" takes the faster by the rule of `ops.orthogonalize.choose_form`.
    ns_compile: run Newton-Schulz through torch.compile.
    payload_dtype: type in which matrices that are spread over processes travel; "auto" is bf16 where Newton-Schulz
        runs below fp32, else fp32.
    freeze: name patterns (fnmatch) of parameters that are not trained. The choice bias of a router whose weight is
        frozen stays as well; by its own name, "*.router.bias_E", it stays although the weight is trained.
    Raises ConfigError for a value outside its range.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    rest: Literal["adamw", "scion"] = "adamw"
    router: Literal["muon", "adamw"] = "muon"
    heads: Literal["whole", "split"] = "whole"
    lr: float = 4.2e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    update_rms: float = 0.2
    scale: str = "match_rms_adamw"
    exact_rms: bool = False
    norm: Literal["spectral", "schatten"] = "spectral"
    schatten_p: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    normuon_beta2: float = 0.0
    cautious_weight_decay: bool = False
    skip_idle: bool = False
    ns_coefficients: Literal["keller5", "you5", "polar_express", "deepseek_v4", "table"] = "keller5"
    ns_table: tuple[tuple[float, float, float], ...] = ()
    ns_steps: int = 0
    ns_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ns_form: Literal["standard", "gram", "auto"] = "auto"
    ns_compile: bool = False
    payload_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_FRACTIONS):
            check_number(name, getattr(self, name))
        steps: Any = self.ns_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 100:
            raise ConfigError(
                f"optimizer.ns_steps={self.ns_steps} must be a whole number from 1 to 100, or 0 for the table's own."
            )
        choices = {
            "algorithm": ("muon", "adamw"),
            "rest": ("adamw", "scion"),
            "router": ("muon", "adamw"),
            "heads": ("whole", "split"),
            "momentum_dtype": ("float32", "bfloat16"),
            "norm": ("spectral", "schatten"),
            "ns_coefficients": (*NS_STEPS, "table"),
            "ns_dtype": _NS_DTYPES,
            "ns_form": ("standard", "gram", "auto"),
            "payload_dtype": ("auto", "float32", "bfloat16"),
        }
        for name, known in choices.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if (self.ns_coefficients == "table") != bool(self.ns_table):
            raise ConfigError(
                f"optimizer.ns_coefficients={self.ns_coefficients!r} with ns_table of {len(self.ns_table)} rows: a "
                f'table of your own needs both ns_coefficients="table" and rows (a, b, c) in ns_table.'
            )
        self._check_update()

    def _check_update(self) -> None:
        """Options that exclude each other: each would otherwise be ignored in silence."""
        if (self.norm == "schatten") != (self.schatten_p > 1):
            raise ConfigError(
                f"optimizer.norm={self.norm!r} with schatten_p={self.schatten_p}: norm='schatten' needs schatten_p "
                f"above 1 (infinity is Muon, 2 is the normalised gradient), norm='spectral' none (0)."
            )
        for name, on in (("exact_rms", self.exact_rms), ("normuon_beta2", self.normuon_beta2 > 0)):
            if on and self.scale != "match_rms_adamw":
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} sets the RMS of the update itself, so scale="
                    f"{self.scale!r} would mean nothing: use scale='match_rms_adamw'."
                )
        if self.exact_rms and self.normuon_beta2:
            raise ConfigError("optimizer.exact_rms=True and normuon_beta2 > 0: NorMuon's RMS is exact already.")

    @property
    def newton_schulz_steps(self) -> int:
        """How many Newton-Schulz steps are taken."""
        return self.ns_steps or NS_STEPS.get(self.ns_coefficients) or len(self.ns_table)


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
