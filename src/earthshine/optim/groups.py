"""Which parameter gets which algorithm and why; and the logical matrices inside a parameter.

Moonlight's division (arXiv:2502.16982 section 3, figure 4): Muon for every matrix of the hidden layers, router,
experts and projections included; AdamW for embeddings, the language-model head, norms, vectors, and matrices of one
row or one column, which have a single singular value.

A *logical matrix* is what Newton-Schulz is applied to: it has its own norm and its own sqrt(max(rows, cols)). A
specification says how a parameter divides into them:
    ("matrix",)           the parameter is one matrix [rows, cols]
    ("batch",)            a stack [..., rows, cols], each [rows, cols] its own matrix (experts)
    ("rows", (n1, n2))    blocks of rows of [n1 + n2, cols], each its own matrix (fused projections)
    ("flatten", groups)   a convolution kernel [out, in/groups, ...]: per group one matrix [out/groups, in/groups * ...]
A module that holds fused or stacked matrices says so by `logical_matrices() -> {parameter name: specification}`.

A linear layer is one matrix as it is stored: also where it makes several things at once, as latent attention's q_proj
(each head's part without and with rotary positions), kv_a_proj_with_mqa (latent and rotary key) and kv_b_proj (each
head's keys and values) do. Moonlight's released weights are stored so; its paper does not say whether training split
them, and its spectra take the parts one by one. `matrices={"*.kv_a_proj_with_mqa.weight": ("rows", (512, 64))}` would.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from earthshine.errors import ConfigError

Spec = tuple[Any, ...]

_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Last names of a language-model head that is a plain linear layer.
_HEAD_NAMES = ("head", "lm_head", "unembed", "embed_out", "output_projection")


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a parameter that is whole matrices: rows start to stop of dimension 0, which hold
    (stop - start) * elements per row / (rows * cols) matrices of rows x cols, one after the other."""

    start: int
    stop: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Assignment:
    """One parameter's algorithm ("muon" or "adamw"), its logical matrices and the reason."""

    name: str
    parameter: Tensor
    algorithm: str
    matrices: Spec
    why: str


def logical_units(shape: Sequence[int], spec: Spec, name: str = "parameter") -> list[Unit]:
    """The units of a parameter of this shape; together they cover it exactly.

    Raises ConfigError where the specification does not fit the shape: a wrong split would be a silent wrong scale.
    """
    kind, args = (spec[0], spec[1:]) if spec else ("", ())
    if kind == "matrix" and not args and len(shape) == 2:
        return [Unit(0, shape[0], shape[0], shape[1])]
    if kind == "batch" and not args and len(shape) >= 3:
        return [Unit(e, e + 1, shape[-2], shape[-1]) for e in range(shape[0])]
    if kind == "rows" and len(args) == 1 and len(shape) == 2:
        sizes = [int(n) for n in args[0]]
        if sizes and min(sizes) > 0 and sum(sizes) == shape[0]:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return [Unit(start, start + n, n, shape[1]) for start, n in zip(starts, sizes, strict=True)]
    if kind == "flatten" and len(args) == 1 and len(shape) >= 2 and args[0] >= 1 and shape[0] % args[0] == 0:
        rows, cols = shape[0] // args[0], 1
        for n in shape[1:]:
            cols *= n
        return [Unit(g * rows, (g + 1) * rows, rows, cols) for g in range(args[0])]
    raise ConfigError(
        f"{name} of shape {list(shape)} cannot be divided into logical matrices by {spec!r}: use ('matrix',) for "
        f"[rows, cols], ('batch',) for a stack of three or more dimensions, ('rows', sizes) with sizes that add up to "
        f"dimension 0, or ('flatten', groups) for a convolution kernel."
    )


def param_groups(
    model: nn.Module,
    *,
    algorithm: str = "muon",
    freeze: Iterable[str] = (),
    adamw: Iterable[str] = (),
    matrices: Mapping[str, Spec] | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups of `Muon` for any module: at most one with algorithm "muon", one with "adamw".

    algorithm: "adamw" gives every trained parameter to AdamW, without any question.
    freeze: name patterns (fnmatch); matching parameters get requires_grad=False and are left out, as are those
        that are frozen already.
    adamw: name patterns of parameters that go to AdamW whatever they are.
    matrices: name pattern -> specification, for parameters whose module does not say what they hold.
    Raises ConfigError for a parameter that none of the rules decides, and for a pattern that matches nothing.
    """
    if algorithm not in ("muon", "adamw"):
        raise ConfigError(f"optimizer.algorithm={algorithm!r} must be one of muon, adamw.")
    everything = ["*"] if algorithm == "adamw" else []
    assigned = assign(model, freeze=freeze, adamw=[*everything, *adamw], matrices=matrices or {})
    groups: list[dict[str, Any]] = []
    for kind in ("muon", "adamw"):
        members = [a for a in assigned if a.algorithm == kind]
        if members:
            group: dict[str, Any] = {"params": [(a.name, a.parameter) for a in members], "algorithm": kind}
            if kind == "muon":
                group["matrices"] = tuple(a.matrices for a in members)
            groups.append(group | {"reasons": tuple(a.why for a in members)})
    if not groups:
        raise ConfigError(f"no parameter is left to train: freeze={list(freeze)} or requires_grad covers all of them.")
    return groups


def assign(
    model: nn.Module, *, freeze: Iterable[str], adamw: Iterable[str], matrices: Mapping[str, Spec]
) -> list[Assignment]:
    """What `param_groups` decides, parameter by parameter in the model's order; freezes what `freeze` matches."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    freeze, adamw = tuple(freeze), tuple(adamw)
    for option, patterns in (("freeze", freeze), ("adamw", adamw), ("matrices", matrices)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"{option} pattern {pattern!r} matches none of the {len(names)} parameters.")
    heads = _heads(model)
    suspect = _suspected_head(model, heads)
    found: dict[int, Assignment] = {}
    places = list(_places(model))
    for name, _, _, p in places:
        if _matches(name, freeze):
            p.requires_grad_(False)
    for name, module, local, p in places:
        if not p.requires_grad:
            continue
        if _matches(name, adamw):
            new = Assignment(name, p, "adamw", (), "asked for")
        elif given := [spec for pattern, spec in matrices.items() if fnmatch.fnmatchcase(name, pattern)]:
            new = _muon(name, p, given[0], "asked for")
        elif name == suspect:
            raise ConfigError(
                f"{name} {list(p.shape)} may be the head, as it has one row per embedding, or a hidden layer: decide "
                f"by adamw=[{name!r}] or matrices={{{name!r}: ('matrix',)}}."
            )
        else:
            new = _decide(name, module, local, p, id(p) in heads)
        old = found.setdefault(id(p), new)
        if old.algorithm != new.algorithm:  # one tensor in two places: AdamW is right for an embedding's matrix
            side = old if old.algorithm == "adamw" else new
            found[id(p)] = Assignment(old.name, p, "adamw", (), f"{side.why}, tied")
    return list(found.values())


def describe(groups: Sequence[Mapping[str, Any]], model: nn.Module | None = None) -> str:
    """A table of who gets what and why; names that differ only in numbers share a line.

    groups: of `param_groups`, or an optimizer's. model: when given, its parameters in no group are shown as frozen.
    """
    lines: dict[tuple[str, ...], list[int]] = {}

    def add(name: str, p: Tensor, algorithm: str, matrices: Spec, why: str) -> None:
        key = (algorithm, re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name), _matrices_text(tuple(p.shape), matrices), why)
        count = lines.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += p.numel()

    seen: set[int] = set()
    for group in groups:
        named = _named(group)
        specs = group.get("matrices") or ((),) * len(named)
        reasons = group.get("reasons") or ("",) * len(named)
        for (name, p), spec, why in zip(named, specs, reasons, strict=True):
            seen.add(id(p))
            add(name, p, group.get("algorithm", "muon"), spec, why)
    for name, p in model.named_parameters() if model is not None else ():
        if id(p) not in seen:
            add(name, p, "frozen", (), "not trained")
    rows = [("algorithm", "parameter", "tensors", "elements", "each holds", "why")]
    rows += [(k[0], k[1], str(n[0]), f"{n[1]:,}", k[2], k[3]) for k, n in lines.items()]
    for kind in ("muon", "adamw", "frozen"):
        if chosen := [n for k, n in lines.items() if k[0] == kind]:
            rows.append((kind, "in all", str(sum(n[0] for n in chosen)), f"{sum(n[1] for n in chosen):,}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _decide(name: str, module: nn.Module, local: str, p: Tensor, is_head: bool) -> Assignment:
    kind = type(module).__name__
    declare = getattr(module, "logical_matrices", None)
    declared: Mapping[str, Spec] = declare() if callable(declare) else {}
    if local in declared:
        return _muon(name, p, declared[local], f"declared by {kind}")
    if isinstance(module, _EMBEDDINGS):
        return Assignment(name, p, "adamw", (), f"embedding ({kind})")
    if isinstance(module, _NORMS):
        return Assignment(name, p, "adamw", (), f"norm ({kind})")
    if p.ndim < 2:
        return Assignment(name, p, "adamw", (), "vector or scalar")
    if p.numel() == max(p.shape):
        return Assignment(name, p, "adamw", (), "matrix of one row or column")
    if is_head:
        return Assignment(name, p, "adamw", (), "head")
    if isinstance(module, nn.Linear) and local == "weight":
        return _muon(name, p, ("matrix",), f"linear layer ({kind})")
    if isinstance(module, _CONVOLUTIONS) and local == "weight":
        return _muon(name, p, ("flatten", module.groups), f"convolution ({kind})")
    raise ConfigError(
        f"cannot tell which optimizer {name} {list(p.shape)} of {kind} needs: its rows and columns may be several "
        f"fused matrices. Give {kind} a method logical_matrices(), or pass matrices={{{name!r}: specification}} or "
        f"adamw=[{name!r}]."
    )


def _muon(name: str, p: Tensor, spec: Spec, why: str) -> Assignment:
    units = logical_units(p.shape, spec, name)
    if all(min(u.rows, u.cols) == 1 for u in units):
        return Assignment(name, p, "adamw", (), "matrix of one row or column")
    return Assignment(name, p, "muon", spec, why)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, owning module, local name, parameter), a tied parameter once per place."""
    for prefix, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False):
            yield f"{prefix}.{local}" if prefix else local, module, local, p


def _heads(model: nn.Module) -> set[int]:
    """ids of the weights of the language-model head: transformers' own answer, or a linear layer of a head's name."""
    heads = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _HEAD_NAMES
    }
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    return heads | ({id(output.weight)} if isinstance(output, nn.Linear) else set())


def _suspected_head(model: nn.Module, heads: set[int]) -> str:
    """The weight name of a last linear layer with one row per embedding, in a model that shows no head; else ""."""
    embeddings = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    declared_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if heads or declared_tied or not linears:
        return ""
    name, last = linears[-1]
    tied = any(last.weight is m.weight for m in embeddings)
    per_embedding = any(last.out_features == m.num_embeddings for m in embeddings)
    return f"{name}.weight" if per_embedding and not tied else ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, parameter) of a group before or after the optimizer took it."""
    if "param_names" in group:
        return list(zip(group["param_names"], group["params"], strict=True))
    return [item if isinstance(item, tuple) else (f"{i}", item) for i, item in enumerate(group["params"])]


def _matrices_text(shape: tuple[int, ...], spec: Spec) -> str:
    if not spec:
        return " x ".join(map(str, shape)) or "scalar"
    counts: dict[tuple[int, int], int] = {}
    elements_per_row = 1
    for n in shape[1:]:
        elements_per_row *= n
    for u in logical_units(shape, spec):
        count = (u.stop - u.start) * elements_per_row // (u.rows * u.cols)
        counts[u.rows, u.cols] = counts.get((u.rows, u.cols), 0) + count
    return " + ".join(f"{count} of {rows} x {cols}" for (rows, cols), count in counts.items())
