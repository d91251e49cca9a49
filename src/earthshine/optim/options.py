"""The options of a parameter group: filled in, checked, and compared with those of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from earthshine.errors import ConfigError
from earthshine.ops.orthogonalize import coefficient_steps, default_steps
from earthshine.optim import rules, scion
from earthshine.optim.config import NS_STEPS, OptimizerConfig
from earthshine.optim.matrices import logical_matrices, normalize

# Group entries that a checkpoint may hold at another value: the loop sets lr, torch's schedulers initial_lr.
_FREE = ("params", "lr", "initial_lr")


def state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of state that each parameter of the group has."""
    if group["algorithm"] == "adamw":
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_sum", "row_second_moment") if group["normuon_beta2"] else ("momentum_sum",)


def name_of(group: Mapping[str, Any], i: int) -> str:
    """What messages call parameter i of the group."""
    return str(group["param_names"][i]) if "param_names" in group else f"parameter {i}"


def resolve_group(group: dict[str, Any]) -> None:
    """Options in the form that is kept and saved: numbers for None, names for functions, tuples for lists."""
    group["scale"] = rules.scale_name(group["scale"])
    group["schatten_p"] = float(group["schatten_p"] or 0)
    group["normuon_beta2"] = float(group["normuon_beta2"] or 0) if group["algorithm"] == "muon" else 0.0
    group["betas"] = tuple(group["betas"])
    table = group["ns_coefficients"]
    if not isinstance(table, str):
        group["ns_coefficients"] = table = tuple(tuple(float(x) for x in row) for row in table)
    group["ns_steps"] = group["ns_steps"] or default_steps(table)
    if group["algorithm"] == "muon":
        specs = group.get("matrices") or (("matrix",),) * len(group["params"])
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
        if group["normuon_beta2"] and spec[0] == "cols":
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
        for key in sorted((set(new) | set(old)) - set(_FREE)):
            was, now = _plain(old.get(key, "(absent)")), _plain(new.get(key, "(absent)"))
            if was != now and isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
                first = next(i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
                lines.append(f"group {index} {key}[{first}]: {was[first]} (saved) -> {now[first]}")
            elif was != now:
                lines.append(f"group {index} {key}: {was} (saved) -> {now}")
    return lines


def _plain(value: Any) -> Any:
    """Lists as tuples: a checkpoint format may have turned one into the other."""
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
