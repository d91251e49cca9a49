"""QK-Clip: shrink queries and keys of attention heads whose logits grew too large (Kimi K2, arXiv:2507.20534).

After the optimizer's step, for each head h, over all sequences and attended pairs i, j of the step:

    S_h = max scale * q_i^h . k_j^h,   gamma_h = min(1, tau / S_h)                        tau = 100, alpha = 1/2

    one key per query head    W_q^h *= gamma_h^alpha,   W_k^h *= gamma_h^(1 - alpha)
    grouped queries (ours)    W_k^g *= gamma_g^(1 - alpha),   W_q^h *= gamma_h / gamma_g^(1 - alpha),
                              gamma_g = min over the heads h that share key g
    latent attention          W_q^h without rotation *= gamma_h^alpha, its keys in kv_b *= gamma_h^(1 - alpha),
                              W_q^h with rotation *= gamma_h, the key that all heads share stays

Every logit of the head, biases included, becomes gamma_h times what it was. `train` clips by
`optimizer.qk_clip_threshold`; in another loop:

    clip = QKClip(model)
    optimizer.register_step_post_hook(clip)
    with clip.recording():
        ... the training loop ...
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from earthshine.device import Readings, at_least_float32_dtype
from earthshine.errors import ConfigError, TrainingDivergedError, nearest
from earthshine.optim.sharding.layout import read_layout, to_local

_REQUIRED = ("kind", "heads", "key_heads", "rows", "query", "key")
_OPTIONAL = ("normalized",)


class QKClip:
    """Clips the attention layers of `model`; an instance is a hook for `optimizer.register_step_post_hook`.

    threshold: tau. alpha: the fraction of the shrinking that queries take.
    heads: for modules that have no method `query_key_heads()`: what it would return (as documented at
        `earthshine.model.attention.Attention.query_key_heads`), by module name or pattern (fnmatch).
    first_head: the first head that this process's forward computes, if it computes some of them (tensor parallel).
    process_group: over which maxima are reduced, in each clip (a collective). None: all processes, where
        torch.distributed is initialized. With pipeline parallelism pass the stage's, as others have other layers.

    Layers with a frozen query or key projection are left out: `frozen` names them. Nothing waits for an accelerator.
    Weights may be plain tensors or DTensors of any layout; names are looked up at each clip, so that the model may be
    sharded before or after. Raises ConfigError where no layer declares heads or none is trained, for a declaration that
    does not fit its parameters, for weights that two layers share, and for queries and keys normalized per head
    (Qwen3), on whose logits the scale of the projection has no effect.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 100.0,
        alpha: float = 0.5,
        *,
        heads: Mapping[str, Mapping[str, Any]] | None = None,
        first_head: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not threshold > 0:
            raise ConfigError(f"QKClip threshold={threshold} must be positive: Kimi K2 uses 100.")
        if not 0 <= alpha <= 1:
            raise ConfigError(
                f"QKClip alpha={alpha} must be from 0 (keys shrink) to 1 (queries do): the default is 0.5."
            )
        self.threshold, self.alpha = threshold, alpha
        self.first_head, self.process_group = first_head, process_group
        self.layers, self.frozen = _find_layers(model, heads or {})
        self.last_max_logits: dict[str, Tensor] = {}
        self._numbers = Readings()
        self._recorded_H: Tensor | None = None  # heads of all layers, one after another

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, every training forward raises its layer's maxima, until the next clip by them.

        Micro-batches, recomputation and accumulation are all one maximum; evaluation and forwards without gradient
        are not recorded. Costs what `max_logits_H` of `ops.attention.causal_attention` does. Raises ConfigError for
        modules without `max_logits_H` (pass `clip` the maxima then).
        """
        for name, (module, _) in self.layers.items():
            if getattr(module, "max_logits_H", self) is not None:
                raise ConfigError(
                    f"{name} ({type(module).__name__}) cannot be recorded: it has no attribute max_logits_H, or is "
                    f"being recorded already. Compute its maxima with earthshine.ops.attention.max_logits and pass "
                    f"them to QKClip.clip."
                )
        if self._recorded_H is None or self._recorded_H.device != self._device:
            self._recorded_H = self._no_maxima()
        self._recorded_H.fill_(-math.inf)
        try:
            for (module, _), largest_H in zip(self.layers.values(), self._by_layer(self._recorded_H), strict=True):
                setattr(module, "max_logits_H", largest_H[self.first_head :])  # noqa: B010
            yield
        finally:
            for module, _ in self.layers.values():
                setattr(module, "max_logits_H", None)  # noqa: B010

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook: clip by what was recorded since the last time, and start again."""
        self.clip_recorded()

    def clip_recorded(self) -> None:
        """`clip` by what was recorded since the last time, and start again."""
        if self._recorded_H is None:
            self._recorded_H = self._no_maxima()
        self._clip(self._recorded_H)
        self._recorded_H.fill_(-math.inf)

    def clip(self, max_logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale the weights by the largest logits of each layer's heads; (heads,) each, or those from `first_head` on.

        Layers that are not given are left alone, as are heads of -inf. Returns each given layer's gamma, (heads,) in
        float64, on the device: 1 where nothing is clipped. The maxima over all processes are then in `last_max_logits`.
        Raises ConfigError for another layer or number of heads and, on a CPU, TrainingDivergedError for a maximum that
        is not finite, before anything is changed. On an accelerator such a head is left alone; `measure` tells.
        """
        unknown = sorted(set(max_logits) - set(self.layers))
        if unknown:
            raise ConfigError(f"max_logits of {unknown[0]!r}: not one of the layers {', '.join(self.layers)}.")
        max_H = self._no_maxima()
        for name, of_layer_H in zip(self.layers, self._by_layer(max_H), strict=True):
            if name in max_logits:
                given, size = max_logits[name].detach(), len(of_layer_H)
                first = 0 if given.numel() == size else self.first_head
                if given.ndim != 1 or first + given.numel() > size:
                    raise ConfigError(
                        f"max_logits of {name} has shape {list(given.shape)}, not [{size}], one per query head; some "
                        f"of the heads need QKClip(first_head=...), which is {self.first_head}."
                    )
                of_layer_H[first : first + given.numel()] = given.to(of_layer_H)
        gamma = self._clip(max_H)
        return {name: gamma[name] for name in max_logits}

    def measure(self) -> Readings:
        """Of the last clip: the largest logit of all heads, and how many heads were clipped."""
        return self._numbers

    @property
    def _device(self) -> torch.device:
        return self._first_weight.device

    @property
    def _first_weight(self) -> Tensor:
        module, description = next(iter(self.layers.values()))
        return module.get_parameter(description["query"][0])

    def _no_maxima(self) -> Tensor:
        """-inf for every head of every layer."""
        num_heads = sum(description["heads"] for _, description in self.layers.values())
        dtype = at_least_float32_dtype(self._first_weight.dtype)
        return torch.full((num_heads,), -math.inf, dtype=dtype, device=self._device)

    def _by_layer(self, all_H: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = all_H.split([description["heads"] for _, description in self.layers.values()])
        return parts

    @torch.no_grad()
    def _clip(self, max_H: Tensor) -> dict[str, Tensor]:
        """Reduce the maxima of all heads over processes and scale what exceeds the threshold; gamma by layer."""
        # A collective's maximum of NaN and a number may be either: infinity is not overlooked.
        max_H = max_H.nan_to_num(math.inf, math.inf, -math.inf)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(max_H, dist.ReduceOp.MAX, group=self.process_group)
        max_H = max_H.double()
        exceeds_H = (max_H > self.threshold) & max_H.isfinite()
        gamma_H = torch.where(exceeds_H, self.threshold / max_H, 1.0)
        self._numbers = Readings(max_H.amax(), exceeds_H.sum())
        self.last_max_logits = dict(zip(self.layers, self._by_layer(max_H), strict=True))
        if max_H.is_cpu:
            self._require_finite()
        gamma = dict(zip(self.layers, self._by_layer(gamma_H), strict=True))
        for name, (module, description) in self.layers.items():
            # Where it is known without waiting that all factors are 1, nothing is multiplied.
            if not gamma_H.is_cpu or bool((gamma[name] < 1).any()):
                for local, factor_R in _row_factors(description, gamma[name], self.alpha).items():
                    _scale_rows(f"{name}.{local}".lstrip("."), module.get_parameter(local), factor_R)
        return gamma

    def _require_finite(self) -> None:
        for name, largest_H in self.last_max_logits.items():
            if bool((largest_H == math.inf).any()):
                raise TrainingDivergedError(
                    f"the largest attention logit of {name} is not finite: the forward pass has diverged. Go back to "
                    f"a checkpoint and lower the learning rate or QKClip's threshold={self.threshold}."
                )


def _find_layers(
    model: nn.Module, given: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, tuple[nn.Module, Mapping[str, Any]]], tuple[str, ...]]:
    """Module name -> (module, what `query_key_heads` says), checked; in the model's order. And the frozen ones' names.

    One projection alone cannot take the other's part of the shrinking, which alpha gives it.
    """
    layers: dict[str, tuple[nn.Module, Mapping[str, Any]]] = {}
    frozen: list[str] = []
    owner: dict[int, str] = {}
    unused = set(given)
    for name, module in model.named_modules():
        patterns = [pattern for pattern in given if fnmatch.fnmatchcase(name, pattern)]
        unused -= set(patterns)
        declare = getattr(module, "query_key_heads", None)
        if not patterns and not callable(declare):
            continue
        description = given[patterns[0]] if patterns else declare()  # type: ignore[misc]
        _check(name, module, description)
        scaled = (*description["query"], *description["key"])
        if not all(module.get_parameter(local).requires_grad for local in scaled):
            frozen.append(name)
            continue
        for local in scaled:
            first = owner.setdefault(id(module.get_parameter(local)), name)
            if first != name:
                raise ConfigError(
                    f"{name}.{local} is shared with {first}: QK-Clip would scale it for both. Leave one of them out "
                    f"of the model that QKClip is given."
                )
        layers[name] = module, description
    if unused:
        raise ConfigError(
            f"QKClip heads pattern {sorted(unused)[0]!r} matches no module: use names of named_modules()."
        )
    if frozen and not layers:
        raise ConfigError(
            "queries or keys of every attention layer are frozen: QK-Clip has nothing to scale. Leave it out, or train "
            "them."
        )
    if not layers:
        raise ConfigError(
            "no module of the model has query_key_heads(): QKClip needs to know which rows make a head's queries and "
            "keys; say it in heads={'*.self_attn': {...}}."
        )
    return layers, tuple(frozen)


def _check(name: str, module: nn.Module, description: Mapping[str, Any]) -> None:
    """Raises ConfigError for a declaration that is incomplete, does not fit, or that clipping cannot serve."""
    missing = [key for key in _REQUIRED if key not in description]
    if missing or description["kind"] not in ("gqa", "mla"):
        raise ConfigError(
            f"heads of {name}: needs {', '.join(_REQUIRED)} with kind 'gqa' or 'mla', not {description!r}."
        )
    for key in description:
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise ConfigError(f"heads of {name}: {key!r} is not a known key.{nearest(key, (*_REQUIRED, *_OPTIONAL))}")
    if description.get("normalized", False):
        raise ConfigError(
            f"{name} normalizes queries and keys per head after their projection (qk_norm): the scale of the "
            f"projection does not reach its logits, so QK-Clip cannot lower them. Leave QKClip out: the norms bound "
            f"the logits already."
        )
    heads, key_heads = description["heads"], description["key_heads"]
    if key_heads < 1 or heads % key_heads or (description["kind"] == "mla" and heads != key_heads):
        raise ConfigError(f"heads of {name}: {heads} query heads cannot share {key_heads} key heads evenly.")
    parameters, parts = dict(module.named_parameters()), 2 if description["kind"] == "mla" else 1
    for role, count in (("query", heads), ("key", key_heads)):
        for local in description[role]:
            if local not in description["rows"] or local not in parameters:
                raise ConfigError(f"heads of {name}: {role} {local!r} must be a parameter that 'rows' describes.")
            (n, sizes), rows = description["rows"][local], parameters[local].shape[0]
            if n != count or n * sum(sizes) != rows or len(sizes) != parts:
                raise ConfigError(
                    f"heads of {name}: the {rows} rows of {local} are not {count} {role} heads, each {parts} parts "
                    f"with {sum(sizes)} rows together, as 'rows' says by {(n, tuple(sizes))}."
                )


def _row_factors(description: Mapping[str, Any], gamma_H: Tensor, alpha: float) -> dict[str, Tensor]:
    """Local parameter name -> what each of its rows is multiplied by."""
    gamma_G = gamma_H.view(description["key_heads"], -1).amin(1)
    key_G = gamma_G ** (1 - alpha)
    parts: dict[str, tuple[Tensor, ...]]
    if description["kind"] == "mla":
        parts = {"query": (gamma_H**alpha, gamma_H), "key": (key_G, torch.ones_like(key_G))}
    else:
        per_head = description["heads"] // description["key_heads"]
        parts = {"query": (gamma_H / key_G.repeat_interleave(per_head),), "key": (key_G,)}
    return {
        local: torch.cat(
            [
                factor.unsqueeze(1).expand(-1, size)
                for factor, size in zip(parts[role], description["rows"][local][1], strict=True)
            ],
            1,
        ).flatten()
        for role in ("query", "key")
        for local in description[role]
    }


def _scale_rows(name: str, weight: Tensor, factor_R: Tensor) -> None:
    """weight[r] *= factor_R[r] in place, on the rows that this process holds."""
    layout = read_layout(weight, ("flatten", 1), name)
    factor_R = torch.cat([factor_R[:0], *(factor_R[start:stop] for start, stop in layout.rows[layout.position])])
    shard = to_local(weight)
    factor_R = factor_R.to(shard.device, at_least_float32_dtype(shard.dtype))
    shard.mul_(factor_R.view(-1, *[1] * (shard.ndim - 1)))
