"""The options of a parameter group: filled in, checked, and compared with those of a checkpoint."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from earthshine.errors import CheckpointError, ConfigError, nearest
from earthshine.ops import lmo
from earthshine.ops.orthogonalize import coefficient_steps, default_steps
from earthshine.optim import rules
from earthshine.optim.config import OLD_NAMES, GroupOptions, check_option
from earthshine.optim.flattened import FLATTENED
from earthshine.optim.logical_matrices import logical_matrices, normalize
from earthshine.optim.rounding import NARROW

# What a group holds beside its options: its parameters, and the notes of torch's schedulers and other people's tools.
_MEMBERS = ("params", "param_names", "algorithm", "matrices", "lmo", "initial_options")
_NOTES = ("name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
# Every option of a group with its default, in the form in which a group holds it.
DEFAULTS = GroupOptions().as_group()
# Options that plan and state are made by: they stay as they are.
STATIC = tuple(
    option.name for option in fields(GroupOptions) if option.metadata.get("static") and option.name in DEFAULTS
)
# The others but lr: a training loop may set them from step to step. "initial_options" has their values at construction.
_SETTABLE = tuple(key for key in DEFAULTS if key not in (*STATIC, "lr"))
_NUMBERS = tuple(key for key, default in DEFAULTS.items() if isinstance(default, float))
ALGORITHMS = ("muon", "adamw", "scion")
# Entries with a value per parameter: they follow the list of parameters.
PER_PARAMETER = ("param_names", "matrices", "lmo")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def name_of(group: Mapping[str, Any], i: int) -> str:
    """What messages call parameter i of the group."""
    return str(group["param_names"][i]) if "param_names" in group else f"parameter {i}"


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """ConfigError for an entry of a group that nobody would read."""
    known = {*_MEMBERS, *_NOTES, *defaults}
    for key in group:
        if key not in known:
            raise ConfigError(f"a parameter group has the unknown option {key!r}.{nearest(key, known)}")


def scheduled(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a saved group that the loop or a scheduler sets, and that `group` therefore takes over.

    Raises CheckpointError for values that they cannot have.
    """
    settable = {key: saved[key] for key in ("lr", "initial_lr", *_SETTABLE) if key in saved}
    whole = dict(group) | settable
    try:
        resolve_group(whole)
        check_group(whole)
    except ConfigError as e:
        raise CheckpointError(f"a saved parameter group holds what no option can be: {e}") from e
    return {key: whole[key] for key in settable}


def resolve_group(group: dict[str, Any]) -> None:
    """Options as a group holds and a checkpoint saves them: 0 for None, names for functions, tuples for lists."""
    group["scale"] = rules.scale_name(group["scale"])
    muon = group["algorithm"] == "muon"
    for key in ("schatten_p", "normuon_beta2"):
        group[key] = 0.0 if group[key] is None or (key == "normuon_beta2" and not muon) else group[key]
    resolve_numbers(group)
    table = group["ns_coefficients"]
    if not isinstance(table, str):
        try:
            group["ns_coefficients"] = table = coefficient_steps(table)
        except ConfigError:
            raise
        except (TypeError, ValueError) as e:
            raise ConfigError(f"ns_coefficients={table!r} must be a table's name or rows (a, b, c).") from e
    group["ns_steps"] = default_steps(table) if group["ns_steps"] in (None, 0) else _whole(group["ns_steps"])
    group["rounding_seed"] = _whole(group["rounding_seed"])
    if muon:
        specs = _tuple(
            "matrices",
            group.get("matrices") or (("matrix",),) * len(group["params"]),
            "a list of one specification per parameter",
        )
        if not all(isinstance(spec, list | tuple) for spec in specs):
            raise ConfigError(f"matrices={specs!r} must hold a tuple per parameter, such as ('matrix',).")
        group["matrices"] = tuple(normalize(spec) for spec in specs)
    if group["algorithm"] == "scion":
        group["lmo"] = _tuple("lmo", group.get("lmo") or (), "a list of one name per parameter")


def resolve_numbers(group: dict[str, Any]) -> None:
    """Numbers of numpy, and tensors of one, as Python's; lr stays a tensor, which torch's schedulers fill in place.

    A loop may set them before any step: ConfigError for anything that is not a number in its range.
    """
    for key in _NUMBERS:
        if key != "lr" or not isinstance(group[key], Tensor):
            group[key] = _number(key, group[key])
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool):
        raise ConfigError(f"lr={lr!r} must be a number or a tensor of one.")
    betas = _tuple("betas", group["betas"], "two numbers: AdamW's, (0.9, 0.95) for Moonlight")
    if len(betas) != 2:
        raise ConfigError(f"betas={betas!r} must be two numbers: AdamW's, (0.9, 0.95) for Moonlight.")
    group["betas"] = tuple(_number(f"beta{n}", beta) for n, beta in enumerate(betas, start=1))


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    check_option(name, value)
    return value if type(value) in (int, float) else float(value)


def _whole(value: Any) -> Any:
    """numpy's whole numbers as Python's."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _tuple(name: str, value: Any, holds: str) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be {holds}.")
    return tuple(value)


def settable_options(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of a resolved group that a loop may set, as they are now."""
    return tuple((key, group[key]) for key in _SETTABLE)


def complete(group: dict[str, Any]) -> None:
    """The names that options have now, and the defaults of those that did not exist, for a group, or the defaults of
    groups, that was pickled."""
    for old in OLD_NAMES.keys() & group.keys():
        group[OLD_NAMES[old]] = group.pop(old)
    group |= {key: default for key, default in DEFAULTS.items() if key != "lr" and key not in group}
    if "params" in group:
        resolve_group(group)
        group.setdefault("initial_options", settable_options(group))


def check_group(group: Mapping[str, Any]) -> None:
    """ConfigError for options out of range and for parameters that the algorithm cannot take."""
    if not isinstance(group["algorithm"], str) or group["algorithm"] not in ALGORITHMS:
        raise ConfigError(f"algorithm={group['algorithm']!r} of a group must be one of {', '.join(ALGORITHMS)}.")
    GroupOptions.of_group(group)
    coefficient_steps(group["ns_coefficients"], group["ns_steps"])
    params = group["params"]
    for i, p in enumerate(params):
        _check_parameter(name_of(group, i), p)
    if group["algorithm"] == "scion" and (len(group["lmo"]) != len(params) or set(group["lmo"]) - set(lmo.KINDS)):
        raise ConfigError(
            f"lmo={group['lmo']} of a scion group of {len(params)} parameters must be one of "
            f"{', '.join(lmo.KINDS)} for each: param_groups(model, non_matrix='scion') chooses."
        )
    if group["algorithm"] == "muon":
        _check_matrices(group)


def _check_parameter(name: str, p: Tensor) -> None:
    if is_lazy(p):
        raise ConfigError(
            f"{name} has no shape yet (a lazy module makes it): run one forward pass, then make the optimizer."
        )
    if p.dtype not in _DTYPES:
        raise ConfigError(
            f"{name} has dtype {p.dtype}: Muon takes real floating-point parameters, of float16, bfloat16, float32 or "
            f"float64."
        )
    if p.layout != torch.strided:
        raise ConfigError(f"{name} has the layout {p.layout}: Muon takes dense parameters.")


def _check_matrices(group: Mapping[str, Any]) -> None:
    params, specs = group["params"], group["matrices"]
    if len(specs) != len(params):
        raise ConfigError(f"{len(specs)} 'matrices' for {len(params)} parameters: one each is needed.")
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise ConfigError(
            f"a muon group on {', '.join(sorted(map(str, devices)))}: matrices are orthogonalized together, so make "
            f"one group per device."
        )
    for i, (p, spec) in enumerate(zip(params, specs, strict=True)):
        if p.ndim == 1:
            raise ConfigError(
                f"{name_of(group, i)} of shape {list(p.shape)} is not one matrix: give a vector algorithm='adamw', as "
                f"param_groups(model) does. If it was a matrix, it was flattened: {FLATTENED}."
            )
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


def realign(group: dict[str, Any], before: Sequence[Tensor], was: Mapping[str, Any]) -> None:
    """Bring names and matrices of a group in line with its list of parameters, which somebody shortened or reordered.

    before: its parameters when `was`, the entries with a value per parameter, described them.
    Raises ConfigError for a parameter that was put in without such entries.
    """
    params, indices = group["params"], {id(p): i for i, p in enumerate(before)}
    present = {id(p) for p in params}
    exchanged = [i if len(params) == len(before) and id(before[i]) not in present else None for i in range(len(params))]
    known = [indices.get(id(p), i) for p, i in zip(params, exchanged, strict=True)]
    for key in PER_PARAMETER:
        if key in group and group[key] == was[key]:
            if None in known:
                raise ConfigError(
                    f"params of a group has a new parameter of shape {list(params[known.index(None)].shape)}, of which "
                    f"the group's {key} says nothing: add parameters by add_param_group."
                )
            group[key] = type(was[key])(was[key][i] for i in known if i is not None)


def saved_groups(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a checkpoint, with the default of every option that did not exist when it was saved.

    Each default leaves things as they were before there was the option. Raises CheckpointError for anything that is
    not the state of an optimizer.
    """
    groups = state_dict.get("param_groups")
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(groups, Sequence):
        raise CheckpointError(
            f"a state_dict with the entries {sorted(map(str, state_dict))} is not an optimizer's: it needs 'state' "
            f"and 'param_groups', as Muon.state_dict() gives them."
        )
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups):
        raise CheckpointError("a saved parameter group lists no 'params': it is not one of Muon.state_dict().")
    defaults = DEFAULTS | {"algorithm": "adamw", "params": []}
    resolve_group(defaults)
    defaults = {key: defaults[key] for key in (*STATIC, *_SETTABLE)}
    groups = [defaults | {OLD_NAMES.get(key, key): value for key, value in group.items()} for group in groups]
    for group in groups:
        if group.get("algorithm") == "muon":
            group.setdefault("matrices", (("matrix",),) * len(group["params"]))
        if group["schatten_p"] == str(math.inf):  # as JSON has it
            group["schatten_p"] = math.inf
    return groups


def warn_of_lost_updates(groups: Sequence[Mapping[str, Any]], stacklevel: int) -> None:
    """A UserWarning where the rounding of 16-bit weights will swallow small updates."""
    narrow = [
        (name_of(group, i), p.dtype)
        for group in groups
        for i, p in enumerate(group["params"])
        if group["rounding"] == "nearest" and p.dtype in NARROW
    ]
    if narrow:
        warnings.warn(
            f"{len(narrow)} parameters are kept in 16 bits (the first: {narrow[0][0]}, {narrow[0][1]}) and rounded to "
            f"nearest after each step: updates below half of a weight's last bit are lost, at lr=1e-5 four fifths of "
            f"the movement. Pass rounding='stochastic', or keep weights in fp32 and compute in bf16.",
            stacklevel=stacklevel,
        )


def group_differences(current: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a checkpoint's groups differ, as 'group 0 momentum: 0.9 (saved) -> 0.95'.

    Of options that a loop may set, the values at construction are compared, not what a schedule has made of them.
    """
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in current]:
        sizes = [[len(g["params"]) for g in groups] for groups in (saved, current)]
        return [f"parameters per group: {sizes[0]} (saved) -> {sizes[1]}"]
    lines = []
    for index, (new, old) in enumerate(zip(current, saved, strict=True)):
        unnamed = {"param_names"} if "param_names" not in old or "param_names" not in new else set()
        initially = [{key: _plain(v) for key, v in g.get("initial_options", ())} for g in (old, new)]
        # Any other entry is a scheduler's.
        compared = {*_MEMBERS, *STATIC, *_SETTABLE} - {"params", "initial_options"} - unnamed
        for key in sorted(key for key in compared if key in new or key in old):
            was, now = _plain(old.get(key, "(absent)")), _plain(new.get(key, "(absent)"))
            first = [values.get(key, value) for values, value in zip(initially, (was, now), strict=True)]
            # OneCycleLR and CyclicLR move AdamW's first beta; older checkpoints hold no other trace of it.
            if was == now or first[0] == first[1] or (key == "betas" and "base_momentum" in old):
                continue
            was, now = first
            if isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
                differs = next(i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
                lines.append(f"group {index} {key}[{differs}]: {was[differs]} (saved) -> {now[differs]}")
            else:
                lines.append(f"group {index} {key}: {was} (saved) -> {now}")
    return lines


def _plain(value: Any) -> Any:
    """Lists as tuples, infinity as text: a checkpoint format may have turned one into the other."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
