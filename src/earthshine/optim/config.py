"""`GroupOptions`, `OptimizerConfig` and `ScheduleConfig`, without torch."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from earthshine.errors import ConfigError
from earthshine.ops.newton_schulz_tables import Form, Table, default_steps

P = ParamSpec("P")
T = TypeVar("T")


def _option(default: T, **about: Any) -> T:
    """A field. about: static=True where plan and state of a group are made by it, so that no loop may set it; below=1
    for numbers below 1; infinite=True for those that may be infinite; was: the name that it had before.
    """
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """What may be set per parameter group of `optim.muon.Muon`. The defaults are Moonlight's (arXiv:2502.16982).

    lr: peak learning rate, shared by all algorithms: `update_rms` puts Muon's step on AdamW's scale.
    weight_decay: decoupled, multiplied by the unscaled lr, on every parameter including norms and embeddings.
    momentum, nesterov: of Muon. momentum_dtype: the dtype it is kept in; "float32" means at least that.
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
    ns_dtype: dtype of Newton-Schulz; "auto" is fp32 on a CPU unless bf16 is measured faster, bf16 elsewhere
        (`device.resolve_ns_dtype`).
    ns_form: "standard" is torch.optim.Muon's order of operations; "gram" iterates on the small Gram matrix;
        "auto" takes the faster by the rule of `ops.orthogonalize.choose_form`.
    ns_compile: run Newton-Schulz through torch.compile.
    rounding: of new weights narrower than fp32: to "nearest", where small updates are lost, or "stochastic", where
        they arrive on average (`optim.rounding`). rounding_seed: its seed, alike on all ranks.
    comm_dtype: dtype in which matrices that are spread over processes travel; "auto" is bf16 where Newton-Schulz
        runs below fp32, else fp32.
    Raises ConfigError for a value outside its range.
    """

    lr: float = 4.2e-4
    weight_decay: float = 0.1
    momentum: float = _option(0.95, below=1)
    nesterov: bool = True
    beta1: float = _option(0.9, below=1)
    beta2: float = _option(0.95, below=1)
    eps: float = 1e-8
    update_rms: float = 0.2
    scale: str = "match_rms_adamw"
    exact_rms: bool = False
    norm: Literal["spectral", "schatten"] = "spectral"
    schatten_p: float = _option(0.0, infinite=True)
    ns_coefficients: Literal[Table, "table"] = _option("keller5", static=True)
    ns_table: tuple[tuple[float, float, float], ...] = _option((), static=True)
    ns_steps: int = _option(0, static=True)
    ns_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option("auto", static=True)
    ns_form: Form = _option("auto", static=True)
    ns_compile: bool = False
    momentum_dtype: Literal["float32", "bfloat16"] = _option("float32", static=True)
    normuon_beta2: float = _option(0.0, below=1, static=True)
    cautious_weight_decay: bool = False
    skip_idle: bool = _option(False, static=True)
    rounding: Literal["nearest", "stochastic"] = _option("nearest", static=True)
    rounding_seed: int = _option(0, static=True)
    comm_dtype: Literal["auto", "float32", "bfloat16"] = _option("auto", static=True, was="payload_dtype")

    def __post_init__(self) -> None:
        for option in fields(self):
            check_option(option.name, getattr(self, option.name))
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
                f"above 1 (infinity is Muon, 2 is the normalized gradient), norm='spectral' none (0)."
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
        return self.ns_steps or default_steps(self.ns_table or self.ns_coefficients)

    def as_group(self) -> dict[str, Any]:
        """As a parameter group holds them: AdamW's `betas` as one pair, as torch's schedulers expect, and in
        "ns_coefficients" a table's name or its rows."""
        group = {option.name: getattr(self, option.name) for option in fields(GroupOptions)}
        group["betas"] = (group.pop("beta1"), group.pop("beta2"))
        group["ns_coefficients"] = group.pop("ns_table") or self.ns_coefficients
        return group

    @staticmethod
    def of_group(group: Mapping[str, Any]) -> "GroupOptions":
        """Those of a parameter group: the inverse of `as_group`."""
        values: dict[str, Any] = {o.name: group[o.name] for o in fields(GroupOptions) if o.name in group}
        values |= {"lr": float(group["lr"]), "beta1": group["betas"][0], "beta2": group["betas"][1]}
        if not isinstance(group["ns_coefficients"], str):
            values |= {"ns_coefficients": "table", "ns_table": group["ns_coefficients"]}
        return GroupOptions(**values)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(GroupOptions):
    """A job's optimizer: who gets what, and the options of all groups.

    algorithm: "muon" gives matrices to Muon and the others to `non_matrix`; "adamw" gives everything to AdamW.
    non_matrix: who gets embeddings, head, norms and vectors: "adamw", or "scion" (its norm-ball steps, `optim.scion`).
    router: who gets the routers' matrices: "muon" as Moonlight does, or "adamw".
    heads: "whole" orthogonalizes a projection as it is stored, "split" each attention head's rows by themselves.
    qk_clip_threshold: after each step, attention heads whose largest logit of that step was above this are scaled back
        to it (QK-Clip, `optim.qk_clip`), whatever the algorithm. Kimi K2 takes 100; 0 is off.
    freeze: name patterns (fnmatch) of parameters that are not trained. The choice bias of a router whose weight is
        frozen stays as well; by its own name, "*.router.bias_E", it stays although the weight is trained.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    non_matrix: Literal["adamw", "scion"] = _option("adamw", was="rest")
    router: Literal["muon", "adamw"] = "muon"
    heads: Literal["whole", "split"] = "whole"
    qk_clip_threshold: float = 0.0
    freeze: tuple[str, ...] = ()


OLD_NAMES: dict[str, str] = {o.metadata["was"]: o.name for o in fields(OptimizerConfig) if "was" in o.metadata}


def current_names(options: Mapping[str, T], stacklevel: int) -> dict[str, T]:
    """Options under the names they have now, with a FutureWarning where one is given by its old name.

    Raises ConfigError for one that is given under both.
    """
    for old in OLD_NAMES.keys() & options.keys():
        new = OLD_NAMES[old]
        if new in options:
            raise ConfigError(f"{old} is the old name of {new}: give one of them.")
        warnings.warn(f"{old} is called {new} now: the old name is still read.", FutureWarning, stacklevel + 1)
    return {OLD_NAMES.get(name, name): value for name, value in options.items()}


def reads_old_names(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which takes options by keyword, also by their old names."""

    @functools.wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **current_names(kwargs, stacklevel=2))  # type: ignore[arg-type]

    return renamed


# Recipes are Python, so the class itself reads them, too; JSON goes by `earthshine.config`.
OptimizerConfig.__init__ = reads_old_names(OptimizerConfig.__init__)  # type: ignore[method-assign]


@functools.cache
def _kinds() -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Of each option its type and what `_option` says about it."""
    hints = get_type_hints(OptimizerConfig)
    return {option.name: (hints[option.name], option.metadata) for option in fields(OptimizerConfig)}


def check_option(name: str, value: Any) -> None:
    """ConfigError where the option cannot have this value, by its type and range alone."""
    kind, about = _kinds()[name]
    if kind is float:
        _check_number(name, value, about)
    elif kind is bool and not isinstance(value, bool):
        raise ConfigError(f"optimizer.{name}={value!r} must be True or False.")
    elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"optimizer.{name}={value!r} must be a whole number.")
    elif get_origin(kind) is Literal and not (isinstance(value, str) and value in get_args(kind)):
        raise ConfigError(f"optimizer.{name}={value!r} must be one of {', '.join(get_args(kind))}.")
    if name == "ns_steps" and not 0 <= value <= 100:
        raise ConfigError(f"optimizer.ns_steps={value} must be a whole number from 1 to 100, or 0 for the table's own.")


def _check_number(name: str, value: Any, about: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers among them
        hint = "; YAML reads 1e-3 as text, and 1.0e-3 as a number" if isinstance(value, str) else ""
        raise ConfigError(f"optimizer.{name}={value!r} is of type {type(value).__name__}: it must be a number{hint}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if "below" in about and not 0 <= number < about["below"]:
        raise ConfigError(f"optimizer.{name}={value} must be at least 0 and below {about['below']}.")
    if not (number >= 0 and (math.isfinite(number) or about.get("infinite"))):
        raise ConfigError(f"optimizer.{name}={value} must be a finite number of at least 0.")


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
