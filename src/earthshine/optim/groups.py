"""Which parameter gets which algorithm and why.

Moonlight's division (arXiv:2502.16982 section 3, figure 4): Muon for every matrix of the hidden layers, routers and
experts included; AdamW for embeddings, language-model head, norms, vectors, and matrices of one row or column, which
have a single singular value. With non_matrix="scion" these get Scion's steps instead (arXiv:2502.07529): "row_rms"
for embeddings, "sign" for the head, tied or not, "rms" for norms and vectors.

Newton-Schulz is applied to the *logical matrices* in a parameter (`optim.logical_matrices`). A module with fused or
stacked matrices declares them by `logical_matrices() -> {parameter name: specification}`, and each head's rows, for
heads="split", by `query_key_heads()`; transformers' expert stacks and routers are read by the flags and sizes that
they carry. Any other linear layer is one matrix, unless its name or shape shows that several are fused in it
(`optim.fused`). That, what may be an output layer (`optim.output_layers`) and anything that no rule knows is asked
about: one ConfigError lists it all, and how to answer.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.optim.config import check_option, reads_old_names
from earthshine.optim.flattened import check_shapes
from earthshine.optim.fused import Fused, expert_factors, fused_layers, layout_of
from earthshine.optim.logical_matrices import Spec, logical_matrices, normalize
from earthshine.optim.output_layers import EMBEDDINGS, ROUTER_NAMES, head_weights, is_router, possible_heads

_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NON_MATRIX = "non_matrix"  # for an algorithm that the option of this name chooses
# Parts of a name that wrappers add (torch.compile, activation checkpointing, FSDP1): a checkpoint has none of them.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Assignment:
    """One parameter's algorithm ("muon", "adamw" or "scion"), its logical matrices and the reason.

    lmo: Scion's rule for it, "row_rms", "sign" or "rms"; "" where it is a hidden matrix.
    """

    name: str
    parameter: Tensor
    algorithm: str
    matrices: Spec
    why: str
    lmo: str = ""


@dataclass(frozen=True)
class _Question:
    """A parameter that no rule decides. text: with {} for its name. spec: what it may hold, where that is known."""

    name: str
    parameter: Tensor
    text: str
    spec: Spec | None


@reads_old_names
def param_groups(
    model: nn.Module,
    *,
    algorithm: str = "muon",
    freeze: Iterable[str] = (),
    adamw: Iterable[str] = (),
    matrices: Mapping[str, Spec] | None = None,
    non_matrix: str = "adamw",
    router: str = "muon",
    heads: str = "whole",
) -> list[dict[str, Any]]:
    """The parameter groups of `Muon` for any module: at most one each with algorithm "muon", "scion" and "adamw".

    algorithm: "adamw" gives every trained parameter to AdamW, without any question.
    freeze: name patterns (fnmatch); matching parameters get requires_grad=False and are left out, as are those
        that are frozen already. Buffers that training moves are frozen by name, too, where a module lists them by
        `trained_buffers() -> {name: whether it moves}` and has `freeze_buffer(name)`, as our routers do.
    adamw: name patterns of parameters that go to AdamW whatever they are.
    matrices: name pattern -> specification, for parameters whose module does not say what they hold.
    non_matrix: who gets what is not a hidden matrix: "adamw", or "scion", whose group has an "lmo" per parameter.
    router: "adamw" gives it the routers' matrices. A router is a module with `is_router = True`, of a class named
        ...Router, or named `gate` or `router` beside `experts`.
    heads: "split" makes the rows of each attention head a matrix, where a module declares them by
        `query_key_heads() -> {"rows": {parameter name: (n, sizes)}, ...}`: n blocks of rows, each of parts of `sizes`.
    Raises ConfigError for parameters that none of the rules decides (one error for all, with what to pass), and for a
    pattern or an option that matches nothing.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module  # names of groups, as of checkpoints, are the model's own
    for option, value in (("algorithm", algorithm), ("non_matrix", non_matrix), ("router", router), ("heads", heads)):
        check_option(option, value)
    if algorithm == "adamw" and non_matrix != "adamw":
        raise ConfigError(
            f"optimizer.non_matrix={non_matrix!r} leaves nothing to algorithm='adamw': use algorithm='muon'."
        )
    everything = ["*"] if algorithm == "adamw" else []
    if algorithm == "adamw":
        router, heads = "muon", "whole"  # nothing is left for them to decide
    assigned = assign(
        model,
        freeze=freeze,
        adamw=[*everything, *adamw],
        matrices=matrices or {},
        non_matrix=non_matrix,
        router=router,
        heads=heads,
    )
    groups: list[dict[str, Any]] = []
    for kind in ("muon", "scion", "adamw"):
        members = [a for a in assigned if a.algorithm == kind]
        if members:
            group: dict[str, Any] = {"params": [(a.name, a.parameter) for a in members], "algorithm": kind}
            if kind == "muon":
                group["matrices"] = tuple(a.matrices for a in members)
            if kind == "scion":
                group["lmo"] = tuple(a.lmo for a in members)
            groups.append(group | {"reasons": tuple(a.why for a in members)})
    if not groups:
        raise ConfigError(f"no parameter is left to train: freeze={list(freeze)} or requires_grad covers all of them.")
    return groups


def assign(
    model: nn.Module,
    *,
    freeze: Iterable[str],
    adamw: Iterable[str],
    matrices: Mapping[str, Spec],
    non_matrix: str = "adamw",
    router: str = "muon",
    heads: str = "whole",
) -> list[Assignment]:
    """What `param_groups` decides, parameter by parameter in the model's order; freezes what `freeze` matches."""
    parameters = list(_named_parameters_with_module(model))
    freeze, adamw = tuple(freeze), tuple(adamw)
    buffers = list(_trained_buffers(model))
    names = [name for name, *_ in parameters]
    _check_patterns(names, adamw=adamw, matrices=matrices)
    _check_patterns([*names, *(name for name, *_ in buffers)], freeze=freeze)
    left = (*freeze, *adamw)
    check_shapes(model, (entry for entry in parameters if entry[3].requires_grad and not _matches(entry[0], left)))
    heads_known = head_weights(model)
    facts = _Facts(heads_known, possible_heads(model, heads_known), fused_layers(model), expert_factors(model))
    routers = _routers(model) if router == "adamw" else set()
    split = _split_heads(model) if heads == "split" else {}
    for name, _, _, p in parameters:
        if _matches(name, freeze):
            p.requires_grad_(False)
    for name, module, local, _ in buffers:
        if _matches(name, freeze):
            module.freeze_buffer(local)
    assignments: dict[int, Assignment] = {}
    asked: dict[int, _Question] = {}
    answered: set[int] = set()
    for name, module, local, p in parameters:
        if not p.requires_grad:
            continue
        given = [spec for pattern, spec in matrices.items() if fnmatch.fnmatchcase(name, pattern)]
        by_adamw = _matches(name, adamw)
        if by_adamw or given:
            answered.add(id(p))
        if by_adamw:
            new: Assignment | _Question = Assignment(name, p, "adamw", (), "asked for")
        elif given:
            new = _muon(name, p, given[0], "asked for")
        elif id(p) in routers and p.ndim >= 2:
            new = Assignment(name, p, "adamw", (), "router")
        elif name in split and p.ndim >= 2:
            new = _muon(name, p, *split[name])
        else:
            new = _decide(name, module, local, p, facts)
        if isinstance(new, _Question):
            asked.setdefault(id(p), new)
            continue
        if new.algorithm == _NON_MATRIX:
            new = replace(new, algorithm=non_matrix)
        assignments[id(p)] = _tie(assignments[id(p)], new) if id(p) in assignments else new
    if questions := [question for i, question in asked.items() if i not in answered]:
        raise ConfigError(_ask(questions, [name for name, _, _, p in parameters if p.requires_grad]))
    return list(assignments.values())


def describe(groups: Sequence[Mapping[str, Any]] | torch.optim.Optimizer, model: nn.Module | None = None) -> str:
    """A table of who gets what and why; names that differ only in numbers share a line.

    groups: of `param_groups`, or an optimizer; `Muon` remembers why. model: when given, its parameters in no group are
        shown as frozen.
    """
    lines: dict[tuple[str, ...], list[int]] = {}
    remembered: Mapping[Tensor, str] = getattr(groups, "reasons", {})
    groups = groups.param_groups if isinstance(groups, torch.optim.Optimizer) else groups

    def add(name: str, p: Tensor, algorithm: str, holds: str, why: str) -> None:
        key = (algorithm, _starred(name), holds, why)
        count = lines.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += p.numel()

    seen: set[int] = set()
    for group in groups:
        named = _named(group)
        specs = group.get("matrices") or ((),) * len(named)
        reasons = group.get("reasons") or [remembered.get(p, "") for _, p in named]
        lmos = group.get("lmo") or ("",) * len(named)
        for (name, p), spec, lmo, why in zip(named, specs, lmos, reasons, strict=True):
            seen.add(id(p))
            holds = _matrices_text(tuple(p.shape), spec) + (f", {lmo}" if lmo else "")
            add(name, p, group.get("algorithm", "muon"), holds, why)
    for name, p in model.named_parameters() if model is not None else ():
        if id(p) not in seen:
            add(name, p, "frozen", _matrices_text(tuple(p.shape), ()), "not trained")
    for name, module, local, moves in _trained_buffers(model) if model is not None else ():
        if not moves:
            buffer = getattr(module, local)
            add(name, buffer, "frozen", _matrices_text(tuple(buffer.shape), ()), "buffer, not moved")
    rows = [("algorithm", "parameter", "tensors", "elements", "each holds", "why")]
    rows += [(k[0], k[1], str(n[0]), f"{n[1]:,}", k[2], k[3]) for k, n in lines.items()]
    for kind in ("muon", "scion", "adamw", "frozen"):
        if chosen := [n for k, n in lines.items() if k[0] == kind]:
            rows.append((kind, "total", str(sum(n[0] for n in chosen)), f"{sum(n[1] for n in chosen):,}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _check_patterns(names: Sequence[str], **options: Iterable[str]) -> None:
    for option, patterns in options.items():
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"{option} pattern {pattern!r} matches none of the {len(names)} parameters.")


@dataclass(frozen=True)
class _Facts:
    """What the whole model shows of its linear layers, by id of the weight."""

    heads: set[int]
    possible_heads: dict[int, str]
    fused: dict[int, Fused]
    expert_factors: dict[int, Spec]


def _decide(name: str, module: nn.Module, local: str, p: Tensor, facts: _Facts) -> Assignment | _Question:
    """By what the module is. The algorithm of anything that is not a hidden matrix is left open, _NON_MATRIX."""
    kind = type(module).__name__
    is_head = id(p) in facts.heads
    declare = getattr(module, "logical_matrices", None)
    declared: Mapping[str, Spec] = declare() if callable(declare) else {}
    if local in declared:
        return _muon(name, p, declared[local], f"declared by {kind}")
    if isinstance(module, EMBEDDINGS):
        if is_head:
            return Assignment(name, p, _NON_MATRIX, (), f"embedding ({kind}), tied", "sign")
        return Assignment(name, p, _NON_MATRIX, (), f"embedding ({kind})", "row_rms")
    if isinstance(module, _NORMS):
        return Assignment(name, p, _NON_MATRIX, (), f"norm ({kind})", "rms")
    if p.ndim < 2:
        return Assignment(name, p, _NON_MATRIX, (), "vector or scalar", "rms")
    if p.numel() == max(p.shape):
        return Assignment(name, p, _NON_MATRIX, (), "matrix of one row or column", "rms")
    if is_head:
        return Assignment(name, p, _NON_MATRIX, (), "head", "sign")
    if isinstance(module, nn.Linear) and local == "weight":
        return _decide_linear(name, kind, p, facts)
    if isinstance(module, _CONVOLUTIONS) and local == "weight":
        return _muon(name, p, ("flatten", module.groups), f"convolution ({kind})")
    if local == "weight" and is_router(module) and tuple(p.shape[:-1]) == (getattr(module, "num_experts", None),):
        return _muon(name, p, ("matrix",), f"router ({kind})")
    stack = _expert_stack(module)
    if local in stack:
        return _muon(name, p, stack[local], f"experts ({kind})")
    if stack and local in (f"{weight}_bias" for weight in stack) and p.ndim == 2:
        return Assignment(name, p, _NON_MATRIX, (), f"biases of experts ({kind})", "rms")
    text = (
        f"cannot tell which optimizer {{}} of {kind} needs: its rows and columns may be several fused matrices, which "
        f"{kind} can declare by a method logical_matrices()"
    )
    return _Question(name, p, text, layout_of(module, local, p))


def _decide_linear(name: str, kind: str, p: Tensor, facts: _Facts) -> Assignment | _Question:
    if fused := facts.fused.get(id(p)):
        unknown = "" if fused.known else ", divided in a way that is not known here (docs/muon.md has the usual ones)"
        return _Question(name, p, f"{{}} seems to hold {fused.parts} in one weight{unknown}", fused.spec)
    if spec := facts.expert_factors.get(id(p)):
        return _muon(name, p, spec, "low-rank factors of experts")
    if reason := facts.possible_heads.get(id(p)):
        return _Question(name, p, f"{{}} may be the head ({reason}) or a hidden layer", ("matrix",))
    return _muon(name, p, ("matrix",), f"linear layer ({kind})")


def _ask(questions: Sequence[_Question], names: Sequence[str]) -> str:
    """One message for all; what it says to pass is enough. names: of all trained parameters."""
    alike: dict[tuple[str, str, tuple[int, ...], Spec | None], list[str]] = {}
    for q in questions:
        key = (_starred(q.name), q.text, tuple(q.parameter.shape), q.spec)
        alike.setdefault(key, []).append(q.name)
    texts, adamw, matrices = [], [], []
    for (pattern, text, shape, spec), members in alike.items():
        count = f" ({len(members)} of them)" if len(members) > 1 else ""
        texts.append(text.format(f"{pattern if count else members[0]} {list(shape)}{count}"))
        exact = set(fnmatch.filter(names, pattern)) <= set(members)
        for name in [pattern] if exact and count else members:
            adamw.append(name)
            matrices.append(f"{name!r}: {'specification' if spec is None else spec}")
    return (
        f"{'; '.join(texts)}. Pass adamw={adamw} for AdamW, which is right for heads, or "
        f"matrices={{{', '.join(matrices)}}} for Muon on these logical matrices, or some of them to each."
    )


def _starred(name: str) -> str:
    """Numbers in a name as *: the pattern of all layers."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _expert_stack(module: nn.Module) -> dict[str, Spec]:
    """The matrices of transformers' expert stacks, parameter name -> specification; {} for any other module.

    Their modules carry how they are stored, `has_gate`, `is_transposed` (each [in, out], not [out, in]) and
    `is_concatenated` (gate and up one after the other, not row by row in turns). Not taken are stacks without these
    flags or of other shapes (shapes alone do not tell the last two apart), and gate and up in turns of columns, as
    gpt-oss has them: no specification describes these.
    """
    gated, transposed, concatenated = (
        getattr(module, flag, None) for flag in ("has_gate", "is_transposed", "is_concatenated")
    )
    into, out = getattr(module, "gate_up_proj" if gated else "up_proj", None), getattr(module, "down_proj", None)
    if any(not isinstance(flag, bool) for flag in (gated, transposed, concatenated)):
        return {}
    if not isinstance(into, Tensor) or not isinstance(out, Tensor) or into.ndim != 3 or out.ndim != 3:
        return {}
    experts, width, inner = out.shape
    if transposed:
        width, inner = inner, width
    both = inner * 2 if gated else inner
    if tuple(into.shape) != ((experts, width, both) if transposed else (experts, both, width)):
        return {}
    if not gated:
        return {"up_proj": ("batch",), "down_proj": ("batch",)}
    if not concatenated:
        return {} if transposed else {"gate_up_proj": ("interleaved", inner, (1, 1)), "down_proj": ("batch",)}
    return {"gate_up_proj": ("cols" if transposed else "rows", (inner, inner)), "down_proj": ("batch",)}


def _muon(name: str, p: Tensor, spec: Spec, why: str) -> Assignment:
    spec = normalize(spec)
    if all(min(m.M, m.N) == 1 for m in logical_matrices(p.shape, spec, name)):
        return Assignment(name, p, _NON_MATRIX, (), "matrix of one row or column", "rms")
    return Assignment(name, p, "muon", spec, why)


def _tie(old: Assignment, new: Assignment) -> Assignment:
    """One tensor in two places. AdamW is right for an embedding's matrix; as a linear layer's it is the head."""
    if old.algorithm == new.algorithm:
        return old
    side, other = (old, new) if new.algorithm == "muon" or old.algorithm == "adamw" else (new, old)
    lmo = "sign" if side.lmo == "row_rms" and other.algorithm == "muon" else side.lmo
    return replace(side, name=old.name, matrices=(), why=f"{side.why}, tied", lmo=lmo)


def _routers(model: nn.Module) -> set[int]:
    """ids of the parameters of routers; ConfigError where there is none."""
    routers = [m for m in model.modules() if is_router(m)]
    for parent in model.modules():
        children = dict(parent.named_children())
        if "experts" in children:
            routers += [children[name] for name in ROUTER_NAMES if name in children]
    if not routers:
        raise ConfigError(
            f"optimizer.router='adamw' finds no router in {type(model).__name__}: set is_router = True on its class, "
            f"or name the weights by adamw=[...]; router='muon' is right for a model without experts."
        )
    return {id(p) for module in routers for p in module.parameters()}


def _split_heads(model: nn.Module) -> dict[str, tuple[Spec, str]]:
    """Full parameter name -> (specification by heads, reason), of all modules that declare their heads."""
    split: dict[str, tuple[Spec, str]] = {}
    for prefix, module in model.named_modules():
        declare = getattr(module, "query_key_heads", None)
        for local, (n, sizes) in declare()["rows"].items() if callable(declare) else ():
            spec = ("heads", n) if len(sizes) == 1 else ("heads", n, tuple(sizes))
            name = f"{prefix}.{local}" if prefix else local
            split[name] = (spec, f"by heads ({type(module).__name__})")
    if not split:
        raise ConfigError(
            f"optimizer.heads='split' finds no heads in {type(model).__name__}: give its attention a method "
            f"query_key_heads(), or pass matrices={{'*.q_proj.weight': ('heads', number of heads)}} and heads='whole'."
        )
    return split


def _named_parameters_with_module(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, owning module, local name, parameter), a tied parameter once per place."""
    for prefix, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module, local, p


def _trained_buffers(model: nn.Module) -> Iterator[tuple[str, Any, str, bool]]:
    """(full name, owning module, local name, whether it moves) of the buffers that modules say training moves."""
    for prefix, module in model.named_modules():
        listed = getattr(module, "trained_buffers", None)
        for local, moves in (listed() if callable(listed) else {}).items():
            name = f"{prefix}.{local}" if prefix else local
            yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module, local, moves


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
    for m in logical_matrices(shape, spec):
        counts[m.M, m.N] = counts.get((m.M, m.N), 0) + 1
    return " + ".join(f"{count} of {rows} x {cols}" for (rows, cols), count in counts.items())
