"""The options of a parameter group: filled in, checked, and compared with those of a checkpoint."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.ops.orthogonalize import coefficient_steps, default_steps
from earthshine.optim import rules, scion
from earthshine.optim.config import NS_STEPS, OptimizerConfig
from earthshine.optim.matrices import logical_matrices, normalize

# What a group may hold beside the options: what it is of, and what torch's schedulers and other people's tools note.
_KEPT = ("params", "param_names", "algorithm", "matrices", "lmo")
_NOTED = ("reasons", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
# The options of a group that a checkpoint must agree on; lr is the loop's.
_OPTIONS = (
    "weight_decay",
    "momentum",
    "nesterov",
    "betas",
    "eps",
    "update_rms",
    "scale",
    "exact_rms",
    "norm",
    "schatten_p",
    "ns_coefficients",
    "ns_steps",
    "ns_dtype",
    "ns_form",
    "ns_compile",
    "momentum_dtype",
    "normuon_beta2",
    "cautious_weight_decay",
    "skip_idle",
    "payload_dtype",
)


def state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of state that each parameter of the group has."""
    if group["algorithm"] == "adamw":
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_sum", "row_second_moment") if group["normuon_beta2"] else ("momentum_sum",)


def name_of(group: Mapping[str, Any], i: int) -> str:
    """What messages call parameter i of the group."""
    return str(group["param_names"][i]) if "param_names" in group else f"parameter {i}"


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """ConfigError for an entry of a group that nobody would read."""
    known = {*_KEPT, *_NOTED, *defaults}
    for key in group:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                f"a parameter group has the unknown option {key!r}"
                + (f": did you mean {close[0]!r}?" if close else ".")
            )


def scheduled_keys(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """Entries of a saved group that the loop or a scheduler sets, and that are therefore taken over."""
    cycled = ("betas",) if "base_momentum" in saved else ()  # OneCycleLR and CyclicLR move AdamW's first beta
    return tuple(key for key in ("lr", "initial_lr", *cycled) if key in saved)


def resolve_group(group: dict[str, Any]) -> None:
    """Options in the form that is kept and saved: numbers for None, names for functions, tuples for lists."""
    group["scale"] = rules.scale_name(group["scale"])
    if not isinstance(group["lr"], int | float | Tensor):
        raise ConfigError(f"lr={group['lr']!r} must be a number or a tensor of one.")
    for key in ("nesterov", "exact_rms", "cautious_weight_decay", "skip_idle", "ns_compile"):
        if not isinstance(group[key], bool):
            raise ConfigError(f"{key}={group[key]!r} must be True or False.")
    group["schatten_p"] = float(group["schatten_p"] or 0)
    group["normuon_beta2"] = float(group["normuon_beta2"] or 0) if group["algorithm"] == "muon" else 0.0
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ConfigError(f"betas={betas!r} must be two numbers: AdamW's, (0.9, 0.95) for Moonlight.")
    group["betas"] = tuple(betas)
    table = group["ns_coefficients"]
    if not isinstance(table, str):
        try:
            group["ns_coefficients"] = table = coefficient_steps(table)
        except TypeError as e:
            raise ConfigError(f"ns_coefficients={table!r} must be a table's name or rows (a, b, c).") from e
    group["ns_steps"] = group["ns_steps"] or default_steps(table)
    if group["algorithm"] == "muon":
        specs = group.get("matrices") or (("matrix",),) * len(group["params"])
        if any(isinstance(spec, str) for spec in specs):
            raise ConfigError(f"matrices={specs!r} must hold a tuple per parameter, such as ('matrix',).")
        group["matrices"] = tuple(normalize(spec) for spec in specs)
    if group["algorithm"] == "scion":
        group["lmo"] = tuple(group.get("lmo") or ())


def check_group(group: Mapping[str, Any]) -> None:
    """ConfigError for options out of range and for parameters that the algorithm cannot take."""
    named = group["ns_coefficients"] in NS_STEPS or isinstance(group["ns_coefficients"], str)
    if group["algorithm"] not in ("muon", "adamw", "scion"):
        raise ConfigError(f"algorithm={group['algorithm']!r} of a group must be one of muon, adamw, scion.")
    OptimizerConfig(  # holds the rules of each option
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        momentum_dtype=group["momentum_dtype"],
        update_rms=group["update_rms"],
        scale=group["scale"],
        exact_rms=group["exact_rms"],
        norm=group["norm"],
        schatten_p=group["schatten_p"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        normuon_beta2=group["normuon_beta2"],
        cautious_weight_decay=group["cautious_weight_decay"],
        skip_idle=group["skip_idle"],
        ns_coefficients=group["ns_coefficients"] if named else "table",
        ns_table=() if named else group["ns_coefficients"],
        ns_steps=group["ns_steps"],
        ns_dtype=group["ns_dtype"],
        ns_form=group["ns_form"],
        ns_compile=group["ns_compile"],
        payload_dtype=group["payload_dtype"],
    )
    coefficient_steps(group["ns_coefficients"], group["ns_steps"])
    params = group["params"]
    for i, p in enumerate(params):
        if not p.is_floating_point():
            raise ConfigError(f"{name_of(group, i)} has type {p.dtype}: Muon takes real floating-point parameters.")
    if group["algorithm"] == "scion" and (len(group["lmo"]) != len(params) or set(group["lmo"]) - set(scion.KINDS)):
        raise ConfigError(
            f"lmo={group['lmo']} of a scion group of {len(params)} parameters must be one of "
            f"{', '.join(scion.KINDS)} for each: param_groups(model, rest='scion') chooses."
        )
    if group["algorithm"] == "muon":
        _check_matrices(group)


def _check_matrices(group: Mapping[str, Any]) -> None:
    params, specs = group["params"], group["matrices"]
    if len(specs) != len(params):
        raise ConfigError(f"{len(specs)} 'matrices' for {len(params)} parameters: one each is needed.")
    places = {p.device for p in params}
    if len(places) > 1:
        raise ConfigError(
            f"a muon group on {', '.join(sorted(map(str, places)))}: matrices are orthogonalized together, so make one "
            f"group per device."
        )
    for i, (p, spec) in enumerate(zip(params, specs, strict=True)):
        if spec == ("matrix",) and p.ndim != 2:
            raise ConfigError(
                f"{name_of(group, i)} of shape {list(p.shape)} is not one matrix: give it algorithm='adamw' or say in "
                f"'matrices' what it holds; param_groups(model) does both."
            )
        if group["normuon_beta2"] and spec[:1] in (("cols",), ("interleaved_cols",)):
            raise ConfigError(
                f"{name_of(group, i)} is divided by columns ({spec!r}): NorMuon keeps one number per row of a "
                f"parameter, which would belong to several matrices. Divide it by rows, or leave normuon_beta2 out."
            )
        logical_matrices(tuple(p.shape), spec, name_of(group, i))


def group_differences(current: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a checkpoint's groups say otherwise, as 'group 0 momentum: 0.9 (saved) -> 0.95'."""
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in current]:
        sizes = [[len(g["params"]) for g in groups] for groups in (saved, current)]
        return [f"parameters per group: {sizes[0]} (saved) -> {sizes[1]}"]
    lines = []
    for index, (new, old) in enumerate(zip(current, saved, strict=True)):
        # Entries that are neither ours nor what we keep are a scheduler's.
        compared = {*_KEPT, *_OPTIONS} - {"params", *scheduled_keys(old)}
        for key in sorted(key for key in compared if key in new or key in old):
            was, now = _plain(old.get(key, "(absent)")), _plain(new.get(key, "(absent)"))
            if was != now and isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
                first = next(i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
                lines.append(f"group {index} {key}[{first}]: {was[first]} (saved) -> {now[first]}")
            elif was != now:
                lines.append(f"group {index} {key}: {was} (saved) -> {now}")
    return lines


def _plain(value: Any) -> Any:
    """Lists as tuples, infinity as text: a checkpoint format may have turned one into the other."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
