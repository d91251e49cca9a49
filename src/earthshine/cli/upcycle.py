"""`earthshine upcycle`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from earthshine.cli.options import json_text, print_outcome
from earthshine.upcycle.config import UpcycleConfig

DESCRIPTION = """Turn a dense Hugging Face checkpoint into a Mixture-of-Experts one that computes the same function.

All layers of a Llama or Mistral give a Mixtral, some a Qwen2-MoE; a Qwen2 gives a Qwen2-MoE, a Qwen3 a Qwen3-MoE.
Weights are streamed: memory stays at one matrix, and after a kill the same command goes on."""
EXAMPLES = (
    ("8 experts, 2 of them per token, in every layer", "earthshine upcycle models/llama models/llama-8x"),
    ("what would be written, and from what", "earthshine upcycle models/llama models/llama-8x --dry-run"),
    ("some layers only", "earthshine upcycle models/llama models/some --experts 4 --layers 8 9 10 11"),
)


@dataclass(frozen=True)
class Options:
    dense: Annotated[Positional[Path], arg(metavar="DENSE_DIR")]
    """Hugging Face directory of the dense model."""

    out: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """Directory to write; it must not exist, unless it is what a killed conversion left."""

    experts: int = UpcycleConfig.experts
    """Experts per converted layer."""

    top_k: int = UpcycleConfig.top_k
    """Experts that each token passes through."""

    layers: tuple[int, ...] = UpcycleConfig.layers
    """Layers to convert, counted from 0; none given: all."""

    router_std: float = UpcycleConfig.router_std
    """Standard deviation of the router's normally drawn weights."""

    seed: int = UpcycleConfig.seed
    """Of everything drawn."""

    shared_intermediate_size: int = UpcycleConfig.shared_intermediate_size
    """Width of the zero shared expert, where the result is a Qwen2-MoE: that class demands one."""

    max_shard_gib: float = UpcycleConfig.max_shard_gib
    """Largest size of one weight file, in GiB; also the unit in which a killed conversion goes on."""

    dry_run: bool = False
    """Print the plan and the ledger of every tensor, and write nothing."""

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
