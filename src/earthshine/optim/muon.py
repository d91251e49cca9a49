"""Muon with Moonlight's scaling, and AdamW for what is not a matrix, as one `torch.optim.Optimizer`.

    M <- mu M + G                                    momentum is a sum, not an average; M_0 = 0
    O  = NewtonSchulz((mu M + G) / ||.||_F)          Nesterov; NewtonSchulz(M / ||.||_F) without
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, cols)) O

Paper: arXiv:2502.16982, equation 4 and footnote 1, per logical matrix. AdamW is torch's; both share lr and weight
decay.

How we differ from torch.optim.Muon: (a) a parameter may hold several logical matrices (experts of a stack, row
blocks of a fused projection), each with its own norm and scale; (b) matrices of one shape are orthogonalized in
batches, over all parameters of a group; (c) Newton-Schulz runs in the type asked for; (d) state exists from the first
moment, so that a checkpoint never misses it; (e) the momentum is a sum and named so: 20 times torch's average.

A parameter without a gradient is skipped: no momentum, no decay, no update. An expert that no token chose has a zero
gradient, not none: its momentum shrinks and its update keeps its full size, as the published rule says.

Legend: B matrices, M rows, N columns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from earthshine.errors import CheckpointError, ConfigError
from earthshine.ops.orthogonalize import Form, matrices_per_batch, newton_schulz, resolve_form
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.groups import logical_units, param_groups

# State of a parameter, by algorithm.
_STATE = {"muon": ("momentum_sum",), "adamw": ("exp_avg", "exp_avg_sq", "step")}
# Group entries that a checkpoint may hold at another value: the loop sets lr, torch's schedulers initial_lr.
_FREE = ("params", "lr", "initial_lr")
# Elements of AdamW's moments looked at together when its update is measured: they stay in the cache.
_STATS_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Segment:
    """Rows start to stop, along dimension 0, of the group's parameter number `param`: a whole number of matrices."""

    param: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Bucket:
    """All logical matrices of one shape and device in a group, cut into batches that fit the cache."""

    rows: int
    cols: int
    dtype: torch.dtype
    batches: tuple[tuple[Segment, ...], ...]


class Muon(torch.optim.Optimizer):
    """The optimizer of this file's docstring. Raises ConfigError for what it cannot take.

    params: parameters, (name, parameter) pairs, or dicts of them with algorithm="muon" or "adamw" and, where a
        parameter is not one matrix, "matrices": a specification of `optim.groups` per parameter. `param_groups(model)`
        makes these dicts. Without "algorithm" a group is "muon". Any option below can be set per group.
    lr: of both algorithms, the size of an AdamW step per element. The other options: see `OptimizerConfig`.
    ns_coefficients: the name of a table in `ops.orthogonalize.COEFFICIENTS`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        update_rms: float = 0.2,
        ns_coefficients: str = "keller5",
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        ns_form: Form = "standard",
    ) -> None:
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "update_rms": update_rms,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "ns_form": ns_form,
        }
        self._forget()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Forget what is derived from the groups: the plan of each "muon" group, and the last step's numbers."""
        self._plans: dict[int, list[Bucket]] = {}
        self._updates: dict[str, Any] = {"muon": ([], 0), "adamw": []}

    def _plan(self, index: int) -> list[Bucket]:
        """The static plan of group `index`; made at construction, and again after unpickling."""
        if index not in self._plans:
            self._plans[index] = plan_buckets(self.param_groups[index])
        return self._plans[index]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, now or later, with its state. Raises ConfigError where a parameter does not fit it."""
        super().add_param_group({k: v for k, v in param_group.items() if k != "reasons"})
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if group["algorithm"] == "muon":
                self._plan(len(self.param_groups) - 1)
        except ConfigError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            state = self.state[p]
            if group["algorithm"] == "muon":
                state["momentum_sum"] = torch.zeros_like(p, requires_grad=False)
            else:
                state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
                state["step"] = torch.zeros((), dtype=torch.float32)

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
        self._updates = {"muon": ([], 0), "adamw": []}
        for index, group in enumerate(self.param_groups):
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                raise ConfigError("Muon takes dense gradients: build the embedding with sparse=False.")
            if group["algorithm"] == "adamw":
                self._step_adamw(group)
                continue
            for bucket in self._plan(index):
                for batch in bucket.batches:
                    self._step_batch(group, bucket, batch)
        return loss

    def _step_batch(self, group: dict[str, Any], bucket: Bucket, batch: tuple[Segment, ...]) -> None:
        """Momentum where the parameter lives; whole matrices in, whole updates out; the update where it lives.

        The line between the three is where matrices that are spread over processes will travel.
        """
        params: list[nn.Parameter] = group["params"]
        present = [s for s in batch if params[s.param].grad is not None]
        if not present:
            return
        update_BMN = newton_schulz(
            self._momentum(group, bucket, present),
            group["ns_coefficients"],
            group["ns_steps"],
            bucket.dtype,
            group["ns_form"],
        )
        self._apply(group, bucket, present, update_BMN)

    def _momentum(self, group: dict[str, Any], bucket: Bucket, segments: list[Segment]) -> Tensor:
        """M <- mu M + G, and the direction mu M + G (M without Nesterov) as one new [B, M, N]."""
        params: list[nn.Parameter] = group["params"]
        grads = [s.of(_grad(params[s.param])) for s in segments]
        sums = [s.of(self.state[params[s.param]]["momentum_sum"]) for s in segments]
        torch._foreach_mul_(sums, group["momentum"])
        torch._foreach_add_(sums, grads)
        ahead = torch._foreach_add(grads, sums, alpha=group["momentum"]) if group["nesterov"] else sums
        return torch.cat([x.reshape(-1, bucket.rows, bucket.cols) for x in ahead])

    def _apply(self, group: dict[str, Any], bucket: Bucket, segments: list[Segment], update_BMN: Tensor) -> None:
        """W <- (1 - lr wd) W - lr update_rms sqrt(max(rows, cols)) O, with the unscaled lr in the decay."""
        lr, scale = float(group["lr"]), group["update_rms"] * max(bucket.rows, bucket.cols) ** 0.5
        weights = [s.of(group["params"][s.param].detach()) for s in segments]
        counts = [w.numel() // (bucket.rows * bucket.cols) for w in weights]
        updates = [u.reshape(w.shape) for u, w in zip(update_BMN.split(counts), weights, strict=True)]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr * scale)
        norms, elements = self._updates["muon"]
        norms.append(torch.linalg.vector_norm(update_BMN, dtype=torch.float32) * scale)
        self._updates["muon"] = (norms, elements + update_BMN.numel())

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        # The fused kernel reads and writes everything once; on a CPU torch's default is one loop per operation.
        fused = all(p.is_cpu and p.is_floating_point() for p in params)
        adamw(
            [p.detach() for p in params],
            [_grad(p) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._updates["adamw"].append((params, group["betas"], group["eps"]))

    @property
    def last_stats(self) -> dict[str, dict[str, float]]:
        """{"update_rms": {"muon": x, "adamw": y}}: RMS per element of the last step's update before lr and decay.

        Only of algorithms that updated something. Muon's is counted during the step, AdamW's computed from its state
        when asked, so ask before loading another state.
        """
        rms = {}
        norms, elements = self._updates["muon"]
        if elements:
            rms["muon"] = (sum(float(norm) ** 2 for norm in norms) / elements) ** 0.5
        squares, elements = 0.0, 0
        for params, betas, eps in self._updates["adamw"]:
            for p in params:
                squares += _adamw_update_square(self.state[p], betas, eps)
                elements += p.numel()
        if elements:
            rms["adamw"] = (squares / elements) ** 0.5
        return {"update_rms": rms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of `state_dict()`, and lr.

        Every other hyper-parameter comes from this optimizer's construction: torch would overwrite it silently.
        Raises CheckpointError, before anything changes, for a saved hyper-parameter or parameter list that differs
        (with the differences) and for state that is missing or misshapen.
        """
        problems = _group_differences(self.param_groups, state_dict["param_groups"])
        if problems:
            raise CheckpointError(
                "the saved optimizer is not this one: " + "; ".join(problems) + ". Hyper-parameters come from the "
                "config: set them back, or start from the checkpoint's weights with a fresh optimizer."
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for index, key in enumerate(saved["params"]):
                self._check_saved_state(group, index, state_dict["state"].get(key, {}))
        super().load_state_dict(state_dict)

    def _check_saved_state(self, group: dict[str, Any], index: int, saved: Mapping[str, Any]) -> None:
        name = group["param_names"][index] if "param_names" in group else f"number {index}"
        for key in _STATE[group["algorithm"]]:
            expected = self.state[group["params"][index]][key].shape
            if key not in saved or saved[key].shape != expected:
                got = f"has shape {list(saved[key].shape)}" if key in saved else "is missing"
                raise CheckpointError(
                    f"the saved optimizer state {key} of parameter {name} {got}, not {list(expected)}: "
                    f"the checkpoint is of another optimizer or model."
                )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Muon:
    """The optimizer of a config for any module; freezes the parameters that `config.freeze` names."""
    return Muon(
        param_groups(model, algorithm=config.algorithm, freeze=config.freeze),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        update_rms=config.update_rms,
        ns_coefficients=config.ns_coefficients,
        ns_steps=config.ns_steps,
        ns_dtype=config.ns_dtype,
        ns_form=config.ns_form,
    )


def plan_buckets(group: Mapping[str, Any]) -> list[Bucket]:
    """The static plan of a "muon" group: its logical matrices by shape, type and device, in batches.

    Every row of every parameter is in exactly one segment. The plan is a function of shapes, not of gradients.
    """
    members: dict[tuple[int, int, torch.dtype, torch.device], list[tuple[Segment, int]]] = {}
    for index, (p, spec) in enumerate(zip(group["params"], group["matrices"], strict=True)):
        for unit in logical_units(p.shape, spec):
            elements = (unit.stop - unit.start) * (p.numel() // max(1, p.shape[0]))
            count = elements // max(1, unit.rows * unit.cols)
            key = (unit.rows, unit.cols, p.dtype, p.device)
            if count:
                members.setdefault(key, []).append((Segment(index, unit.start, unit.stop), count))
    buckets = []
    for (rows, cols, _, device), pieces in members.items():
        dtype = resolve_dtype(group["ns_dtype"], device)
        resolve_form(group["ns_form"], rows, cols, dtype, device)  # refused here, not in the middle of a step
        capacity = matrices_per_batch(rows, cols, dtype, device)
        buckets.append(Bucket(rows, cols, dtype, _batches(pieces, capacity)))
    return buckets


def resolve_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The type of Newton-Schulz: "auto" is bf16 on an accelerator, and on a CPU only where it is measured faster."""
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]
    if device.type == "cpu":
        from earthshine.device import choose_compute_dtype

        return choose_compute_dtype("auto", device).dtype
    return torch.bfloat16


def _batches(pieces: list[tuple[Segment, int]], capacity: int) -> tuple[tuple[Segment, ...], ...]:
    """Pieces in order, as many matrices to a batch as fit; neighbours of one parameter become one segment."""
    batches: list[list[Segment]] = []
    room = 0
    for segment, count in pieces:
        if count > room:
            batches.append([])
            room = max(capacity, count)
        batch = batches[-1]
        if batch and batch[-1].param == segment.param and batch[-1].stop == segment.start:
            batch[-1] = Segment(segment.param, batch[-1].start, segment.stop)
        else:
            batch.append(segment)
        room -= count
    return tuple(map(tuple, batches))


def _check_group(group: dict[str, Any]) -> None:
    """Fill in "matrices"; ConfigError for options out of range and for parameters that the algorithm cannot take."""
    OptimizerConfig(  # holds the rules of each option
        algorithm=group["algorithm"],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        update_rms=group["update_rms"],
        ns_coefficients=group["ns_coefficients"],
        ns_steps=group["ns_steps"],
        ns_dtype=group["ns_dtype"],
        ns_form=group["ns_form"],
    )
    params = group["params"]
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(params))]
    for name, p in zip(names, params, strict=True):
        if not p.is_floating_point():
            raise ConfigError(f"{name} has type {p.dtype}: Muon takes real floating-point parameters.")
    if group["algorithm"] != "muon":
        return
    group["matrices"] = tuple(tuple(spec) for spec in group.get("matrices") or (("matrix",),) * len(params))
    if len(group["matrices"]) != len(params):
        raise ConfigError(f"{len(group['matrices'])} 'matrices' for {len(params)} parameters: one each is needed.")
    for name, p, spec in zip(names, params, group["matrices"], strict=True):
        if spec == ("matrix",) and p.ndim != 2:
            raise ConfigError(
                f"{name} of shape {list(p.shape)} is not one matrix: give it algorithm='adamw' or say in 'matrices' "
                f"what it holds; param_groups(model) does both."
            )
        logical_units(p.shape, spec, name)


def _group_differences(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[str]:
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


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None  # callers have looked
    return p.grad


def _adamw_update_square(state: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> float:
    """Sum of squares of m_hat / (sqrt(v_hat) + eps), from the moments after a step."""
    step = float(state["step"])
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    total = 0.0
    for m, v in zip(
        state["exp_avg"].reshape(-1).split(_STATS_ELEMENTS),
        state["exp_avg_sq"].reshape(-1).split(_STATS_ELEMENTS),
        strict=True,
    ):
        update = m / (v.sqrt().div_(correction2**0.5).add_(eps))
        total += float(torch.linalg.vector_norm(update, dtype=torch.float32)) ** 2
    return float(total / correction1**2)
