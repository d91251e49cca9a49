"""optim/options.py and optim/config.py: every option is declared once, in GroupOptions."""

import inspect

from earthshine.optim.config import GroupOptions, OptimizerConfig
from earthshine.optim.muon import Muon
from earthshine.optim.options import DEFAULTS


def test_the_keywords_of_muon_are_the_group_options_with_their_defaults() -> None:
    """Written out in Muon.__init__, for editors and type checkers; this holds the two together."""
    keywords = dict(inspect.signature(Muon).parameters)
    shared = {"params", "lr", "process_group", "reduce_gradients", "max_bucket_bytes"}  # lr has no default there
    assert {name: p.default for name, p in keywords.items() if name not in shared} == {
        name: default for name, default in DEFAULTS.items() if name != "lr"
    }
    assert all(p.kind is p.KEYWORD_ONLY for name, p in keywords.items() if name not in ("params", "lr"))


def test_options_of_a_group_and_of_a_config_are_one_another() -> None:
    values = {"betas": (0.8, 0.9), "ns_coefficients": ((2.0, -1.5, 0.5),), "lr": 0.5, "rounding_seed": 7}
    options = GroupOptions.of_group(DEFAULTS | values)
    assert options == GroupOptions(
        lr=0.5, beta1=0.8, beta2=0.9, ns_coefficients="table", ns_table=((2.0, -1.5, 0.5),), rounding_seed=7
    )
    assert options.as_group() == DEFAULTS | values
    assert OptimizerConfig(momentum=0.5, rest="scion").as_group() == DEFAULTS | {"momentum": 0.5}
