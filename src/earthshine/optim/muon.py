"""Muon with Moonlight's scale, and AdamW for anything that is not a matrix: one `torch.optim.Optimizer` for any layout.

    M <- mu M + G                                    momentum is a sum, not an average; M_0 = 0
    O  = NewtonSchulz((mu M + G) / ||.||_F)          Nesterov; NewtonSchulz(M / ||.||_F) without
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, cols)) O

Paper: arXiv:2502.16982, equation 4 and footnote 1, per logical matrix. AdamW is torch's; all share lr and weight decay.
The equations: `optim.rules`. Where a matrix travels: `optim.sharding.batches`, and who orthogonalizes it: `ownership`.

The layout is read from the tensors: plain ones, DDP, and DTensors of FSDP2, HSDP, tensor and expert parallelism, also
combined, take the same path and give the same bits (with comm_dtype fp32). With `process_group`, the state of plain
parameters is divided by rows over its ranks: ZeRO-1, the paper's Algorithm 1 (`optim.sharding.zero1`).

How we differ from torch.optim.Muon: (a) a parameter may hold several logical matrices (experts of a stack, row blocks
of a fused projection), each with its own norm and scale; (b) matrices of one shape are orthogonalized in batches; (c)
in the dtype asked for; (d) state exists from the start, so that no checkpoint lacks it; (e) the momentum is a sum, 20
times torch's average.

A parameter without a gradient is skipped: no momentum, decay or update; a rank whose local shard has none contributes
zeros. An expert that no token chose has a zero gradient, not none: its momentum shrinks, its update keeps its full
size, because orthogonalization forgets the size of what it is given. That is the published rule; `skip_idle` leaves
out such stale updates.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn

from earthshine.device import Readings
from earthshine.errors import CheckpointError, ConfigError
from earthshine.ops.orthogonalize import Form
from earthshine.optim.adamw import AdamWStep
from earthshine.optim.config import current_names, reads_old_names
from earthshine.optim.group_step import GroupStep, StepNumbers, state_fits
from earthshine.optim.measure import Measure
from earthshine.optim.muon_step import MuonStep
from earthshine.optim.options import (
    DEFAULTS,
    check_group,
    check_keys,
    complete,
    group_differences,
    name_of,
    realign,
    resolve_group,
    resolve_numbers,
    saved_groups,
    scheduled,
    settable_options,
    warn_of_lost_updates,
)
from earthshine.optim.rules import ScaleRule, scale_name
from earthshine.optim.scion import ScionStep
from earthshine.optim.sharding.layout import is_dtensor, to_local

_ALGORITHMS: dict[str, type[GroupStep]] = {step.algorithm: step for step in (MuonStep, ScionStep, AdamWStep)}


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW, or Scion, for the rest; the equations: `optim.rules`. Raises ConfigError for
    parameters and options that it cannot take.

    params: parameters, (name, parameter) pairs, or dicts of them with algorithm="muon", "adamw" or "scion" and, where
        a parameter is not one matrix, "matrices": a specification of `optim.logical_matrices` per parameter
        ("scion": "lmo", see `optim.scion`). `param_groups(model)` makes these dicts. Without "algorithm" a group
        is "muon". Every option down to comm_dtype can be set per group; `optim.config.GroupOptions` says what each
        does. Where its 0 switches something off, None does, too.
    scale: also a function(rows, cols) -> float that `optim.rules.register_scale` has given a name.
    betas: GroupOptions' beta1 and beta2.
    ns_coefficients: the name of a table in `ops.orthogonalize.COEFFICIENTS`, or rows (a, b, c) of your own.
    process_group: ranks that hold the plain parameters alike and divide their state (ZeRO-1). `state_dict()` and
        `load_state_dict()` are then collective.
    reduce_gradients: with process_group: gradients are each rank's own (no DDP); their mean is taken here, by the
        reduce-scatter of Algorithm 1.
    max_bucket_bytes: how much of whole matrices a rank holds at once that others sent it.

    With parameters that are spread over processes, construction and `step` are collective: all processes of the mesh
    call them, with the same groups.
    """

    @reads_old_names
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        update_rms: float = 0.2,
        scale: str | ScaleRule = "match_rms_adamw",
        exact_rms: bool = False,
        norm: str = "spectral",
        schatten_p: float | None = 0.0,
        ns_coefficients: Any = "keller5",
        ns_steps: int | None = 0,
        ns_dtype: str = "auto",
        ns_form: Form = "auto",
        ns_compile: bool = False,
        momentum_dtype: str = "float32",
        normuon_beta2: float | None = 0.0,
        cautious_weight_decay: bool = False,
        skip_idle: bool = False,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        comm_dtype: str = "auto",
        process_group: Any = None,
        reduce_gradients: bool = False,
        max_bucket_bytes: int = 256 << 20,
    ) -> None:
        if isinstance(params, nn.Module):
            raise ConfigError(f"params is a {type(params).__name__}: give Muon param_groups(model), or its parameters.")
        given = locals()
        defaults = {name: given[name] for name in DEFAULTS}
        defaults["scale"] = scale_name(scale)
        if reduce_gradients and process_group is None:
            raise ConfigError("reduce_gradients=True needs process_group: the ranks to average gradients over.")
        if not isinstance(reduce_gradients, bool):
            raise ConfigError(f"reduce_gradients={reduce_gradients!r} must be True or False.")
        if isinstance(max_bucket_bytes, bool) or not isinstance(max_bucket_bytes, int) or max_bucket_bytes < 1:
            raise ConfigError(
                f"max_bucket_bytes={max_bucket_bytes!r} must be a positive whole number; the default is 256 MiB."
            )
        self._process_group, self._reduce, self._bucket_bytes = process_group, reduce_gradients, max_bucket_bytes
        self._stepped = False  # or loaded: whether state may hold anything
        self._made = False  # whether the groups that come are added later
        # Why each parameter has its algorithm, by `param_groups`: for `describe`.
        self.reasons: dict[Tensor, str] = {}
        self._reset_group_steps()
        super().__init__(params, {"algorithm": "muon"} | defaults)
        self._made = True
        warn_of_lost_updates(self.param_groups, stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise ConfigError("a Muon with a process_group cannot be copied or pickled: use its state_dict().")
        attributes = ("_reduce", "_bucket_bytes", "_stepped", "_made", "reasons")
        return super().__getstate__() | {name: getattr(self, name) for name in attributes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_stepped": True, "_made": True, "reasons": {}} | state)
        self.defaults.pop("differentiable", None)  # torch adds it here; later groups would have an option more
        for options in (self.defaults, *self.param_groups):
            complete(options)
        self._process_group = None
        self._reset_group_steps()

    def _reset_group_steps(self) -> None:
        """Forget what is derived from the groups: their steps, and the last step's numbers."""
        self._group_steps: dict[int, GroupStep] = {}
        self._last: list[StepNumbers] = []
        self._measures: list[Measure] = []
        self._readings: Readings | None = None

    def _group_step(self, index: int) -> GroupStep:
        """What steps group `index`, its state made: at construction, and again after unpickling.

        Again, too, when somebody has exchanged, moved, cast or removed its parameters, as trainers do that wrap a model
        after making its optimizer; and cleared state starts from zero. Raises ConfigError where momentum would be lost.
        """
        group = self.param_groups[index]
        group_step = self._group_steps.get(index)
        if group_step is not None and group_step.group is not group:
            group_step = None  # of a group that was removed
        if group_step is None or not group_step.is_current():
            before = group_step.params if group_step is not None else []
            if group_step is not None:
                realign(group, before, group_step.per_parameter)
                check_group(group)
            group_step = _ALGORITHMS[group["algorithm"]](group, self._process_group, self._reduce, self._bucket_bytes)
            self.state.update(self._states(group, group_step, before))
            self._drop_others(before)
            self._group_steps[index] = group_step
        for i, p in enumerate(group["params"]):
            state = self.state.setdefault(p, {})
            for key in group_step.state_keys:
                if key not in state:
                    state[key] = group_step.new_state(i, key)
        return group_step

    def _states(
        self, group: Mapping[str, Any], group_step: GroupStep, before: Sequence[Tensor]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """State for a group's new step: what fits stays, the rest is zeros. before: the parameters that it had."""
        grouped = {id(p) for g in self.param_groups for p in g["params"]}
        states = {}
        for i, p in enumerate(group["params"]):
            state = self.state.get(p, {})
            fresh = {key: group_step.new_state(i, key) for key in group_step.state_keys}
            stays = {k: v for k, v in state.items() if k in fresh and (k == "step" or state_fits(v, fresh[k]))}
            gone = [value for key, value in state.items() if key not in stays]
            if not state and len(before) == len(group["params"]) and id(before[i]) not in grouped:
                gone = list(self.state.get(before[i], {}).values())  # exchanged for p
            if self._stepped and any(map(_holds_anything, gone)):
                raise ConfigError(
                    f"{name_of(group, i)} was exchanged, moved or cast after a step or a load, and its momentum would "
                    f"be lost: make the optimizer when the model is where it trains, then load_state_dict()."
                )
            states[p] = fresh | stays
        return states

    def _drop_others(self, params: Iterable[Tensor]) -> None:
        """Forget the state of those that are in no group any more: nobody would save it, and it keeps them alive."""
        grouped = {id(p) for group in self.param_groups for p in group["params"]}
        for p in list(params):
            if id(p) not in grouped:
                self.state.pop(p, None)
                self.reasons.pop(p, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, now or later, with its state. Raises ConfigError where a parameter does not fit it."""
        group = current_names(param_group, stacklevel=2)
        reasons = group.pop("reasons", ())
        check_keys(group, self.defaults)
        if "params" not in group:
            raise ConfigError(f"a parameter group with the entries {sorted(group)} has no 'params'.")
        if not isinstance(group["params"], Tensor | set):
            group["params"] = list(group["params"])
            self._check_repeated(group["params"])
        super().add_param_group(group)
        try:
            resolve_group(self.param_groups[-1])
            check_group(self.param_groups[-1])
            self.param_groups[-1]["initial_options"] = settable_options(self.param_groups[-1])
            self._group_step(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        self.reasons.update(zip(self.param_groups[-1]["params"], reasons, strict=False))
        if self._made:
            warn_of_lost_updates(self.param_groups[-1:], stacklevel=3)

    def _check_repeated(self, given: Iterable[Any]) -> None:
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        for i, item in enumerate(given):
            name, p = item if isinstance(item, tuple) else (f"parameter {i}", item)
            if id(p) in seen:
                raise ConfigError(f"{name} of shape {list(p.shape)} is given twice: each step would update it twice.")
            seen.add(id(p))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_steps = [self._group_step(index) for index in range(len(self.param_groups))]
        for group, group_step in zip(self.param_groups, group_steps, strict=True):  # before anything is updated
            resolve_numbers(group)
            if settable_options(group) != group_step.options:  # a loop has set some
                resolve_group(group)
                check_group(group)
                group_step.options = settable_options(group)
            group_step.shards.check_gradients()
        self._last, self._readings = [], None
        for group, group_step in zip(self.param_groups, group_steps, strict=True):
            grads, sent = group_step.shards.gradients()
            self._stepped |= bool(grads)
            options = {**group, "lr": float(group["lr"])}  # a tensor of a device: waited for once
            with _without_autocast(group_step.shards.params):
                numbers = group_step.step(options, {i: self.state[p] for i, p in enumerate(group["params"])}, grads)
            numbers.sent |= {"reduce_gradients": sent, "gather_parameters": group_step.shards.gather_weights()}
            self._last.append(numbers)
        return loss

    def predicted_bytes(self) -> dict[str, int]:
        """Bytes that one step sends from this rank to others, by purpose, from the plan alone.

        "orthogonalize": matrices on their way to owners and back; "norms": of vectors for Scion; "reduce_gradients"
        and "gather_parameters": ZeRO-1. What is zero is left out.
        """
        total: dict[str, int] = {}
        for index in range(len(self.param_groups)):
            for key, n in self._group_step(index).predicted_bytes().items():
                total[key] = total.get(key, 0) + n
        return {key: n for key, n in total.items() if n}

    def measure(self) -> Readings:
        """What `last_stats` has to wait for, still on the device: to be read together with other numbers.

        Ask before the next step, and before loading another state.
        """
        if self._readings is None:
            self._measures = [numbers.measure() for numbers in self._last]
            self._readings = Readings(*(norm for m in self._measures for norm in m.norms))
        return self._readings

    @property
    def last_stats(self) -> dict[str, Any]:
        """Numbers of the last step on this rank; asking waits for the device, once. Ask when you may `measure`.

        update_rms: algorithm -> RMS per element of the update before lr and decay, of what this rank orthogonalized
            (AdamW and Scion: of its shards); only algorithms that updated something. update_rms_by_group: the same
            per group, None where nothing was updated.
        bytes_sent: as `predicted_bytes`, counted where messages were handed over.
        ns_flops, ns_seconds: of Newton-Schulz on this rank. imbalance: the most loaded rank's share of Newton-Schulz
            over the mean, of the worst shard group; 1 is even.
        """
        values = iter(self.measure().values)
        total: dict[str, list[float]] = {}
        by_group: list[float | None] = []
        sent: dict[str, int] = {}
        for numbers, measured in zip(self._last, self._measures, strict=True):
            squares, elements = measured.total([next(values) for _ in measured.norms])
            by_group.append((squares / elements) ** 0.5 if elements else None)
            if elements:
                sums = total.setdefault(numbers.algorithm, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + squares, sums[1] + elements
            for key, n in numbers.sent.items():
                sent[key] = sent.get(key, 0) + n
        return {
            "update_rms": {name: (squares / n) ** 0.5 for name, (squares, n) in total.items()},
            "update_rms_by_group": by_group,
            "bytes_sent": {key: n for key, n in sent.items() if n},
            "ns_flops": sum(numbers.flops for numbers in self._last),
            "ns_seconds": sum(numbers.seconds() for numbers in self._last),
            "imbalance": max((numbers.imbalance for numbers in self._last), default=1.0),
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch's; state of ZeRO-1 parameters as DTensors, Shard(0) over the process group (then collective)."""
        for index in range(len(self.param_groups)):
            self._group_step(index)
        self._drop_others(self.state)
        state_dict = super().state_dict()
        if self._process_group is not None:  # else state is saved as it is
            for index, saved in enumerate(state_dict["param_groups"]):
                states = self._group_step(index).to_dtensor([state_dict["state"][number] for number in saved["params"]])
                state_dict["state"] |= zip(saved["params"], states, strict=True)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of `state_dict()`, lr, and what the loop has set since construction, as schedules do.

        Every other hyper-parameter comes from this optimizer's construction: torch would overwrite it silently, and
        would round the momentum to the parameter's dtype. Raises CheckpointError, before anything changes, for a saved
        hyper-parameter (as it was at construction) or parameter list that differs (with the differences) and for state
        that is missing or misshapen. An option that did not exist when the state was saved had its default.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = saved_groups(state_dict)
        states = state_dict["state"]
        problems = group_differences(self.param_groups, groups)
        if problems:
            raise CheckpointError(
                "the saved optimizer is not this one: " + "; ".join(problems) + ". Hyper-parameters come from the "
                "config: set them back, or start from the checkpoint's weights with a fresh optimizer."
            )
        taken = [scheduled(group, saved) for group, saved in zip(self.param_groups, groups, strict=True)]
        checked = [
            [self._checked_state(index, i, states.get(number)) for i, number in enumerate(saved["params"])]
            for index, saved in enumerate(groups)
        ]
        arrived = [self._group_step(index).from_dtensor(states) for index, states in enumerate(checked)]
        for index, values in enumerate(taken):
            self._take_over(index, arrived[index])
            for key, value in values.items():
                self._set(index, key, value)
        # From here on there may be momentum to lose.
        self._stepped = any(_holds_anything(t) for states in checked for state in states for t in state.values())
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @torch.no_grad()
    def _take_over(self, index: int, arrived: list[dict[str, Tensor]]) -> None:
        for p, saved in zip(self.param_groups[index]["params"], arrived, strict=True):
            for key, live in self.state[p].items():
                to_local(live).copy_(saved[key])

    def _set(self, index: int, key: str, value: Any) -> None:
        """A saved entry of a group; a tensor by value, because schedulers fill tensors in place."""
        live = self.param_groups[index].get(key)
        if isinstance(live, Tensor) and live is not value:
            live.copy_(value) if isinstance(value, Tensor) else live.fill_(value)
        else:
            self.param_groups[index][key] = value.clone() if isinstance(value, Tensor) else value

    def _checked_state(self, index: int, i: int, saved: Any) -> dict[str, Tensor]:
        """The saved state of a parameter, checked; zeros where it is zero, and so may be placed in any way."""
        group, group_step = self.param_groups[index], self._group_step(index)
        saved = saved if isinstance(saved, Mapping) else {}
        checked = {}
        for key in group_step.state_keys:
            expected = group_step.state_shape(i, key)
            if key in saved and not isinstance(saved[key], Tensor):
                raise CheckpointError(
                    f"the saved optimizer state {key} of parameter {name_of(group, i)} is a "
                    f"{type(saved[key]).__name__}, not a tensor: the checkpoint is of another optimizer."
                )
            got = f"has shape {list(saved[key].shape)}" if key in saved else "is missing"
            if key not in saved or tuple(saved[key].shape) != expected:
                raise CheckpointError(
                    f"the saved optimizer state {key} of parameter {name_of(group, i)} {got}, not {list(expected)}: "
                    f"the checkpoint is of another optimizer or model."
                )
            checked[key] = saved[key]
            live = self.state[group["params"][i]][key]
            if not group_step.shards.state_fits(i, live, saved[key]):
                if _holds_anything(saved[key], everywhere=True):
                    raise CheckpointError(
                        f"the saved optimizer state {key} of parameter {name_of(group, i)} is placed otherwise than "
                        f"the parameter: load through torch.distributed.checkpoint, which moves it to where it belongs."
                    )
                checked[key] = group_step.saved_zeros(i, key, live)
        return checked


def _holds_anything(state: Any, everywhere: bool = False) -> bool:
    """Whether this process's shard of a tensor of state is anything but zero; of all processes, which is collective.

    Waits for the device.
    """
    if not isinstance(state, Tensor) or state.is_meta:
        return False
    if everywhere and is_dtensor(state):
        count: Any = (state != 0).sum()
        return bool(count.full_tensor())
    return bool(to_local(state).any())


def _without_autocast(params: list[Tensor]) -> AbstractContextManager[None]:
    """Autocast would run the matmuls of Newton-Schulz in bf16, whatever dtype was asked for."""
    device = params[0].device.type if params else "cpu"
    return torch.autocast(device, enabled=False) if device != "meta" else nullcontext()
