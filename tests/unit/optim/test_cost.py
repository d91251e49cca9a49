"""optim/cost.py beside the optimizer that is built: elements, state and FLOPs, for every value of every option."""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from settings import SETTINGS

from earthshine.model.config import ModelConfig
from earthshine.model.parameters import ParameterShape, parameter_shapes
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer
from earthshine.ops.orthogonalize import resolve_method
from earthshine.optim.build import build_optimizer
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.cost import Cost, cost
from earthshine.optim.logical_matrices import logical_matrices

FP32 = OptimizerConfig(ns_dtype="float32")
OPTIONS: dict[str, OptimizerConfig] = {
    # Every value of every option that there is ...
    **{name: OptimizerConfig(**{"ns_dtype": "float32"} | changed) for name, changed in SETTINGS.items()},
    # ... and those that meet in one number.
    "default": FP32,
    "router, scion": replace(FP32, router="adamw", non_matrix="scion"),
    "bf16 momentum, scion": replace(FP32, momentum_dtype="bfloat16", non_matrix="scion"),
    "normuon, heads": replace(FP32, normuon_beta2=0.95, heads="split"),
    "adamw, schatten": replace(FP32, algorithm="adamw", norm="schatten", schatten_p=4.0),
    "table, steps": replace(FP32, ns_coefficients="table", ns_table=((2.0, -1.5, 0.5),) * 3, ns_steps=5),
    **{
        f"{table}, {form}, {dtype}": OptimizerConfig(ns_coefficients=table, ns_form=form, ns_dtype=dtype)
        for table in ("keller5", "you5", "polar_express", "deepseek_v4")
        for form in ("standard", "gram", "auto")
        for dtype in ("float32", "bfloat16", "float16")
    },
}


def trained(model: ModelConfig, config: OptimizerConfig) -> list[ParameterShape]:
    return [w for w in parameter_shapes(model) if not any(fnmatchcase(w.name, pattern) for pattern in config.freeze)]


def of_the_built(model: ModelConfig, config: OptimizerConfig) -> dict[str, Cost]:
    """From the groups, tensors of state, and logical matrices of an optimizer on the meta device, as an accelerator."""
    with torch.device("meta"):
        built = build_optimizer(Transformer(model), config)
    costs = {"muon": Cost(), "adamw": Cost(), "scion": Cost()}
    for group in built.param_groups:
        total = costs[group["algorithm"]]
        for i, p in enumerate(group["params"]):
            total.elements += p.numel()
            total.state_bytes += sum(t.nbytes for key, t in built.state[p].items() if key != "step")
            if group["algorithm"] == "muon" and group["norm"] == "spectral":
                total.newton_schulz_flops += sum(
                    _flops(m.M, m.N, group) for m in logical_matrices(p.shape, group["matrices"][i])
                )
    return costs


def _flops(M: int, N: int, group: dict[str, Any]) -> int:
    dtype, device = getattr(torch, group["ns_dtype"]), torch.device("meta")
    table, steps = group["ns_coefficients"], group["ns_steps"]
    return resolve_method(group["ns_form"], M, N, dtype, device, table, steps).flops(M, N)


@pytest.mark.parametrize("name", ["llama3_tiny", "llama3_tiny_e8t2", "moonlight_tiny"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_cost_is_that_of_the_optimizer_that_is_built(name: str, option: str) -> None:
    config = OPTIONS[option]
    model = PRESETS[name]()
    if config.router == "adamw" and not model.is_moe:
        pytest.skip("a dense model has no router")
    costs: dict[str, Cost] = {**cost(config, trained(model, config))}
    assert costs == of_the_built(model, config)
    # An algorithm that the options name and nobody knows would count as another one on both sides.
    assert costs[config.algorithm].elements and (config.algorithm == "adamw" or costs[config.non_matrix].elements)


def _changed(field: str, value: Any) -> Callable[[], ModelConfig]:
    return lambda: replace(PRESETS["llama3_tiny_e8t2"](), **{field: value})


@pytest.mark.parametrize(
    "model",
    [
        _changed("tie_word_embeddings", True),
        _changed("qk_norm", True),
        lambda: replace(PRESETS["moonlight_tiny"](), mla=replace(PRESETS["moonlight_tiny"]().mla, q_lora_rank=24)),
    ],
    ids=["tied", "qk norm", "latent queries"],
)
@pytest.mark.parametrize("option", ["default", "non_matrix=scion", "heads=split", "normuon, heads"])
def test_so_it_is_for_other_architectures(model: Callable[[], ModelConfig], option: str) -> None:
    assert cost(OPTIONS[option], parameter_shapes(model())) == of_the_built(model(), OPTIONS[option])
