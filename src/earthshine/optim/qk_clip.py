"""QK-Clip: shrink the queries and keys of attention heads whose logits grew too large (Kimi K2, arXiv:2507.20534).

After the optimizer's step, for each head h with S_h, the largest logit of the step's training batches,

    S_h = max over sequences and attended pairs i, j of  scale * q_i^h . k_j^h
    gamma_h = min(1, tau / S_h)                                                      tau = 100

the rows of the projections that make q^h and k^h (and their biases) are scaled so that every logit of the head becomes
gamma_h times what it was; of a head below tau, none is touched:

    one key per query head    W_q^h *= gamma_h^alpha,   W_k^h *= gamma_h^(1 - alpha)                 alpha = 1/2
    grouped queries           W_k^g *= gamma_g^(1 - alpha),   W_q^h *= gamma_h / gamma_g^(1 - alpha),
                              gamma_g = min over the heads h that share key g
    latent attention          W_q^h without rotation *= gamma_h^alpha, its keys in kv_b *= gamma_h^(1 - alpha),
                              W_q^h with rotation *= gamma_h, the key that all heads share is left alone

The grouped form is ours: the paper has one key per head, and is its special case. Rotary positions and softmax's scale
commute with all of it, and so does the norm before kv_b, being before. The state of the optimizer is left as it is.

    clip = QKClip(model)
    optimizer.register_step_post_hook(clip)
    with clip.recording():
        ... the training loop ...
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.ops.attention import max_logits as _max_logits
from earthshine.optim.sharding.layout import read_layout

_REQUIRED = ("kind", "heads", "key_heads", "rows", "query", "key")


class QKClip:
    """Clips the attention layers of `model`; an instance is a hook for `optimizer.register_step_post_hook`.

    threshold: tau. alpha: the share of the shrinking that queries take.
    heads: for modules that have no method `query_key_heads()`: what it would return (as documented at
        `earthshine.model.attention.Attention.query_key_heads`), by module name or pattern (fnmatch).
    first_head: where the heads that this process's forward sees begin, when it sees some of them (tensor parallel).
    process_group: over which maxima are taken together, in each `clip` (a collective). None: all processes, where
        torch.distributed is initialised. With pipeline parallelism pass the stage's, as others have other layers.

    Weights may be plain tensors or DTensors of any layout; names are looked up at each clip, so that the model may be
    sharded before or after. Raises ConfigError where no layer declares heads, for a declaration that does not fit its
    parameters, for weights that two layers share, and for queries and keys normalised per head (Qwen3), on whose
    logits the scale of the projection has no effect.
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
        self.layers = _find_layers(model, heads or {})
        self.last_max_logits: dict[str, Tensor] = {}
        self._recorded: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, every forward in training mode adds to its layer's maxima, until the next clip by the hook.

        Micro-batches, recomputation and accumulation are all one maximum. Costs one product of queries and keys per
        forward. Raises ConfigError for modules without `logit_observer` (pass `clip` the maxima then).
        """
        for name, (module, _) in self.layers.items():
            if getattr(module, "logit_observer", self) is not None:
                raise ConfigError(
                    f"{name} ({type(module).__name__}) cannot be recorded: it has no attribute logit_observer, or is "
                    f"being recorded already. Compute its maxima with earthshine.ops.attention.max_logits and pass "
                    f"them to QKClip.clip."
                )
        try:
            for name, (module, _) in self.layers.items():
                setattr(module, "logit_observer", partial(self._observe, name, module))  # noqa: B010
            yield
        finally:
            for module, _ in self.layers.values():
                setattr(module, "logit_observer", None)  # noqa: B010

    def _observe(
        self, name: str, module: nn.Module, q_BHSC: Tensor, k_BGPC: Tensor, scale: float, documents_BS: Tensor | None
    ) -> None:
        if not module.training:
            return
        new_H = _max_logits(q_BHSC, k_BGPC, scale, documents_BS)
        if name not in self._recorded:
            self._recorded[name] = torch.full_like(new_H, -math.inf)
        # In place: what a compiled model sees is then one tensor, whichever step it is.
        torch.maximum(self._recorded[name], new_H, out=self._recorded[name])

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook: clip by what was recorded since the last time, and start again."""
        self.clip(self._recorded)
        for largest_H in self._recorded.values():
            largest_H.fill_(-math.inf)

    @torch.no_grad()
    def clip(self, max_logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale the weights by the largest logits of each layer's heads; (heads,) each, or those from `first_head` on.

        Layers that are not given are left alone, as are heads of -inf. Returns gamma (float64, on the CPU) of the
        layers with a head above the threshold. The maxima over all processes are in `last_max_logits` afterwards.
        Raises ConfigError for another layer or number of heads, TrainingDivergedError, before anything is changed,
        for a maximum that is not finite.
        """
        self.last_max_logits = self._gather(max_logits)
        for name, largest_H in self.last_max_logits.items():
            if bool((largest_H == math.inf).any()):
                raise TrainingDivergedError(
                    f"the largest attention logit of {name} is not finite: the forward pass has diverged. Go back to "
                    f"a checkpoint and lower the learning rate or QKClip's threshold={self.threshold}."
                )
        clipped = {}
        for name, largest_H in self.last_max_logits.items():
            gamma_H = torch.where(largest_H > self.threshold, self.threshold / largest_H, 1.0)
            if bool((gamma_H < 1).any()):
                clipped[name] = gamma_H
                module, description = self.layers[name]
                for local, factor_R in _row_factors(description, gamma_H, self.alpha).items():
                    _scale_rows(f"{name}.{local}".lstrip("."), module.get_parameter(local), factor_R)
        return clipped

    def _gather(self, max_logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per layer the maxima of all heads over all processes, float64 on the CPU; one transfer, one collective."""
        unknown = sorted(set(max_logits) - set(self.layers))
        if unknown:
            raise ConfigError(f"max_logits of {unknown[0]!r}: not one of the layers {', '.join(self.layers)}.")
        sizes = [description["heads"] for _, description in self.layers.values()]
        module, description = next(iter(self.layers.values()))
        weight = module.get_parameter(description["query"][0])
        everything = torch.full(
            (sum(sizes),), -math.inf, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        for (name, (_, description)), part in zip(self.layers.items(), everything.split(sizes), strict=True):
            if name in max_logits:
                given, size = max_logits[name].detach(), description["heads"]
                first = 0 if given.numel() == size else self.first_head
                if given.ndim != 1 or first + given.numel() > size:
                    raise ConfigError(
                        f"max_logits of {name} has shape {list(given.shape)}, not [{size}], one per query head; some "
                        f"of the heads need QKClip(first_head=...), which is {self.first_head}."
                    )
                # A collective's maximum of NaN and a number may be either: infinity is not overlooked.
                part[first : first + given.numel()] = given.to(part).nan_to_num(math.inf, math.inf, -math.inf)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(everything, dist.ReduceOp.MAX, group=self.process_group)
        return dict(zip(self.layers, everything.cpu().double().split(sizes), strict=True))


def _find_layers(
    model: nn.Module, given: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[nn.Module, Mapping[str, Any]]]:
    """Module name -> (module, what `query_key_heads` says), checked; in the model's order."""
    layers: dict[str, tuple[nn.Module, Mapping[str, Any]]] = {}
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
        for local in (*description["query"], *description["key"]):
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
    if not layers:
        raise ConfigError(
            "no module of the model has query_key_heads(): QKClip needs to know which rows make a head's queries and "
            "keys; say it in heads={'*.self_attn': {...}}."
        )
    return layers


def _check(name: str, module: nn.Module, description: Mapping[str, Any]) -> None:
    """Raises ConfigError for a declaration that is incomplete, does not fit, or that clipping cannot serve."""
    missing = [key for key in _REQUIRED if key not in description]
    if missing or description["kind"] not in ("gqa", "mla"):
        raise ConfigError(
            f"heads of {name}: needs {', '.join(_REQUIRED)} with kind 'gqa' or 'mla', not {description!r}."
        )
    if description.get("normalised", False):
        raise ConfigError(
            f"{name} normalises queries and keys per head after their projection (qk_norm): the scale of the "
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
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    factor_R = factor_R.to(local.device, torch.promote_types(local.dtype, torch.float32))
    local.mul_(factor_R.view(-1, *[1] * (local.ndim - 1)))
