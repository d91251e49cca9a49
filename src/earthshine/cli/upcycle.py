"""`earthshine upcycle`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.arguments import Positional
from earthshine.cli.options import json_text, print_outcome
from earthshine.upcycle.config import UpcycleConfig

DESCRIPTION = """Turn a dense Hugging Face checkpoint into a Mixture-of-Experts one that computes the same function.

A Llama or Mistral becomes a Mixtral when every layer is converted and a Qwen2-MoE when only some are; a Qwen2 becomes
a Qwen2-MoE, a Qwen3 a Qwen3-MoE. Weights are streamed, so that memory stays at one matrix; re-run the same command
after a kill to resume."""
EXAMPLES = (
    ("8 experts in every layer, 2 of them per token", "earthshine upcycle models/llama models/llama-8x"),
    (
        "what would be written, and from what, without writing it",
        "earthshine upcycle models/llama models/llama-8x --dry-run",
    ),
    ("only some layers", "earthshine upcycle models/llama models/some --experts 4 --layers 8 9 10 11"),
)


@dataclass(frozen=True)
class Options:
    dense: Annotated[Path, Positional("DENSE_DIR")]
    """Hugging Face directory of the dense model."""

    out: Annotated[Path, Positional("OUT_DIR")]
    """Directory to write; it must not exist. What a killed conversion left is resumed."""

    experts: int = UpcycleConfig.experts
    """Experts per converted layer."""

    top_k: int = UpcycleConfig.top_k
    """Experts that each token passes through."""

    layers: Annotated[tuple[int, ...], "N"] = UpcycleConfig.layers
    """Layers to convert, counted from 0; by default all."""

    router_std: float = UpcycleConfig.router_std
    """Standard deviation of the router's initial weights, which are normally distributed."""

    seed: int = UpcycleConfig.seed
    """Seed for the router's initial weights."""

    shared_intermediate_size: int = UpcycleConfig.shared_intermediate_size
    """Width of the shared expert of zeros where the result is a Qwen2-MoE, a class that requires one."""

    max_shard_gib: float = UpcycleConfig.max_shard_gib
    """Largest size of one weight file, in GiB; a killed conversion resumes at whole files."""

    dry_run: bool = False
    """Print the plan and the ledger of every tensor; write nothing."""

    json: bool = False
    """Print the plan with its ledger as JSON."""


def run(options: Options) -> None:
    from earthshine.upcycle.convert import upcycle
    from earthshine.upcycle.plan import plan_upcycle

    config = UpcycleConfig(
        experts=options.experts,
        top_k=options.top_k,
        layers=options.layers,
        router_std=options.router_std,
        seed=options.seed,
        shared_intermediate_size=options.shared_intermediate_size,
        max_shard_gib=options.max_shard_gib,
    )
    plan = plan_upcycle(options.dense, config) if options.dry_run else upcycle(options.dense, options.out, config)
    print_outcome(json_text(plan.to_json()) if options.json else plan.table())
