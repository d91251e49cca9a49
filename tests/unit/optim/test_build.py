"""optim/build.py: a job's config becomes groups and their options, whole."""

import copy
from typing import Any

import pytest
from settings import SETTINGS
from small import Small

from earthshine.optim.build import build_optimizer, configured_groups
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.groups import describe
from earthshine.optim.options import DEFAULTS


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_option_reaches_its_group(setting: str) -> None:
    changed: dict[str, Any] = {"ns_dtype": "float32"} | SETTINGS[setting]
    if "router" in changed or "heads" in changed:
        pytest.skip("which parameters are in which group: test_groups.py and test_cost.py")
    config = OptimizerConfig(**changed)
    for group in build_optimizer(Small(), config).param_groups:
        expected = config.as_group() | {"ns_steps": config.newton_schulz_steps}
        if group["algorithm"] != "muon":
            expected["normuon_beta2"] = 0.0
        assert {name: group[name] for name in DEFAULTS} == expected


def test_who_gets_what_is_the_configs() -> None:
    chosen = build_optimizer(Small(), OptimizerConfig(non_matrix="scion", ns_dtype="float32"))
    assert [g["algorithm"] for g in chosen.param_groups] == ["muon", "scion"]
    assert chosen.param_groups[0]["param_names"] == ["up.weight", "down.weight"]
    everything = build_optimizer(Small(), OptimizerConfig(algorithm="adamw", ns_dtype="float32"))
    assert [g["algorithm"] for g in everything.param_groups] == ["adamw"]
    model = Small()
    frozen = build_optimizer(model, OptimizerConfig(freeze=("embed.*",), ns_dtype="float32"))
    assert not model.embed.weight.requires_grad
    assert all("embed.weight" not in g["param_names"] for g in frozen.param_groups)


def test_the_optimizer_remembers_why() -> None:
    """Also a copy of it; nothing of it is saved."""
    model, config = Small(), OptimizerConfig(freeze=("norm.*",), ns_dtype="float32")
    optimizer = build_optimizer(model, config)
    table = describe(optimizer, model)
    assert table == describe(configured_groups(model, config), model)
    assert "linear layer (Linear)" in table and "not trained" in table
    assert describe(copy.deepcopy(optimizer)) == describe(optimizer)
    assert "reasons" not in optimizer.state_dict()["param_groups"][0] and "reasons" not in optimizer.param_groups[0]
