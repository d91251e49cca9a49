"""What an upcycling will do, before it does it: one rule per target tensor, and a ledger that accounts for all.

A dense feed-forward network becomes `experts` copies of itself behind a new router (sparse upcycling:
arXiv:2212.05055; of Llama 3: arXiv:2412.09952). With the gate "topk_softmax" the chosen experts' weights sum to one,
so the function is unchanged.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from earthshine.checkpoint.accounting import match_tensors
from earthshine.checkpoint.hf import read_config
from earthshine.checkpoint.name_tables import Entry, entries
from earthshine.checkpoint.safetensors_store import DTYPE_NAMES, Store
from earthshine.checkpoint.tokenizer_class import Reading, keep_class
from earthshine.checkpoint.tokenizer_files import check_token_ids, tokenizer_and_license_files
from earthshine.config import encode
from earthshine.console import human_bytes, table
from earthshine.errors import ConfigError, UnsupportedModelError, WeightsError
from earthshine.model.config import ModelConfig, MoEConfig
from earthshine.model.counts import count_parameters
from earthshine.model.hf_config import read_hf_config
from earthshine.model.hf_families import HF_CLASSES
from earthshine.model.serving import SERVED, serving_notes
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.tensor_rules import Copy, Normal, TensorRule, Zeros

PLAN_VERSION = 1  # raised when the same options would give other bytes

EXPERT_OF = {  # which dense matrix each expert of a stack is made of
    "moe.experts.w_gate_EFD": "ffn.gate_proj.weight",
    "moe.experts.w_up_EFD": "ffn.up_proj.weight",
    "moe.experts.w_down_EDF": "ffn.down_proj.weight",
}


@dataclass(frozen=True)
class Target:
    """One tensor of the output and how it is made."""

    entry: Entry
    rule: TensorRule
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.entry.shape) * self.dtype.itemsize


class LedgerRow(TypedDict):
    """A role, ready for JSON: one parameter of the new model, what it is made of, and all output tensors it becomes.

    recipe: the kind of its rule; every earthshine.json has it under this name. A source that is not used has a row
    without targets, whose role is the reason.
    """

    role: str
    recipe: str
    sources: list[str]
    targets: list[str]
    num_bytes: int


@dataclass(frozen=True)
class UpcyclePlan:
    """A conversion, decided in full. Of the weights nothing but headers has been read.

    entries: every tensor that the target config demands, in the order of writing. targets: how each is made.
    files: what travels beside the weights, by name. reading: who reads the tokenizer; None without one.
    """

    store: Store
    options: UpcycleConfig
    source_config: ModelConfig
    target_config: ModelConfig
    entries: tuple[Entry, ...]
    targets: tuple[Target, ...]
    unused: dict[str, str]
    files: dict[str, bytes]
    reading: Reading | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all target tensors."""
        return sum(t.num_bytes for t in self.targets)

    def ledger(self) -> list[LedgerRow]:
        """One row per role, in the order of writing, and one per unused source."""
        roles: dict[str, list[Target]] = {}
        for target in self.targets:
            roles.setdefault(target.entry.ours, []).append(target)
        rows = [
            LedgerRow(
                role=role,
                recipe=members[0].rule.kind,
                sources=list(dict.fromkeys(s for t in members for s in t.rule.sources)),
                targets=[t.entry.hf for t in members],
                num_bytes=sum(t.num_bytes for t in members),
            )
            for role, members in roles.items()
        ]
        for name, why in sorted(self.unused.items()):
            rows.append(LedgerRow(role=why, recipe="unused", sources=[name], targets=[], num_bytes=0))
        return rows

    def check(self) -> None:
        """Raises WeightsError unless every source serves exactly one role and every target is made exactly once."""
        ledger = self.ledger()
        consumed = Counter(s for row in ledger for s in row["sources"])
        produced = Counter(t for row in ledger for t in row["targets"])
        _exactly_once("source", consumed, self.store.names())
        _exactly_once("target", produced, [e.hf for e in self.entries])

    def table(self) -> str:
        """Human-readable: both models' sizes, and the ledger, with layers that are treated alike in one line."""
        sizes = []
        for what, config in (("dense", self.source_config), ("upcycled", self.target_config)):
            count = count_parameters(config)
            sizes.append([what, HF_CLASSES[config.family], f"{count.total:,}", f"{count.active:,}"])
        groups: dict[tuple[str, str, str, int], list[LedgerRow]] = {}
        for row in self.ledger():
            source = ", ".join(re.sub(r"\.\d+\.", ".*.", s) for s in row["sources"]) or "-"
            role = re.sub(r"^blocks\.\d+\.", "blocks.*.", row["role"])
            groups.setdefault((role, row["recipe"], source, len(row["targets"])), []).append(row)
        lines = [
            [source, kind, role, len(rows), len(rows) * count, human_bytes(sum(r["num_bytes"] for r in rows))]
            for (role, kind, source, count), rows in groups.items()
        ]
        o = self.options
        return "\n\n".join(
            [
                f"{o.experts} experts, top-{o.top_k}, in {len(self.target_config.moe.layers)} of "
                f"{self.target_config.num_hidden_layers} layers; router N(0, {o.router_std}), seed {o.seed}; "
                f"{len(self.targets)} tensors, {human_bytes(self.num_bytes)}",
                table(["model", "class", "parameters", "active"], sizes),
                table(["source", "rule", "becomes", "roles", "tensors", "size"], lines),
                self._beside(),
            ]
        )

    def _beside(self) -> str:
        """What travels beside the weights, who reads the tokenizer, and what the serving programs do not read."""
        tokenizer = self.reading.sentence if self.reading else "no tokenizer"
        lines = [f"beside the weights: {', '.join(self.files) or 'nothing'}", f"tokenizer: {tokenizer}"]
        return "\n".join([*lines, *(f"serving: {note}" for note in serving_notes(self.target_config) or [SERVED])])

    def to_json(self) -> dict[str, Any]:
        """All of it but the weights, for the output's `earthshine.json`."""
        return {
            "format": PLAN_VERSION,
            "kind": "upcycle",
            "options": encode(self.options),
            "source": {
                "config": encode(self.source_config),
                "parameters": asdict(count_parameters(self.source_config)),
            },
            "target": {
                "config": encode(self.target_config),
                "parameters": asdict(count_parameters(self.target_config)),
            },
            "tokenizer": None if self.reading is None else asdict(self.reading),
            "serving": serving_notes(self.target_config),
            "ledger": self.ledger(),
        }

    def resume_key(self) -> dict[str, Any]:
        """What must be unchanged for a killed conversion to resume: the options, and the source files as they were."""
        tensors = {name: [DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in self.store.items()}
        return self.to_json() | {"ledger": None, "source_files": self.source_files(), "source_tensors": tensors}

    def source_files(self) -> dict[str, list[int]]:
        """Size, times and inode of each weight file. The time of change is the one that copying cannot set back."""
        stats = {path.name: path.stat() for path in self.store.files()}
        return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats.items()}


def plan_upcycle(dense_dir: str | Path, options: UpcycleConfig | None = None) -> UpcyclePlan:
    """Decide the conversion of a dense Hugging Face directory; of its weights it reads the headers only.

    Raises ConfigError (a layer that does not exist, a link out of the folder), UnsupportedModelError (a source that
    cannot be upcycled), WeightsError (a tensor that is missing, left over or misshapen, a damaged file).
    """
    options = options or UpcycleConfig()
    source_config = read_config(dense_dir)
    if source_config.is_moe:
        raise UnsupportedModelError(f"{dense_dir} is an MoE already ({source_config.family}).")
    target_config = upcycled_config(source_config, options)
    store = Store(dense_dir)
    match = match_tensors(store, source_config)
    sources = {e.ours: match.locations[e.hf].name for e in match.entries}
    demanded = tuple(entries(target_config))
    targets = tuple(_target(entry, sources, store, options) for entry in demanded)
    files = tokenizer_and_license_files(dense_dir)
    check_token_ids(files, target_config, dense_dir)
    named = read_hf_config(dense_dir).get("tokenizer_class")
    files, reading = keep_class(files, source_config.family, target_config.family, named if type(named) is str else "")
    plan = UpcyclePlan(store, options, source_config, target_config, demanded, targets, match.unused, files, reading)
    plan.check()
    return plan


def upcycled_config(dense: ModelConfig, options: UpcycleConfig) -> ModelConfig:
    """The architecture after the conversion, in the family that holds the dense model's attention.

    A Llama or Mistral becomes a Mixtral when all layers are converted, else a Qwen2-MoE; a Qwen2 a Qwen2-MoE; a Qwen3 a
    Qwen3-MoE. A Qwen2-MoE has a shared expert in each converted layer: here of zeros.

    Raises ConfigError for a layer that does not exist, UnsupportedModelError for a source that no family fits.
    """
    if dense.mla.kv_lora_rank:
        raise UnsupportedModelError(
            f"a {dense.family} cannot be upcycled: the classes with latent attention only have the gate "
            "'sigmoid_bias', whose weights do not sum to one. Take a dense Llama, Mistral, Qwen2 or Qwen3."
        )
    layers = tuple(sorted(options.layers)) or tuple(range(dense.num_hidden_layers))
    outside = [layer for layer in layers if not 0 <= layer < dense.num_hidden_layers]
    if outside:
        raise ConfigError(
            f"upcycle.layers: {outside} do not exist; the model has layers 0 to {dense.num_hidden_layers - 1}."
        )
    everywhere = len(layers) == dense.num_hidden_layers
    shared = not dense.qk_norm and (dense.qkv_bias or not everywhere)
    moe = MoEConfig(
        num_experts=options.experts,
        top_k=options.top_k,
        intermediate_size=dense.intermediate_size,
        layers=layers,
        shared_intermediate_size=options.shared_intermediate_size if shared else 0,
    )
    return replace(dense, moe=moe, model_type="")


def _target(entry: Entry, sources: dict[str, str], store: Store, options: UpcycleConfig) -> Target:
    """One target and its rule: a copy where the dense model has it, else a part of an MoE layer."""
    if entry.ours in sources:
        source = sources[entry.ours]
        return Target(entry, Copy(source), store.info(source).dtype)
    _, layer, part = entry.ours.split(".", 2)
    if part in EXPERT_OF:
        source = sources[f"blocks.{layer}.{EXPERT_OF[part]}"]
        return Target(entry, Copy(source), store.info(source).dtype)
    dtype = store.info(sources[f"blocks.{layer}.ffn.gate_proj.weight"]).dtype
    if part == "moe.router.weight":
        finite = torch.finfo(dtype)
        if not finite.tiny <= options.router_std <= finite.max / 16:  # no sample is beyond 9 standard deviations
            raise ConfigError(f"upcycle.router_std={options.router_std} gives zeros or infinities in {dtype}.")
        normal = Normal(entry.shape, dtype, options.router_std, options.seed, int(layer), "router")
        return Target(entry, normal, dtype)
    assert part.startswith("moe.shared"), f"no rule for {entry.ours}"
    return Target(entry, Zeros(entry.shape, dtype), dtype)


def _exactly_once(what: str, counted: Counter[str], expected: Sequence[str]) -> None:
    for name in expected:
        if counted[name] != 1:
            raise WeightsError(f"ledger: {what} tensor {name} is accounted for {counted[name]} times, not once.")
    surplus = sorted(set(counted) - set(expected))
    if surplus:
        raise WeightsError(f"ledger: {what} tensor {surplus[0]} is not one of the model's.")
